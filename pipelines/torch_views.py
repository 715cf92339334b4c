"""The same views by Pillow and torchvision: the tests' reference, and what runs without DALI."""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from pipelines.views import IMAGE_MEAN, IMAGE_STD, ViewParams


def decode(data: NDArray[np.uint8], size: NDArray[np.int32]) -> Tensor:
    """An upright image, 3 x H x W uint8.

    Not torchvision's decode_image: it crashes the process on some damaged PNG files.

    Args:
        data: the encoded image.
        size: width and height that the index promises.

    Raises:
        ValueError: it cannot be decoded, or has another size.
    """
    try:
        image = Image.open(io.BytesIO(data.data))
        upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
        raise ValueError(f"Pillow cannot decode it: {str(err)[:200]}") from err
    if upright.size != (size[0], size[1]):
        raise ValueError(
            f"is {upright.width} x {upright.height} pixels upright, "
            f"but the index says {size[0]} x {size[1]}"
        )
    return torch.from_numpy(np.array(upright)).permute(2, 0, 1).contiguous()


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
        view = tv.gaussian_blur(view, kernel_size=[2 * reach + 1] * 2, sigma=[sigma] * 2)
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
