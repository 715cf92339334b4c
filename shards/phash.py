"""A 64-bit perceptual hash: near-duplicates differ in few bits, unrelated photos in about half."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.resize import upright

_SIDE, _LOW = 32, 8
# The cosines of a DCT-II in integers: all sums stay below 2**53, so float64 holds them exactly and
# neither the BLAS nor the number of its threads can change a bit of the hash.
_COSINES = np.rint(
    2**17 * np.cos(np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1) * np.pi / (2 * _SIDE))
)
_COSINES_DOWN = np.ascontiguousarray(_COSINES.T)


def phash(
    gray: NDArray[np.uint8], *, size: tuple[int, int], averaged: int, orientation: int
) -> int:
    """The hash of a gray picture, H x W, as it is shown upright.

    On a picture whose shorter side is below 64 pixels it is the `phash` of the ImageHash package,
    bit for bit (a test compares them on photos), in exact arithmetic and without scipy. A larger
    picture is first averaged over squares, which costs less than its resize and which JPEG decoders
    do for nothing.

    Args:
        size: width and height before any averaging; the last squares may reach beyond it.
        averaged: side of the squares that `gray` is averaged over already; it divides `squares`.
        orientation: EXIF orientation of `gray`, 1 to 8.
    """
    side = squares(*size)
    picture = Image.fromarray(gray)
    if side > averaged:
        picture = picture.reduce(side // averaged)
    whole = (0, 0, size[0] / side, size[1] / side)
    small = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, box=whole))
    low = (_COSINES @ upright(small, orientation).astype(np.float64) @ _COSINES_DOWN).ravel()
    # Above the lower middle one of 64 is above the median, without the mean of two.
    middle = np.partition(low, low.size // 2 - 1)[low.size // 2 - 1]
    return int.from_bytes(np.packbits(low > middle).tobytes(), "big")


def squares(width: int, height: int) -> int:
    """Side of the squares to average over: the power of two that leaves 32 to 64 pixels."""
    side = 1
    while min(width, height) >= 2 * side * _SIDE:
        side *= 2
    return side
