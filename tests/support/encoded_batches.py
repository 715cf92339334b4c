"""Encoded images as the stream hands them over, and the views that each path makes of them."""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.config import DataConfig
from pipelines.stream import EncodedBatch
from pipelines.view_maker import Repair, open_view_maker
from pipelines.views import IMAGE_MEAN, IMAGE_STD, Draw, pair_of_views

Colour = Literal["exact", "fast"]
Dtype = Literal["float32", "float16", "uint8"]
Path = Literal["cpu", "dali"]
RecipeName = Literal["v1", "v2", "v2_gray", "digits"]


def batch_of(encoded: Sequence[bytes], *, first_position: int = 1000) -> EncodedBatch:
    """A batch of these images, with the sizes and orientations that their headers have."""
    count = len(encoded)
    sizes, orientations = [], []
    for data in encoded:
        image = Image.open(io.BytesIO(data))
        orientation = image.getexif().get(0x0112, 1)
        orientations.append(orientation if 1 <= orientation <= 8 else 1)
        sizes.append(image.size[::-1] if orientations[-1] > 4 else image.size)
    return EncodedBatch(
        data=tuple(np.frombuffer(data, dtype=np.uint8) for data in encoded),
        sample_ids=np.arange(count),
        positions=np.arange(first_position, first_position + count),
        sizes=np.array(sizes, dtype=np.int32).reshape(count, 2),
        orientations=np.array(orientations, dtype=np.uint8),
        sources=np.zeros(count, dtype=np.int64),
        shards=np.zeros(count, dtype=np.int64),
        members=np.arange(count),
        tries=np.zeros(count, dtype=np.int64),
    )


def no_repair(batch: EncodedBatch, faults: object) -> EncodedBatch:
    raise AssertionError(f"nothing here is bad: {faults} in {batch.sample_ids}")


def drawn_by(recipe: RecipeName, *, view_size: int, seed: int = 0) -> Draw:
    return pair_of_views(DataConfig(recipe=recipe, view_size=view_size), seed=seed)


def views_by(
    path: Path,
    draw: Draw,
    batches: Iterable[EncodedBatch],
    *,
    view_size: int,
    batch_size: int = 64,
    colour: Colour = "exact",
    view_dtype: Dtype = "uint8",
    num_threads: int = 2,
    device_index: int | None = None,
    repair: Repair = no_repair,
) -> Iterator[tuple[EncodedBatch, tuple[torch.Tensor, ...]]]:
    """Both views of each batch, which may have up to `batch_size` samples."""
    maker = open_view_maker(
        draw,
        loader=path,
        batch_size=batch_size,
        num_views=2,
        view_size=view_size,
        colour=colour,
        view_dtype=view_dtype,
        num_threads=num_threads,
        device_index=device_index,
    )
    return maker.make(iter(batches), repair)


def levels(view: torch.Tensor) -> NDArray[np.float32]:
    """N x S x S x 3 in levels of 0 to 255, of a view of any dtype."""
    values = view.permute(0, 2, 3, 1).cpu().float().numpy()
    if view.dtype == torch.uint8:
        return values
    unit = values * np.array(IMAGE_STD, np.float32) + np.array(IMAGE_MEAN, np.float32)
    return np.asarray(255 * unit, dtype=np.float32)
