"""How a view is drawn: recipes as numbers, every random choice a function of the position."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.config import DataConfig
from pipelines.hashing import uniform

IMAGE_MEAN = (0.485, 0.456, 0.406)
"""Mean of ImageNet's pixels, red, green, blue, 0-1; what views are normalised with."""
IMAGE_STD = (0.229, 0.224, 0.225)
"""Standard deviation, likewise."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a pixel's grey value (ITU-R BT.601, section 2.5.1)."""

MIN_SIGMA = 0.05
"""A blur below this changes no pixel, and is left out."""
_ATTEMPTS = 10
_RECIPE_SIZE = 224  # pixels; what the published blur is meant for


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewRecipe:
    """The distribution that a view's parameters are drawn from."""

    crop_area_frac: tuple[float, float] = (0.2, 1.0)
    """Part of the image's area that the crop covers."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Width over height of the crop, log-uniform."""
    jitter_prob: float = 0.0
    """Probability that brightness, contrast, saturation and hue are changed at all."""
    brightness: float = 0.0
    """Factor uniform in 1 -+ this; contrast and saturation likewise."""
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    """Rotation of the hue, uniform in -+ this, in turns."""
    gray_prob: float = 0.0
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of a 224 px view, uniform."""
    flip_horizontal_prob: float = 0.0
    flip_vertical_prob: float = 0.0


RECIPES = {
    # He et al. 2019 (arXiv 1911.05722, section 3.3) and the published code: jitter always, no blur.
    "v1": ViewRecipe(
        jitter_prob=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4,
        gray_prob=0.2, flip_horizontal_prob=0.5,
    ),
    # Chen et al. 2020 (arXiv 2003.04297, section 2) and the published code.
    "v2": ViewRecipe(
        jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1,
        gray_prob=0.2, blur_prob=0.5, flip_horizontal_prob=0.5,
    ),
    # v2 where colour says nothing and up is no direction (wafers, solar cells, microscopy).
    "v2_gray": ViewRecipe(
        jitter_prob=0.8, brightness=0.4, contrast=0.4, blur_prob=0.5,
        flip_horizontal_prob=0.5, flip_vertical_prob=0.5,
    ),
    # A mirrored or blurred digit is another digit.
    "digits": ViewRecipe(jitter_prob=0.8, brightness=0.4, contrast=0.4),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewParams:
    """One view of each of N samples, as numbers; DALI and torch are given the same ones."""

    crop: NDArray[np.int32]
    """N x 4: left, top, width, height in pixels of the upright image."""
    flip: NDArray[np.bool_]
    """N x 2: mirrored left to right, mirrored top to bottom."""
    matrix: NDArray[np.float32]
    """N x 3 x 3: colour = matrix @ colour + pivot @ (mean colour of the resized crop)."""
    pivot: NDArray[np.float32]
    """N x 3 x 3; see matrix."""
    sigma: NDArray[np.float32]
    """N standard deviations of the blur, in pixels of the view; 0: no blur."""


def recipe_of(config: DataConfig) -> ViewRecipe:
    """The recipe that the settings name, for their view size and crop area.

    The published blur is meant for 224 px; a smaller view gets one smaller in proportion, so that
    it hides the same detail of the image.
    """
    recipe = RECIPES[config.recipe]
    low, high = recipe.blur_sigma
    scale = config.view_size / _RECIPE_SIZE
    return dataclasses.replace(
        recipe,
        crop_area_frac=(config.min_crop_area_frac, recipe.crop_area_frac[1]),
        blur_sigma=(low * scale, high * scale),
    )


def draw_views(
    positions: NDArray[np.int64],
    sizes: NDArray[np.int32],
    *,
    seed: int,
    recipe: ViewRecipe,
    view: int,
) -> ViewParams:
    """Draw view number `view` (0: query, 1: key) of each sample.

    A sample's numbers depend on (seed, position, view) and its size alone, whatever else is in the
    batch. Hue is a rotation in the YIQ colour space, which keeps luma; torchvision shifts HSV's
    hue, which keeps the largest component instead: at equal turns the pictures differ.

    Args:
        positions: N global positions since the start of the run.
        sizes: N x 2, width and height of the upright image in pixels.
        seed: the run's seed.
        recipe: `blur_sigma` in pixels of the view, as `recipe_of` gives it.
        view: its number, from 0.
    """

    def draw(choice: int, low: float = 0.0, high: float = 1.0) -> NDArray[np.float64]:
        return low + (high - low) * uniform(seed, _VIEWS, positions, view, choice)

    jittered = draw(_JITTER) < recipe.jitter_prob

    def factor(choice: int, spread: float) -> NDArray[np.float64]:
        return np.where(jittered, draw(choice, max(0.0, 1 - spread), 1 + spread), 1.0)

    matrix, pivot = _colour(
        brightness=factor(_BRIGHTNESS, recipe.brightness),
        contrast=factor(_CONTRAST, recipe.contrast),
        saturation=factor(_SATURATION, recipe.saturation)
        * (draw(_GRAY) >= recipe.gray_prob),  # grayscale is saturation 0
        hue_turns=np.where(jittered, draw(_HUE, -recipe.hue, recipe.hue), 0.0),
    )
    sigma = np.where(draw(_BLUR) < recipe.blur_prob, draw(_SIGMA, *recipe.blur_sigma), 0.0)
    flip_x = draw(_FLIP_X) < recipe.flip_horizontal_prob
    flip_y = draw(_FLIP_Y) < recipe.flip_vertical_prob
    return ViewParams(
        crop=_crops(positions, sizes, seed=seed, recipe=recipe, view=view),
        flip=np.stack([flip_x, flip_y], axis=1),
        matrix=matrix.astype(np.float32),
        pivot=pivot.astype(np.float32),
        sigma=np.where(sigma < MIN_SIGMA, 0.0, sigma).astype(np.float32),
    )


def evaluation_views(sizes: NDArray[np.int32]) -> ViewParams:
    """The same for every model: the middle square with 7/8 of the shorter side, colours untouched.

    That is the published "resize to 256, cut 224 out of the middle" at any size, to a pixel.
    """
    count = len(sizes)
    side = np.maximum(1, np.rint(sizes.min(axis=1) * 7 / 8)).astype(np.int32)
    corner = (sizes - side[:, np.newaxis]) // 2
    return ViewParams(
        crop=np.concatenate([corner, side[:, None], side[:, None]], axis=1).astype(np.int32),
        flip=np.zeros((count, 2), dtype=np.bool_),
        matrix=np.tile(np.eye(3, dtype=np.float32), (count, 1, 1)),
        pivot=np.zeros((count, 3, 3), dtype=np.float32),
        sigma=np.zeros(count, dtype=np.float32),
    )


# What a draw is for: part of its hash, so a number here must never get another meaning.
_VIEWS = 4
_JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY = 0, 1, 2, 3, 4, 5
_BLUR, _SIGMA, _FLIP_X, _FLIP_Y, _LEFT, _TOP = 6, 7, 8, 9, 10, 11
_AREA, _RATIO = 32, 64  # + attempt


def _crops(
    positions: NDArray[np.int64],
    sizes: NDArray[np.int32],
    *,
    seed: int,
    recipe: ViewRecipe,
    view: int,
) -> NDArray[np.int32]:
    """torchvision's RandomResizedCrop: the first of 10 boxes that fits, or the middle."""
    width, height = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    attempts = np.arange(_ATTEMPTS)
    column = positions[:, np.newaxis]
    low, high = recipe.crop_area_frac
    part = low + (high - low) * uniform(seed, _VIEWS, column, view, _AREA + attempts)
    first, last = np.log(recipe.crop_ratio[0]), np.log(recipe.crop_ratio[1])
    turn = uniform(seed, _VIEWS, column, view, _RATIO + attempts)
    ratio = np.exp(first + (last - first) * turn)
    area = part * (width * height)[:, np.newaxis]
    wide, tall = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (wide > 0) & (tall > 0) & (wide <= width[:, None]) & (tall <= height[:, None])
    chosen = (np.arange(len(positions)), fits.argmax(axis=1))
    any_fits = fits.any(axis=1)
    widest = np.minimum(width, np.rint(height * recipe.crop_ratio[1]))
    tallest = np.minimum(height, np.rint(width / recipe.crop_ratio[0]))
    w = np.where(any_fits, wide[chosen], np.maximum(widest, 1))
    h = np.where(any_fits, tall[chosen], np.maximum(tallest, 1))
    left = np.floor(uniform(seed, _VIEWS, positions, view, _LEFT) * (width - w + 1))
    top = np.floor(uniform(seed, _VIEWS, positions, view, _TOP) * (height - h + 1))
    left = np.where(any_fits, left, (width - w) // 2)
    top = np.where(any_fits, top, (height - h) // 2)
    return np.stack([left, top, w, h], axis=1).astype(np.int32)


_TO_YIQ = np.array([LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_GRAY_MATRIX = np.tile(np.array(LUMA), (3, 1))


def _colour(
    *,
    brightness: NDArray[np.float64],
    contrast: NDArray[np.float64],
    saturation: NDArray[np.float64],
    hue_turns: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Brightness, contrast, saturation, hue in this order, as one affine map of the colours.

    Contrast pivots on the grey mean of the crop, b * luma(mean). Grey is a fixed point of both
    saturation and hue, so what contrast adds, (1 - c) * b * luma(mean), passes them unchanged.
    """
    one = np.eye(3)
    b, c, s = (v[:, np.newaxis, np.newaxis] for v in (brightness, contrast, saturation))
    angle = 2 * np.pi * hue_turns
    turn = np.zeros((len(angle), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 2, 1] = np.sin(angle)
    turn[:, 1, 2] = -turn[:, 2, 1]
    hue = _FROM_YIQ @ turn @ _TO_YIQ
    matrix = hue @ (s * one + (1 - s) * _GRAY_MATRIX) * (b * c)
    return matrix, (1 - c) * b * _GRAY_MATRIX


Draw = Callable[[NDArray[np.int64], NDArray[np.int32]], tuple[ViewParams, ...]]
"""(positions, sizes) -> the parameters of each view of those samples."""


def pair_of_views(config: DataConfig, *, seed: int) -> Draw:
    """The query view and the key view of MoCo, as the settings draw them."""
    recipe = recipe_of(config)

    def draw(positions: NDArray[np.int64], sizes: NDArray[np.int32]) -> tuple[ViewParams, ...]:
        return tuple(
            draw_views(positions, sizes, seed=seed, recipe=recipe, view=view) for view in (0, 1)
        )

    return draw
