"""What DALI makes of packed images, on the CPU."""

import io
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from shards.images import CheckedImage


def assert_dali_agrees(packed: Sequence[tuple[str, CheckedImage]], *, batch_size: int = 16) -> None:
    """DALI decodes each image alone and in a batch, to the index's size and Pillow's pixels."""
    alone = dali_decode([found for _, found in packed], batch_size=1)
    together = dali_decode([found for _, found in packed], batch_size=batch_size)
    for (name, found), one, other in zip(packed, alone, together, strict=True):
        assert one.shape == (found.height, found.width, 3), name
        assert np.array_equal(one, other), name
        shown = ImageOps.exif_transpose(Image.open(io.BytesIO(bytes(found.data)))).convert("RGB")
        difference = np.abs(one.astype(np.int16) - np.asarray(shown, dtype=np.int16))
        assert difference.mean() < 3, name


def dali_refuses(packed: Sequence[tuple[str, CheckedImage]]) -> list[str]:
    """What DALI does not decode to the index's size, and why."""
    problems = []
    pipe = dali_pipeline(batch_size=1)
    for name, found in packed:
        try:
            (pixels,) = dali_run(pipe, [found])
        except RuntimeError as err:
            pipe = dali_pipeline(batch_size=1)
            problems.append(f"{name}: {found.format} {found.action}: {err}"[:1000])
            continue
        if pixels.shape != (found.height, found.width, 3):
            size = f"{found.height} x {found.width}"
            problems.append(f"{name}: {found.format} {found.action}: {pixels.shape}, not {size}")
    return problems


def dali_decode(images: Sequence[CheckedImage], *, batch_size: int) -> Iterator[np.ndarray]:
    pipe = dali_pipeline(batch_size=batch_size)
    for start in range(0, len(images), batch_size):
        yield from dali_run(pipe, images[start : start + batch_size])


def dali_run(pipe: Any, images: Sequence[CheckedImage]) -> list[np.ndarray]:
    pipe.feed_input("encoded", [np.frombuffer(bytes(i.data), dtype=np.uint8) for i in images])
    (decoded,) = pipe.run()
    return [np.array(decoded[at]) for at in range(len(images))]


def dali_pipeline(*, batch_size: int) -> Any:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def, types

    @pipeline_def(batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> object:
        return fn.decoders.image(fn.external_source(name="encoded"), output_type=types.RGB)

    pipe = graph()
    pipe.build()
    return pipe
