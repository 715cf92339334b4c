import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from pipelines.config import DataConfig
from pipelines.views import (
    LUMA,
    MIN_SIGMA,
    RECIPES,
    ViewParams,
    ViewRecipe,
    affine_colour,
    draw_views,
    evaluation_views,
    recipe_of,
)
from tests.support.two_samples import ks, ks_critical

MANY = 20_000


def draw(
    recipe: ViewRecipe, *, count: int = MANY, size: tuple[int, int] = (500, 375), view: int = 0
) -> ViewParams:
    sizes = np.tile(np.array(size, dtype=np.int32), (count, 1))
    return draw_views(np.arange(count), sizes, seed=3, recipe=recipe, view=view)


def fields(params: ViewParams) -> list[np.ndarray]:
    return [getattr(params, field.name) for field in dataclasses.fields(params)]


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
    count = 4096
    image = Image.new("RGB", size)
    torch.manual_seed(5)
    boxes = [v2.RandomResizedCrop(8, scale=(0.2, 1.0)).make_params([image]) for _ in range(count)]

    ours = draw(RECIPES["v2"], size=size, count=count).crop
    theirs = np.array([[box[side] for side in ("left", "top", "width", "height")] for box in boxes])

    for one, other in zip(geometry(ours), geometry(theirs), strict=True):
        assert ks(one, other) < ks_critical(count)


def geometry(crop: np.ndarray) -> list[np.ndarray]:
    """Corner, sides, area and shape of each crop."""
    return [*crop.T, crop[:, 2] * crop[:, 3], np.log(crop[:, 2] / crop[:, 3])]


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
    jittered = params.brightness != 1

    assert params.gray.mean() == pytest.approx(0.2, abs=0.01)
    assert jittered.mean() == pytest.approx(0.8, abs=0.01)
    assert (jittered & params.gray).mean() == pytest.approx(0.16, abs=0.01)
    assert params.flip.mean(axis=0) == pytest.approx([0.5, 0], abs=0.012)
    assert (params.sigma > 0).mean() == pytest.approx(0.5, abs=0.012)
    assert params.sigma[params.sigma > 0].min() >= MIN_SIGMA
    assert params.sigma.max() == pytest.approx(2.0, abs=0.01)


def test_factors_are_uniform_within_the_recipe_s_bounds_and_independent() -> None:
    params = draw(RECIPES["v2"])
    jittered = params.brightness != 1
    factors = np.stack([params.brightness, params.contrast, params.saturation, 1 + 4 * params.hue])
    drawn = factors[:, jittered]

    assert (factors[:, ~jittered] == 1).all()
    assert factors.dtype == np.float32
    for values in drawn:
        assert 0.6 <= values.min() <= 0.602
        assert 1.398 <= values.max() <= 1.4
        assert ks(values, np.linspace(0.6, 1.4, len(values))) < ks_critical(len(values))
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.03


def test_recipes_without_hue_or_saturation_leave_them_as_they_are() -> None:
    params = draw(RECIPES["v2_gray"])

    assert (params.saturation == 1).all()
    assert (params.hue == 0).all()
    assert not params.gray.any()
    assert params.contrast.std() > 0.1


def test_flips_of_the_gray_recipe_go_both_ways_independently() -> None:
    flip = draw(RECIPES["v2_gray"]).flip

    both = (flip[:, 0] & flip[:, 1]).mean()
    assert flip.mean(axis=0) == pytest.approx([0.5, 0.5], abs=0.012)
    assert both == pytest.approx(0.25, abs=0.012)


def test_fast_colour_is_one_affine_map_of_brightness_contrast_and_saturation() -> None:
    params = draw(ViewRecipe(jitter_prob=1, brightness=0.4, contrast=0.4, saturation=0.4), count=20)
    colours = np.random.default_rng(1).uniform(0, 255, size=(3, 500))
    luma = np.array(LUMA)
    matrices, pivots = affine_colour(params)

    for place in range(20):
        bright = params.brightness[place] * colours
        c, s = params.contrast[place], params.saturation[place]
        contrasted = c * bright + (1 - c) * (luma @ bright).mean()
        expected = s * contrasted + (1 - s) * (luma @ contrasted)

        ours = matrices[place] @ colours + (pivots[place] @ colours.mean(axis=1))[:, None]
        assert np.allclose(ours, expected, atol=1e-3)


def test_fast_hue_turns_colours_and_keeps_luma_and_gray() -> None:
    matrix, _ = affine_colour(draw(ViewRecipe(jitter_prob=1, hue=0.4), count=50))

    assert np.allclose(matrix @ np.ones(3), 1, atol=1e-5)
    assert np.allclose(np.array(LUMA) @ matrix, LUMA, atol=1e-5)
    assert np.abs(matrix - np.eye(3)).max() > 0.5


def test_a_fast_gray_view_has_three_equal_channels() -> None:
    matrix, _ = affine_colour(
        draw(ViewRecipe(jitter_prob=1, brightness=0.4, hue=0.4, gray_prob=1.0), count=50)
    )

    assert np.allclose(matrix[:, 0], matrix[:, 1], atol=1e-6)
    assert np.allclose(matrix[:, 0], matrix[:, 2], atol=1e-6)


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
    assert not params.hue.any()
    assert not params.gray.any()
    assert (params.brightness == 1).all()


def test_grey_comes_before_the_jitter_in_v1_and_behind_it_in_v2() -> None:
    sizes = np.full((MANY, 2), 300, dtype=np.int32)
    drawn = {
        name: draw_views(np.arange(MANY), sizes, seed=0, recipe=RECIPES[name], view=0)
        for name in ("v1", "v2", "cifar")
    }

    v1, v2 = drawn["v1"], drawn["v2"]
    assert (v1.saturation[v1.gray] == 1).all()
    assert (v1.hue[v1.gray] == 0).all()
    assert (v1.saturation[~v1.gray] != 1).mean() > 0.99
    assert (v2.saturation[v2.gray] != 1).mean() > 0.7
    assert (drawn["cifar"].sigma == 0).all()
    assert np.array_equal(drawn["cifar"].hue, v2.hue)
