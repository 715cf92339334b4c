"""Views by Pillow and torchvision, step by step, as the published code makes them."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from pipelines.views import ViewParams


def reference_views(
    encoded: Sequence[bytes], params: ViewParams, *, view_size: int
) -> NDArray[np.uint8]:
    """N x S x S x 3, not normalised."""
    return np.stack(
        [
            np.asarray(_view(upright_image(data), params, place, view_size))
            for place, data in enumerate(encoded)
        ]
    )


def upright_image(data: bytes) -> Image.Image:
    """Decoded by Pillow, in RGB, turned as its EXIF says."""
    return ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")


def _view(image: Image.Image, params: ViewParams, place: int, view_size: int) -> Image.Image:
    left, top, width, height = params.crop[place].tolist()
    view = tv.resized_crop(
        image, top, left, height, width, [view_size, view_size], InterpolationMode.BILINEAR
    )
    flip_x, flip_y = params.flip[place]
    if flip_x:
        view = tv.hflip(view)
    if flip_y:
        view = tv.vflip(view)
    view = tv.adjust_brightness(view, float(params.brightness[place]))
    view = tv.adjust_contrast(view, float(params.contrast[place]))
    view = tv.adjust_saturation(view, float(params.saturation[place]))
    if params.hue[place]:  # not at 0, where the way to HSV and back changes pixels, too
        view = tv.adjust_hue(view, float(params.hue[place]))
    if params.gray[place]:
        view = tv.rgb_to_grayscale(view, num_output_channels=3)
    sigma = float(params.sigma[place])
    if sigma > 0:
        side = 2 * int(np.ceil(3 * sigma)) + 1
        view = tv.gaussian_blur(view, [side, side], [sigma, sigma])
    return view
