"""Made-up photos: shapes with soft and hard edges under noise with a photo's spectrum."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw


def photo_jpeg(number: int, *, size: tuple[int, int] = (500, 375)) -> bytes:
    """A JPEG of quality 75 to 95 with chroma at half resolution, as most photos have it.

    Args:
        number: another picture for each.
        size: width and height.
    """
    draw = np.random.default_rng(number)
    pixels = _scene(draw, size) + draw.uniform(5, 20) * _noise(draw, size)
    written = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).save(
        written, "JPEG", quality=int(draw.integers(75, 96)), subsampling=2
    )
    return written.getvalue()


def _scene(draw: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """Some ellipses and boxes in colours around one, on a soft ground, lit from a side."""
    tint = draw.uniform(40, 215, 3)

    def colour() -> tuple[int, ...]:
        return tuple(np.clip(tint + draw.normal(0, 55, 3), 0, 255).astype(int).tolist())

    image = Image.new("RGB", size, colour())
    canvas = ImageDraw.Draw(image)
    for _ in range(draw.integers(3, 14)):
        x, y = draw.uniform(-0.2, 1, 2) * size
        w, h = draw.uniform(0.05, 0.6, 2) * size
        shape = canvas.ellipse if draw.random() < 0.6 else canvas.rectangle
        shape((x, y, x + w, y + h), fill=colour())
    ramp = np.linspace(*draw.uniform(0.6, 1.15, 2), num=size[0])
    return np.asarray(image, dtype=np.float64) * ramp[np.newaxis, :, np.newaxis]


def _noise(draw: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """H x W x 3 of standard deviation 1, mostly gray; amplitude falls as 1 / frequency."""
    width, height = size
    down, across = np.fft.fftfreq(height)[:, np.newaxis], np.fft.rfftfreq(width)[np.newaxis]
    frequency = np.hypot(down, across)
    frequency[0, 0] = 1
    spectrum = draw.normal(size=(3, *frequency.shape)) + 1j * draw.normal(
        size=(3, *frequency.shape)
    )
    noise = np.fft.irfft2(spectrum / frequency ** draw.uniform(0.6, 1.1), s=(height, width))
    noise = np.moveaxis(noise, 0, 2)
    mixed = noise.mean(axis=2, keepdims=True) + 0.3 * noise
    return mixed / mixed.std()
