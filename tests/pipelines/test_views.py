import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import v2

from pipelines.config import DataConfig
from pipelines.views import (
    MIN_SIGMA,
    RECIPES,
    ViewParams,
    ViewRecipe,
    draw_views,
    evaluation_views,
    recipe_of,
)

MANY = 20_000


def draw(
    recipe: ViewRecipe, *, count: int = MANY, size: tuple[int, int] = (500, 375), view: int = 0
) -> ViewParams:
    sizes = np.tile(np.array(size, dtype=np.int32), (count, 1))
    return draw_views(np.arange(count), sizes, seed=3, recipe=recipe, view=view)


def fields(params: ViewParams) -> list[np.ndarray]:
    return [params.crop, params.flip, params.matrix, params.pivot, params.sigma]


def test_the_recipes_are_the_published_ones() -> None:
    v1, v2_ = RECIPES["v1"], RECIPES["v2"]

    assert v1.crop_area_frac == v2_.crop_area_frac == (0.2, 1.0)
    assert v1.crop_ratio == v2_.crop_ratio == (3 / 4, 4 / 3)
    assert (v1.jitter_prob, v1.brightness, v1.contrast, v1.saturation, v1.hue) == (
        1,
        0.4,
        0.4,
        0.4,
        0.4,
    )
    assert (v2_.jitter_prob, v2_.brightness, v2_.contrast, v2_.saturation, v2_.hue) == (
        0.8,
        0.4,
        0.4,
        0.4,
        0.1,
    )
    assert (v1.gray_prob, v1.blur_prob, v1.flip_horizontal_prob, v1.flip_vertical_prob) == (
        0.2,
        0,
        0.5,
        0,
    )
    assert (v2_.gray_prob, v2_.blur_prob, v2_.flip_horizontal_prob, v2_.flip_vertical_prob) == (
        0.2,
        0.5,
        0.5,
        0,
    )
    assert v2_.blur_sigma == (0.1, 2.0)


def test_gray_and_digit_recipes_leave_out_what_does_not_suit_them() -> None:
    gray, digits = RECIPES["v2_gray"], RECIPES["digits"]

    assert (gray.saturation, gray.hue, gray.gray_prob) == (0, 0, 0)
    assert (gray.brightness, gray.contrast, gray.blur_prob) == (0.4, 0.4, 0.5)
    assert (gray.flip_horizontal_prob, gray.flip_vertical_prob) == (0.5, 0.5)
    assert (digits.flip_horizontal_prob, digits.flip_vertical_prob, digits.blur_prob) == (0, 0, 0)


def test_settings_set_the_crop_area_and_the_blur_follows_the_view_size() -> None:
    recipe = recipe_of(DataConfig(recipe="v2", view_size=112, min_crop_area_frac=0.3))

    assert recipe.crop_area_frac == (0.3, 1.0)
    assert recipe.blur_sigma == (0.05, 1.0)


def test_a_sample_is_drawn_alike_whatever_else_is_in_the_batch() -> None:
    sizes = np.array([[100 + i, 200 - i] for i in range(50)], dtype=np.int32)
    positions = np.arange(10**12, 10**12 + 50)
    whole = draw_views(positions, sizes, seed=1, recipe=RECIPES["v2"], view=1)

    for part in (slice(0, 1), slice(17, 30), slice(49, 50)):
        alone = draw_views(positions[part], sizes[part], seed=1, recipe=RECIPES["v2"], view=1)
        for ours, theirs in zip(fields(alone), fields(whole), strict=True):
            assert np.array_equal(ours, theirs[part])


def test_the_two_views_and_two_seeds_and_two_epochs_differ() -> None:
    sizes = np.full((200, 2), 128, dtype=np.int32)
    recipe = RECIPES["v2"]
    base = draw_views(np.arange(200), sizes, seed=1, recipe=recipe, view=0)
    others = [
        draw_views(np.arange(200), sizes, seed=1, recipe=recipe, view=1),
        draw_views(np.arange(200), sizes, seed=2, recipe=recipe, view=0),
        draw_views(np.arange(200, 400), sizes, seed=1, recipe=recipe, view=0),
    ]

    for other in others:
        assert (base.crop != other.crop).any(axis=1).mean() > 0.95
        assert 0.3 < (base.flip[:, 0] != other.flip[:, 0]).mean() < 0.7


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64)])
def test_crops_are_distributed_as_those_of_torchvision(size: tuple[int, int]) -> None:
    ours = draw(RECIPES["v2"], size=size, count=4000).crop
    image = Image.new("RGB", size)
    theirs = np.array(
        [
            [box["left"], box["top"], box["width"], box["height"]]
            for box in (
                v2.RandomResizedCrop(8, scale=(0.2, 1.0)).make_params([image]) for _ in range(4000)
            )
        ]
    )

    for column in range(4):
        assert ks(ours[:, column], theirs[:, column]) < 0.045  # 0.1 % critical value: 0.0436
    assert ks(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3]) < 0.045


