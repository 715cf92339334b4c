"""How a view is drawn: recipes as numbers, every random choice a function of the position."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.config import DataConfig
from pipelines.hashing import hash_words, uniform

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
    gray_first: bool = False
    """Grey before the jitter, so that saturation and hue change nothing in it."""
    blur_prob: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels of a 224 px view, uniform."""
    flip_horizontal_prob: float = 0.0
    flip_vertical_prob: float = 0.0


RECIPES = {
    # He et al. 2019 (arXiv 1911.05722, section 3.3) and the published code: grey before the jitter,
    # jitter always, no blur.
    "v1": ViewRecipe(
        jitter_prob=1.0, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.4,
        gray_prob=0.2, gray_first=True, flip_horizontal_prob=0.5,
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
    # The published notebook for CIFAR-10: v2 without blur.
    "cifar": ViewRecipe(
        jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1,
        gray_prob=0.2, flip_horizontal_prob=0.5,
    ),
    # A mirrored or blurred digit is another digit.
    "digits": ViewRecipe(jitter_prob=0.8, brightness=0.4, contrast=0.4),
    # He et al. 2019 (section 4.1): what the linear classifier is trained on.
    "crop_flip": ViewRecipe(flip_horizontal_prob=0.5),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewParams:
    """One view of each of N samples, as numbers; every path is given the same ones.

    Steps in this order: crop, resize, flip, brightness, contrast, saturation, hue, gray, blur.
    """

    crop: NDArray[np.int32]
    """N x 4: left, top, width, height in pixels of the upright image."""
    flip: NDArray[np.bool_]
    """N x 2: mirrored left to right, mirrored top to bottom."""
    brightness: NDArray[np.float32]
    """N factors, 1: as it is; contrast and saturation likewise."""
    contrast: NDArray[np.float32]
    saturation: NDArray[np.float32]
    hue: NDArray[np.float32]
    """N shifts of the hue, in turns."""
    gray: NDArray[np.bool_]
    """N: made gray, after all the other changes of colour."""
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
    batch.

    Args:
        positions: N global positions since the start of the run.
        sizes: N x 2, width and height of the upright image in pixels.
        seed: the run's seed.
        recipe: `blur_sigma` in pixels of the view, as `recipe_of` gives it.
        view: its number, from 0.
    """
    state = hash_words(seed, _VIEWS, positions, view)
    drawn = uniform(np.arange(_NUM_CHOICES)[:, np.newaxis], after=state)
    jittered = drawn[_JITTER] < recipe.jitter_prob

    def factor(choice: int, spread: float) -> NDArray[np.float32]:
        value = _between(drawn[choice], max(0.0, 1 - spread), 1 + spread)
        return np.where(jittered, value, 1.0).astype(np.float32)

    gray = drawn[_GRAY] < recipe.gray_prob
    coloured = ~gray if recipe.gray_first else np.ones_like(gray)
    hue = np.where(jittered & coloured, _between(drawn[_HUE], -recipe.hue, recipe.hue), 0.0)
    sigma = np.where(
        drawn[_BLUR] < recipe.blur_prob, _between(drawn[_SIGMA], *recipe.blur_sigma), 0.0
    )
    flip_x = drawn[_FLIP_X] < recipe.flip_horizontal_prob
    flip_y = drawn[_FLIP_Y] < recipe.flip_vertical_prob
    return ViewParams(
        crop=_crops(state, sizes, corner=(drawn[_LEFT], drawn[_TOP]), recipe=recipe),
        flip=np.stack([flip_x, flip_y], axis=1),
        brightness=factor(_BRIGHTNESS, recipe.brightness),
        contrast=factor(_CONTRAST, recipe.contrast),
        saturation=np.where(coloured, factor(_SATURATION, recipe.saturation), np.float32(1)).astype(
            np.float32
        ),
        hue=hue.astype(np.float32),
        gray=gray,
        sigma=np.where(sigma < MIN_SIGMA, 0.0, sigma).astype(np.float32),
    )


def evaluation_views(sizes: NDArray[np.int32]) -> ViewParams:
    """The same for every model: the middle square with 7/8 of the shorter side, colours untouched.

    That is the published "resize to 256, cut 224 out of the middle" at any size, to a pixel.
    """
    count = len(sizes)
    side = np.maximum(1, np.rint(sizes.min(axis=1) * 7 / 8)).astype(np.int32)
    corner = (sizes - side[:, np.newaxis]) // 2
    same, nothing = np.ones(count, dtype=np.float32), np.zeros(count, dtype=np.float32)
    return ViewParams(
        crop=np.concatenate([corner, side[:, None], side[:, None]], axis=1).astype(np.int32),
        flip=np.zeros((count, 2), dtype=np.bool_),
        brightness=same,
        contrast=same,
        saturation=same,
        hue=nothing,
        gray=np.zeros(count, dtype=np.bool_),
        sigma=nothing,
    )


# What a draw is for: part of its hash, so a number here must never get another meaning.
_VIEWS = 4
_JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GRAY = 0, 1, 2, 3, 4, 5
_BLUR, _SIGMA, _FLIP_X, _FLIP_Y, _LEFT, _TOP = 6, 7, 8, 9, 10, 11
_NUM_CHOICES = 12
_AREA, _RATIO = 32, 64  # + attempt


def _between(drawn: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * drawn


def _crops(
    state: NDArray[np.uint64],
    sizes: NDArray[np.int32],
    *,
    corner: tuple[NDArray[np.float64], NDArray[np.float64]],
    recipe: ViewRecipe,
) -> NDArray[np.int32]:
    """torchvision's RandomResizedCrop: the first of 10 boxes that fits, or the middle.

    Args:
        state: N hashes of all that the draws depend on, but what they are for.
        corner: N numbers in [0, 1) each: where the box lies, from left to right and top to bottom.
    """
    width, height = sizes[:, 0].astype(np.float64), sizes[:, 1].astype(np.float64)
    w, h, any_fits = _first_fit(state, width, height, attempts=range(1), recipe=recipe)
    rest = np.flatnonzero(~any_fits)  # few: most images hold the first box
    w[rest], h[rest], any_fits[rest] = _first_fit(
        state[rest], width[rest], height[rest], attempts=range(1, _ATTEMPTS), recipe=recipe
    )
    widest = np.minimum(width, np.rint(height * recipe.crop_ratio[1]))
    tallest = np.minimum(height, np.rint(width / recipe.crop_ratio[0]))
    w = np.where(any_fits, w, np.maximum(widest, 1))
    h = np.where(any_fits, h, np.maximum(tallest, 1))
    left = np.where(any_fits, np.floor(corner[0] * (width - w + 1)), (width - w) // 2)
    top = np.where(any_fits, np.floor(corner[1] * (height - h + 1)), (height - h) // 2)
    return np.stack([left, top, w, h], axis=1).astype(np.int32)


def _first_fit(
    state: NDArray[np.uint64],
    width: NDArray[np.float64],
    height: NDArray[np.float64],
    *,
    attempts: range,
    recipe: ViewRecipe,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Width and height of the first drawn box that the image holds, and whether there is one."""
    attempt = np.array(attempts)[:, np.newaxis]
    part = _between(uniform(_AREA + attempt, after=state), *recipe.crop_area_frac)
    first, last = np.log(recipe.crop_ratio[0]), np.log(recipe.crop_ratio[1])
    ratio = np.exp(_between(uniform(_RATIO + attempt, after=state), first, last))
    area = part * (width * height)
    wide, tall = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (wide > 0) & (tall > 0) & (wide <= width) & (tall <= height)
    chosen = (fits.argmax(axis=0), np.arange(len(state)))
    return wide[chosen], tall[chosen], fits[chosen]


_TO_YIQ = np.array([LUMA, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_GRAY_MATRIX = np.tile(np.array(LUMA), (3, 1))


def affine_colour(params: ViewParams) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """All changes of colour as one affine map: what data.colour "fast" does instead of the steps.

    Hue becomes a rotation in the YIQ colour space, which keeps luma; the steps shift HSV's hue,
    which keeps the largest component: at equal turns the pictures differ. Contrast pivots on the
    gray mean of the crop, b * luma(mean). Gray is a fixed point of both saturation and hue, so what
    contrast adds, (1 - c) * b * luma(mean), passes them unchanged.

    Returns:
        matrix and pivot, N x 3 x 3 each: colour = matrix @ colour + pivot @ (mean colour).
    """
    one = np.eye(3)
    saturation = np.where(params.gray, 0.0, params.saturation)
    b, c, s = (
        v[:, np.newaxis, np.newaxis].astype(np.float64)
        for v in (params.brightness, params.contrast, saturation)
    )
    angle = 2 * np.pi * params.hue.astype(np.float64)
    turn = np.zeros((len(angle), 3, 3))
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 2, 1] = np.sin(angle)
    turn[:, 1, 2] = -turn[:, 2, 1]
    hue = _FROM_YIQ @ turn @ _TO_YIQ
    matrix = hue @ (s * one + (1 - s) * _GRAY_MATRIX) * (b * c)
    return matrix.astype(np.float32), ((1 - c) * b * _GRAY_MATRIX).astype(np.float32)


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
