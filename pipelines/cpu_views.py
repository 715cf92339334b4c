"""One sample on the CPU: bytes to pixels by turbo or Pillow, views by torch's resize and OpenCV."""

import io
from functools import cache
from typing import Any, Literal

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image

from pipelines.views import IMAGE_MEAN, IMAGE_STD, LUMA, ViewParams
from shards.decoder import webp_size
from shards.resize import upright

Pixels = NDArray[np.uint8]
"""H x W x 3, RGB."""

_JPEG = b"\xff\xd8"
# What a shard set holds: packing rewrites the others. (Not all that Pillow reads: EPS would run a
# program.)
_PILLOW_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
_TRANSPOSED = frozenset((5, 6, 7, 8))  # EXIF orientations that swap width and height


def decode(data: NDArray[np.uint8], *, size: tuple[int, int], orientation: int) -> Pixels:
    """An upright image.

    Nothing is decoded whose header shows another size than the index, so an image takes no more
    memory than the index promises. Warnings count as errors: what is damaged is never shown.

    Args:
        data: the encoded image.
        size: upright width and height as the index has them.
        orientation: EXIF orientation, 1 to 8, as the index has it.

    Raises:
        ValueError: it cannot be decoded, or has another size.
    """
    stored = (size[1], size[0]) if orientation in _TRANSPOSED else size
    if data[:2].tobytes() == _JPEG:
        pixels = _decode_jpeg(data, stored)
    else:
        pixels = _decode_by_pillow(data, stored)
    return upright(pixels, orientation)


def _decode_jpeg(data: NDArray[np.uint8], size: tuple[int, int]) -> Pixels:
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        _check_size((width, height), size)
        if colours not in ("CMYK", "YCCK"):
            pixels: Pixels = simplejpeg.decode_jpeg(data)
            return pixels
    except ValueError as err:
        raise ValueError(f"cannot be decoded by turbo: {_first_line(err)}") from err
    return _decode_by_pillow(data, size)  # turbo does not turn CMYK into RGB


def _decode_by_pillow(data: NDArray[np.uint8], size: tuple[int, int]) -> Pixels:
    try:
        head = data[:30].tobytes()
        if head[:4] == b"RIFF":  # Pillow takes memory for the whole canvas just to open a WebP
            _check_size(webp_size(head) or size, size)
        image: Image.Image = Image.open(io.BytesIO(data.data), formats=_PILLOW_FORMATS)
        _check_size(image.size, size)
        if image.has_transparency_data:
            image = image.convert("RGBA")  # of a palette, too, so that alpha is dropped as in DALI
        pixels = np.array(image.convert("RGB"))
    except MemoryError:
        raise  # not the image's fault: its size is as promised
    except Exception as err:  # plug-ins raise whatever their parsing meets
        raise ValueError(f"cannot be decoded by Pillow: {_first_line(err)}") from err
    return pixels


def _check_size(found: tuple[int, int], wanted: tuple[int, int]) -> None:
    if found != wanted:
        raise ValueError(
            f"is {found[0]} x {found[1]} pixels, but the index says {wanted[0]} x {wanted[1]}"
        )


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0][:200]


def draw_view(
    image: Pixels,
    params: ViewParams,
    place: int,
    *,
    view_size: int,
    colour: Literal["exact", "fast"] | None,
    affine: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
) -> Pixels:
    """View number `place` of `params`.

    Args:
        colour: None leaves colours as they are, and blurs nothing.
        affine: what `affine_colour` makes of `params`, for "fast".
    """
    left, top, width, height = params.crop[place].tolist()
    view = _resize(image[top : top + height, left : left + width], view_size)
    flip_x, flip_y = params.flip[place].tolist()
    if flip_x or flip_y:
        view = np.asarray(cv2.flip(view, -1 if flip_x and flip_y else int(flip_x)), dtype=np.uint8)
    if colour is None:
        return view
    if affine is not None:
        view = _recolour_fast(view, affine[0][place], affine[1][place])
    else:
        view = _recolour(view, params, place)
    return _blur(view, float(params.sigma[place]))