def test_crops_lie_within_the_image() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 400, size=(MANY, 2)).astype(np.int32)
    crop = draw_views(np.arange(MANY), sizes, seed=0, recipe=RECIPES["v1"], view=0).crop

    assert (crop[:, :2] >= 0).all()
    assert (crop[:, 2:] >= 1).all()
    assert (crop[:, :2] + crop[:, 2:] <= sizes).all()


def test_where_no_crop_fits_the_middle_is_taken() -> None:
    thin = draw(RECIPES["v2"], size=(1000, 20), count=50).crop
    tall = draw(RECIPES["v2"], size=(30, 900), count=50).crop

    assert (thin == [(1000 - 27) // 2, 0, 27, 20]).all()
    assert (tall == [0, (900 - 40) // 2, 30, 40]).all()


def test_choices_come_as_often_as_the_recipe_says() -> None:
    params = draw(RECIPES["v2"])
    gray = np.ptp(params.matrix, axis=1).max(axis=1) < 1e-6
    untouched = (np.abs(params.matrix - np.eye(3)).max(axis=(1, 2)) < 1e-6) & ~gray

    assert gray.mean() == pytest.approx(0.2, abs=0.01)
    assert untouched.mean() == pytest.approx(0.2 * 0.8, abs=0.01)
    assert params.flip.mean(axis=0) == pytest.approx([0.5, 0], abs=0.012)
    assert (params.sigma > 0).mean() == pytest.approx(0.5, abs=0.012)
    assert params.sigma[params.sigma > 0].min() >= MIN_SIGMA
    assert params.sigma.max() == pytest.approx(2.0, abs=0.01)


def test_flips_of_the_gray_recipe_go_both_ways_independently() -> None:
    flip = draw(RECIPES["v2_gray"]).flip

    both = (flip[:, 0] & flip[:, 1]).mean()
    assert flip.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.012)
    assert both == pytest.approx(0.25, abs=0.012)


def test_colours_are_one_affine_map_of_brightness_contrast_and_saturation() -> None:
    recipe = ViewRecipe(jitter_prob=1, brightness=0.4, contrast=0.4, saturation=0.4)
    params = draw(recipe, count=20)
    colours = np.random.default_rng(1).uniform(0, 255, size=(3, 500))
    luma = np.array([0.299, 0.587, 0.114])

    for matrix, pivot in zip(params.matrix, params.pivot, strict=True):
        # Grey keeps its hue, so what black and white become tells brightness times contrast.
        bc = (matrix @ np.ones(3))[0]
        b = (pivot @ np.ones(3))[0] + bc  # (1 - c) b + c b
        c = bc / b
        s = (matrix[0, 0] / bc - luma[0]) / (1 - luma[0])
        bright = b * colours
        contrasted = c * bright + (1 - c) * (luma @ bright).mean()
        expected = s * contrasted + (1 - s) * (luma @ contrasted)

        ours = matrix @ colours + (pivot @ colours.mean(axis=1))[:, None]
        assert np.allclose(ours, expected, atol=1e-3)
        assert 0.6 <= b <= 1.4
        assert 0.6 <= c <= 1.4
        assert 0.6 <= s <= 1.4


def test_hue_turns_colours_and_keeps_luma_and_grey() -> None:
    recipe = ViewRecipe(jitter_prob=1, hue=0.4)
    params = draw(recipe, count=50)
    luma = np.array([0.299, 0.587, 0.114])

    assert np.allclose(params.matrix @ np.ones(3), 1, atol=1e-5)
    assert np.allclose(luma @ params.matrix, luma, atol=1e-5)
    assert np.abs(params.matrix - np.eye(3)).max() > 0.5


def test_a_grayscale_view_has_three_equal_channels() -> None:
    params = draw(ViewRecipe(jitter_prob=1, brightness=0.4, hue=0.4, gray_prob=1.0), count=50)

    assert np.allclose(params.matrix[:, 0], params.matrix[:, 1], atol=1e-6)
    assert np.allclose(params.matrix[:, 0], params.matrix[:, 2], atol=1e-6)


def test_the_evaluation_view_is_the_middle_seven_eighths() -> None:
    params = evaluation_views(np.array([[256, 256], [512, 256], [100, 80], [1, 9]], dtype=np.int32))

    assert params.crop.tolist() == [
        [16, 16, 224, 224],
        [144, 16, 224, 224],
        [15, 5, 70, 70],
        [0, 4, 1, 1],
    ]
    assert not params.flip.any()
    assert not params.sigma.any()


def ks(one: np.ndarray, other: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov statistic."""
    grid = np.unique(np.concatenate([one, other]))
    ours = np.searchsorted(np.sort(one), grid, side="right") / len(one)
    theirs = np.searchsorted(np.sort(other), grid, side="right") / len(other)
    return float(np.abs(ours - theirs).max())
