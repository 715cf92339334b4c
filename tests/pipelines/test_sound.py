"""A fault of the decoder's surroundings ends the run; it is not laid upon the samples."""

import dataclasses
import io
import subprocess
import sys
from collections.abc import Mapping
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import PipelineError
from pipelines.sound import sound_image
from pipelines.stream import EncodedBatch
from pipelines.views import ViewParams
from tests.support.encoded_batches import batch_of, drawn_by, views_by
from tests.support.shard_sets import picture

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")


@pytest.mark.parametrize("path", [pytest.param("dali", marks=pytest.mark.dali), "cpu"])
@pytest.mark.parametrize("format", FORMATS)
def test_a_sound_image_is_of_the_bad_ones_format_and_size_and_decodes(
    path: Literal["dali", "cpu"], format: str
) -> None:
    bad = np.frombuffer(picture(3, format=format)[:200], dtype=np.uint8)
    sound = sound_image(bad, width=31, height=17).tobytes()

    assert Image.open(io.BytesIO(sound)).format == format
    ((batch, _),) = views_by(path, drawn_by("v2", view_size=8), [batch_of([sound])], view_size=8)
    assert batch.sizes.tolist() == [[31, 17]]


@pytest.mark.dali
def test_what_dali_cannot_draw_of_any_image_is_not_laid_upon_the_samples() -> None:
    sound = drawn_by("v2", view_size=24)

    def too_blurred(
        positions: NDArray[np.int64], sizes: NDArray[np.int32]
    ) -> tuple[ViewParams, ...]:
        return tuple(
            dataclasses.replace(one, sigma=np.full_like(one.sigma, 1e7))
            for one in sound(positions, sizes)
        )

    def leave_out(batch: EncodedBatch, faults: Mapping[int, str]) -> EncodedBatch:
        raise AssertionError(f"{len(faults)} of {len(batch)} sound samples were called bad")

    batch = batch_of([picture(number) for number in range(4)])
    made = views_by("dali", too_blurred, [batch, batch], view_size=24, repair=leave_out)

    with pytest.raises(PipelineError, match=r"no sample is to blame: .*Kernel window"):
        list(made)


_SHORT_OF_MEMORY = """
import io, resource
from pathlib import Path
from PIL import Image
from pipelines.errors import PipelineError
from tests.support.encoded_batches import batch_of, drawn_by, views_by
from tests.support.shard_sets import picture

written = io.BytesIO()
Image.new("RGB", (9000, 9000)).save(written, "{format}")
large = batch_of([written.getvalue()] * 2)
made = views_by("dali", drawn_by("v2", view_size=24), [batch_of([picture(1)]), large], view_size=24)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, resource.RLIM_INFINITY))
try:
    list(made)
except PipelineError as err:
    print(err)
"""


@pytest.mark.dali
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_an_image_that_memory_is_too_short_for_is_not_called_bad(format: str) -> None:
    ended = _run(_SHORT_OF_MEMORY.format(format=format))

    assert ended.returncode == 0, ended.stderr
    assert "9000 x 9000 pixels" in ended.stdout
    assert "memory" in ended.stdout


_WITHOUT_WEBP = """
import sys
sys.modules["PIL._webp"] = None  # as where it was built without that library
from pathlib import Path
from pipelines import PipelineError
from pipelines.stream import EncodedBatch
from tests.support.encoded_batches import batch_of, drawn_by, views_by
from tests.support.shard_sets import picture
import dataclasses, io
import numpy as np

sound = batch_of([picture(1)])
webp = dataclasses.replace(sound, data=(np.frombuffer(sys.stdin.buffer.read(), dtype=np.uint8),))
try:
    list(views_by("cpu", drawn_by("v2", view_size=24), [webp], view_size=24))
except PipelineError as err:
    print(err)
"""


def test_images_of_a_format_that_pillow_is_without_are_not_called_bad() -> None:
    size = Image.open(io.BytesIO(picture(1))).size
    written = io.BytesIO()
    Image.new("RGB", size).save(written, "WEBP")

    ended = _run(_WITHOUT_WEBP, given=written.getvalue())

    assert ended.returncode == 0, ended.stderr
    assert "WEBP" in ended.stdout
    assert "reinstall" in ended.stdout


def _run(program: str, *, given: bytes = b"") -> subprocess.CompletedProcess[str]:
    ended = subprocess.run(
        [sys.executable, "-c", program], input=given, capture_output=True, timeout=100, check=False
    )
    return subprocess.CompletedProcess(
        ended.args, ended.returncode, ended.stdout.decode(), ended.stderr.decode()
    )