def _resize(crop: Pixels, view_size: int) -> Pixels:
    """Bilinear with antialiasing, to a level of what Pillow and torchvision make.

    torch's kernel for bytes that lie as these do. It takes a third of Pillow's time, half that of
    OpenCV's INTER_AREA, which differs by up to 47 levels; and it starts no threads of its own.
    """
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(crop).permute(2, 0, 1)[None],
        size=(view_size, view_size),
        mode="bilinear",
        antialias=True,
    )
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


_IDENTITY = np.eye(3)
_TO_GRAY = np.tile(np.array(LUMA), (3, 1))


def _recolour(view: Pixels, params: ViewParams, place: int) -> Pixels:
    """torchvision's steps on a Pillow image; each one's result is cut to 0-255 and to whole levels.

    Factors of 1 change nothing, so their steps are left out.
    """
    brightness, contrast = float(params.brightness[place]), float(params.contrast[place])
    saturation, hue = float(params.saturation[place]), float(params.hue[place])
    if brightness != 1:
        view = _blend(view, brightness * _IDENTITY, 0.0)
    if contrast != 1:
        # The gray mean is a whole number in Pillow.
        middle = int(cv2.mean(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY))[0] + 0.5)
        view = _blend(view, contrast * _IDENTITY, (1 - contrast) * middle)
    if saturation != 1:
        view = _blend(view, saturation * _IDENTITY + (1 - saturation) * _TO_GRAY, 0.0)
    if hue != 0:
        view = _shift_hue(view, hue)
    if params.gray[place]:
        gray = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)
        view = np.asarray(cv2.cvtColor(gray, cv2.COLOR_GRAY2RGB), dtype=np.uint8)
    return view


# Pillow and torchvision round down, OpenCV to the nearest. A half would send whole numbers down.
_ROUND_DOWN = -0.4995


def _blend(view: Pixels, matrix: NDArray[np.float64], shift: float) -> Pixels:
    """matrix @ colour + shift, saturated and rounded down."""
    offset = np.full((3, 1), shift + _ROUND_DOWN)
    blended = cv2.transform(view, np.concatenate([matrix, offset], axis=1))
    return np.asarray(blended, dtype=np.uint8)


def _shift_hue(view: Pixels, turns: float) -> Pixels:
    hsv = cv2.cvtColor(view, cv2.COLOR_RGB2HSV_FULL)
    hsv[..., 0] += np.uint8(int(turns * 255) % 256)  # as torchvision does; it wraps around
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL), dtype=np.uint8)


def _recolour_fast(view: Pixels, matrix: NDArray[np.float32], pivot: NDArray[np.float32]) -> Pixels:
    shift = pivot @ np.array(cv2.mean(view)[:3], dtype=np.float32)
    painted = cv2.transform(view, np.concatenate([matrix, shift[:, np.newaxis]], axis=1))
    return np.asarray(painted, dtype=np.uint8)


def _blur(view: Pixels, sigma: float) -> Pixels:
    if sigma == 0:
        return view
    # Not cv2.GaussianBlur, which is slower and up to 2 levels off.
    kernel = cv2.getGaussianKernel(2 * int(np.ceil(3 * sigma)) + 1, sigma)
    return np.asarray(cv2.sepFilter2D(view, -1, kernel, kernel), dtype=np.uint8)


def write_view(view: Pixels, out: NDArray[Any]) -> None:
    """Put a view into its place in a batch: S x S x 3, normalised unless that is of bytes."""
    if out.dtype == np.uint8:
        out[...] = view
    elif out.dtype == np.float16:
        # OpenCV only looks values up, whatever 16 bits they are.
        cv2.LUT(view, _normalised_levels("float16").view(np.uint16), dst=out.view(np.uint16))
    else:
        cv2.LUT(view, _normalised_levels("float32"), dst=out)


@cache
def _normalised_levels(dtype: str) -> NDArray[Any]:
    """1 x 256 x 3: what each level of red, green and blue becomes."""
    levels = np.arange(256)[:, np.newaxis] / 255
    table = (levels - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    return np.ascontiguousarray(table[np.newaxis].astype(dtype))


@cache
def use_one_thread() -> None:
    """Keep OpenCV from starting threads, for the whole process.

    Its pool has one thread a core and takes one call at a time: views are made by threads of ours,
    which it would make wait for each other.
    """
    cv2.setNumThreads(0)
