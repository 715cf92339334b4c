"""A sound image in a bad one's place: what fails on it too is not the data's fault."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import PipelineError
from shards.images import sniff

_WRITTEN_AS = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP", "pnm": "PPM"}


def sound_image(data: NDArray[np.uint8], *, width: int, height: int) -> NDArray[np.uint8]:
    """A black image of the format of `data`, JPEG if that has none that shards hold.

    Of the size of the bad one, in pixels, as it is to need as much memory.

    Raises:
        PipelineError: Pillow cannot write it.
    """
    format = _WRITTEN_AS.get(sniff(data[:32].tobytes()) or "", "JPEG")
    written = io.BytesIO()
    try:
        Image.new("RGB", (width, height)).save(written, format, **_QUICKLY.get(format, {}))
    except (MemoryError, KeyError, OSError) as err:  # a KeyError: Pillow is without the format
        raise PipelineError(
            f"whether a {format} of {width} x {height} pixels is bad cannot be said, because "
            f"Pillow cannot write one ({type(err).__name__}: {err}); see to memory, or reinstall it"
        ) from err
    return np.frombuffer(written.getvalue(), dtype=np.uint8)


_QUICKLY = {"PNG": {"compress_level": 1}, "WEBP": {"lossless": True, "quality": 0, "method": 0}}
