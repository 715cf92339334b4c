"""The same views by Pillow and torchvision: the tests' reference, and what runs without DALI."""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from pipelines.views import IMAGE_MEAN, IMAGE_STD, ViewParams


def decode(data: NDArray[np.uint8], *, orientation: int) -> Tensor:
    """An upright image, 3 x H x W uint8.

    Not torchvision's decode_image: it crashes the process on some damaged PNG files.

    Args:
        data: the encoded image.
        orientation: EXIF orientation, 1 to 8.

    Raises:
        ValueError: it cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(data.data))
        rgb = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
        raise ValueError(f"Pillow cannot decode it: {str(err)[:200]}") from err
    turned = rgb if orientation == 1 else rgb.transpose(_UPRIGHT[orientation])
    pixels = torch.from_numpy(np.array(turned))
    return pixels.permute(2, 0, 1).contiguous()


def draw_view(image: Tensor, params: ViewParams, place: int, *, view_size: int) -> Tensor:
    """View number `place` of `params`: 3 x S x S float32, normalised.

    Args:
        image: 3 x H x W uint8, upright.
    """
    left, top, width, height = params.crop[place].tolist()
    view = tv.resized_crop(
        image,
        top=top,
        left=left,
        height=height,
        width=width,
        size=[view_size, view_size],
        interpolation=InterpolationMode.BILINEAR,
        antialias=True,
    )
    axes = [axis for axis, flipped in zip((2, 1), params.flip[place], strict=True) if flipped]
    view = _recolour(view.flip(axes), params, place)
    sigma = float(params.sigma[place])
    if sigma > 0:
        reach = int(np.ceil(3 * sigma))
        view = tv.gaussian_blur(view, kernel_size=[2 * reach + 1], sigma=[sigma])
    return _normalise(view)


def _recolour(view: Tensor, params: ViewParams, place: int) -> Tensor:
    colours = view.flatten(1).float()
    matrix = torch.from_numpy(params.matrix[place])
    shift = torch.from_numpy(params.pivot[place]) @ colours.mean(1)
    painted = (matrix @ colours + shift[:, None]).round().clamp(0, 255)
    return painted.to(torch.uint8).reshape(view.shape)


def _normalise(view: Tensor) -> Tensor:
    mean = torch.tensor(IMAGE_MEAN)[:, None, None]
    std = torch.tensor(IMAGE_STD)[:, None, None]
    return (view.float() / 255 - mean) / std


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation (Exif 2.3, tag 0x0112)."""
