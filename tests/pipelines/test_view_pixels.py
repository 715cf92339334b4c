import dataclasses
import io
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from demo.made_photos import photo_jpeg
from pipelines.cpu_views import decode, draw_view
from pipelines.stream import EncodedBatch
from pipelines.view_maker import normalised
from pipelines.views import Draw, ViewParams, evaluation_views
from tests.support.encoded_batches import (
    Colour,
    Dtype,
    Path,
    RecipeName,
    batch_of,
    drawn_by,
    levels,
    no_repair,
    views_by,
)
from tests.support.images import encode, exif, good_images
from tests.support.images import picture as small_picture
from tests.support.reference_views import reference_views, upright_image
from tests.support.shard_sets import picture

SIZE = 64
RECIPES: tuple[RecipeName, ...] = ("v1", "v2", "v2_gray", "digits")
dali = pytest.param("dali", marks=pytest.mark.dali)
paths = pytest.mark.parametrize("path", ["cpu", dali])


@pytest.fixture(scope="module")
def encoded() -> list[bytes]:
    """Photos, and pictures in garish colours: three formats, eight orientations, gray ones."""
    formats = ["JPEG", "PNG", "WEBP"]
    pictures = [
        picture(i, format=formats[i % 3], orientation=1 + i % 8, gray=i % 5 == 4) for i in range(32)
    ]
    return [photo_jpeg(number, size=(200, 150)) for number in range(32)] + pictures


@pytest.fixture(scope="module")
def mixed(encoded: list[bytes]) -> EncodedBatch:
    return batch_of(encoded)


def both_views(
    path: Path,
    draw: Draw,
    batches: Sequence[EncodedBatch],
    *,
    colour: Colour = "exact",
    view_dtype: Dtype = "uint8",
    num_threads: int = 2,
) -> NDArray[np.float32]:
    """2 x N x S x S x 3, over all the batches."""
    made = views_by(
        path,
        draw,
        batches,
        view_size=SIZE,
        colour=colour,
        view_dtype=view_dtype,
        num_threads=num_threads,
    )
    return np.concatenate([np.stack([levels(view) for view in views]) for _, views in made], axis=1)


@paths
@pytest.mark.parametrize("recipe", RECIPES)
def test_exact_views_are_those_of_torchvision(
    path: Path, recipe: RecipeName, encoded: list[bytes], mixed: EncodedBatch
) -> None:
    draw = drawn_by(recipe, view_size=SIZE)
    reference = np.stack(
        [
            reference_views(encoded, params, view_size=SIZE)
            for params in draw(mixed.positions, mixed.sizes)
        ]
    )

    difference = np.abs(both_views(path, draw, [mixed]) - reference)

    # In levels of 255. Sizes, brightness, contrast and blur agree to a level that rounding leaves.
    # Hue goes through 8 bits of hue and saturation in Pillow, too: half a step of either is up to 3
    # levels of a garish colour, and each path rounds elsewhere. See LIMITS for what was measured.
    mean, most = LIMITS[path, recipe in ("v1", "v2")]
    assert difference.mean() < mean
    assert np.quantile(difference, 0.999) <= most
    assert difference.mean(axis=(2, 3, 4)).max() < 6 * mean


LIMITS = {
    ("cpu", False): (0.1, 2),
    ("cpu", True): (1.0, 12),
    ("dali", False): (0.3, 4),
    ("dali", True): (0.9, 10),
}
"""Of mean and 99.9 % of the differences, by path and by whether the recipe shifts the hue."""


@paths
@pytest.mark.parametrize("sigma", [0.2, 0.6, 1.0, 2.0, 3.5])
def test_a_blur_is_that_of_torchvision(
    path: Path, sigma: float, encoded: list[bytes], mixed: EncodedBatch
) -> None:
    plain = evaluation_views(mixed.sizes)
    blurred = dataclasses.replace(plain, sigma=np.full(len(mixed), sigma, dtype=np.float32))
    reference = reference_views(encoded, blurred, view_size=SIZE)

    views = both_views(path, lambda *_: (blurred, blurred), [mixed])[0]

    assert np.abs(views - reference).mean() < (0.04 if path == "cpu" else 0.2)


@pytest.mark.dali
@pytest.mark.parametrize("recipe", RECIPES)
def test_fast_views_are_the_same_by_both_paths(recipe: RecipeName, mixed: EncodedBatch) -> None:
    draw = drawn_by(recipe, view_size=SIZE)

    ours, theirs = (both_views(path, draw, [mixed], colour="fast") for path in ("cpu", "dali"))

    # One matrix on both: what differs is their filters, a level or two, times the contrast.
    difference = np.abs(ours - theirs)
    assert difference.mean() < 0.4
    assert np.quantile(difference, 0.999) <= 4


@paths
def test_fast_and_exact_colours_differ_where_there_is_hue(path: Path, mixed: EncodedBatch) -> None:
    draw = drawn_by("v1", view_size=SIZE)

    exact, fast = (both_views(path, draw, [mixed], colour=colour) for colour in ("exact", "fast"))

    assert np.abs(exact - fast).mean() > 5


@paths
def test_views_without_jitter_differ_in_crop_and_flip_alone(
    path: Path, encoded: list[bytes], mixed: EncodedBatch
) -> None:
    def draw(_: NDArray[np.int64], sizes: NDArray[np.int32]) -> tuple[ViewParams, ...]:
        return (evaluation_views(sizes),) * 2

    plain = both_views(path, draw, [mixed])[0]

    reference = reference_views(encoded, evaluation_views(mixed.sizes), view_size=SIZE)
    assert np.abs(plain - reference).mean() < 0.2


@paths
def test_a_view_s_pixels_depend_on_nothing_but_its_position(
    path: Path, mixed: EncodedBatch
) -> None:
    draw = drawn_by("v2", view_size=SIZE)
    one_by_one = [mixed.only(place) for place in range(len(mixed))]

    whole = both_views(path, draw, [mixed], num_threads=1)

    assert np.array_equal(both_views(path, draw, [mixed], num_threads=5), whole)
    assert np.array_equal(both_views(path, draw, one_by_one), whole)
    assert np.array_equal(both_views(path, draw, one_by_one[::-1])[:, ::-1], whole)


@paths
def test_views_handed_over_are_not_overwritten_by_later_batches(
    path: Path, mixed: EncodedBatch
) -> None:
    single = [mixed.only(place) for place in range(10)]
    made = views_by(path, drawn_by("v2", view_size=SIZE), single, view_size=SIZE)
    kept = [(views[0], views[0].clone()) for _, views in made]

    assert all(torch.equal(view, copy) for view, copy in kept)


@paths
def test_views_lie_channels_last_in_the_type_asked_for(path: Path, mixed: EncodedBatch) -> None:
    draw = drawn_by("v2", view_size=SIZE)
    found: dict[Dtype, torch.Tensor] = {}
    for dtype in ("uint8", "float16", "float32"):
        ((_, (view, _)),) = views_by(path, draw, [mixed], view_size=SIZE, view_dtype=dtype)
        found[dtype] = view

    for dtype, view in found.items():
        assert view.dtype == getattr(torch, dtype)
        assert view.shape == (len(mixed), 3, SIZE, SIZE)
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert normalised(view).dtype == torch.float32
        assert normalised(view).is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(normalised(found["uint8"]), found["float32"], atol=1e-5)
    assert torch.allclose(normalised(found["float16"]), found["float32"], atol=2e-3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_an_image_is_decoded_upright(format: str, orientation: int) -> None:
    data = picture(3, format=format, orientation=orientation)
    upright = upright_image(data)

    image = decode(np.frombuffer(data, np.uint8), size=upright.size, orientation=orientation)

    assert np.array_equal(image, np.asarray(upright))


def test_rare_kinds_are_decoded_as_pillow_shows_them() -> None:
    kinds = ("jpeg", "png", "webp", "bmp", "ppm", "pgm")
    deep = ("pgm-four-bits", "pgm-16-bit", "ppm-ten-bits", "png-16-bit", "png-16-bit-rgb")
    kept = {
        name: good
        for name, good in good_images().items()
        if name.startswith(kinds) and name not in deep
    }
    assert {"jpeg-cmyk", "jpeg-gray", "jpeg-progressive", "png-palette-transparent"} <= set(kept)

    for name, good in kept.items():
        header = Image.open(io.BytesIO(good.data))
        orientation = header.getexif().get(0x0112, 1)
        upright = upright_image(good.data)
        image = decode(
            np.frombuffer(good.data, np.uint8),
            size=upright.size,
            orientation=orientation if orientation <= 8 else 1,
        )
        assert np.array_equal(image, np.asarray(upright)), name


def test_what_cannot_be_decoded_is_a_value_error() -> None:
    whole = photo_jpeg(1, size=(80, 60))
    flipped = bytearray(whole)
    flipped[len(whole) // 2 : len(whole) // 2 + 200] = bytes(range(1, 201))
    png = bytearray(encode(small_picture(1), "PNG"))
    png[len(png) // 2 : len(png) // 2 + 60] = bytes(60)

    for data, size, words in (
        (whole[: len(whole) // 2], (80, 60), "by turbo: "),
        (whole[: len(whole) // 2] + b"\xff\xd9", (80, 60), "by turbo: "),
        (bytes(flipped), (80, 60), "by turbo: "),
        (bytes(png), (72, 48), "by Pillow: "),
        (b"", (8, 8), "by Pillow: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", (8, 8), "by Pillow: cannot identify"),
    ):
        with pytest.raises(ValueError, match=words):
            decode(np.frombuffer(data, np.uint8), size=size, orientation=1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "PPM"])
def test_an_image_of_another_size_is_refused_before_its_pixels(format: str) -> None:
    data = np.frombuffer(encode(small_picture(1), format), np.uint8)

    with pytest.raises(ValueError, match=r"is 72 x 48 pixels, but the index says 5 x 6"):
        decode(data, size=(5, 6), orientation=1)
    with pytest.raises(ValueError, match=r"is 72 x 48 pixels, but the index says 48 x 72"):
        decode(data, size=(72, 48), orientation=6)


def test_the_index_says_how_an_image_lies_and_not_its_header() -> None:
    data = encode(small_picture(1), "JPEG", exif=exif(6))

    image = decode(np.frombuffer(data, np.uint8), size=(72, 48), orientation=1)

    assert image.shape == (48, 72, 3)


def test_a_plain_view_is_the_crop_mirrored() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    one = np.ones(1, dtype=np.float32)
    params = ViewParams(
        crop=np.array([[4, 2, 8, 8]], dtype=np.int32),
        flip=np.array([[True, False]]),
        brightness=one,
        contrast=one,
        saturation=one,
        hue=0 * one,
        gray=np.array([False]),
        sigma=0 * one,
    )

    view = draw_view(image, params, 0, view_size=8, colour="exact", affine=None)

    assert np.array_equal(view, image[2:10, 4:12][:, ::-1])


@paths
def test_a_batch_with_an_undecodable_image_runs_again_without_it(path: Path) -> None:
    draw = drawn_by("v2", view_size=SIZE)
    plain, bad = batch_of([picture(i) for i in range(3)]), batch_with_a_bad_png()
    substituted = batch_of([picture(0), picture(5), picture(2)])
    seen: list[list[int]] = []

    def repair(_batch: EncodedBatch, faults: dict[int, str]) -> EncodedBatch:
        seen.append(list(faults))
        return substituted

    made = list(
        views_by(path, draw, [plain, bad, plain, bad, bad, plain], view_size=SIZE, repair=repair)
    )

    assert seen == [[1]] * 3
    assert [batch is plain for batch, _ in made] == [True, False, True, False, False, True]
    ((_, expected),) = views_by(path, draw, [substituted], view_size=SIZE)
    for place in (1, 3, 4):
        assert made[place][0] is substituted
        assert torch.equal(made[place][1][0], expected[0])
    assert torch.equal(made[0][1][0], made[2][1][0])


@paths
def test_a_bad_sample_that_is_left_out_leaves_the_others(path: Path) -> None:
    draw = drawn_by("v2", view_size=SIZE)
    rest = batch_of([picture(0), picture(2)])

    made = list(
        views_by(
            path,
            draw,
            [batch_with_a_bad_png(), batch_with_a_bad_png().only(1)],
            view_size=SIZE,
            repair=lambda batch, _: rest if len(batch) == 3 else nothing(),
        )
    )

    ((batch, views),) = made  # of the second batch nothing is left
    assert batch is rest
    assert views[0].shape[0] == 2


@paths
def test_a_substitute_may_be_bad_too(path: Path) -> None:
    draw = drawn_by("v2", view_size=SIZE)
    bad, good = batch_with_a_bad_png(), batch_of([picture(i) for i in range(3)])
    answers = iter([bad, bad, good])

    made = list(views_by(path, draw, [bad], view_size=SIZE, repair=lambda *_: next(answers)))

    ((batch, views),) = made
    ((_, expected),) = views_by(path, draw, [good], view_size=SIZE, repair=no_repair)
    assert batch is good
    assert torch.equal(views[1], expected[1])


def batch_with_a_bad_png() -> EncodedBatch:
    png = bytearray(picture(1, format="PNG"))
    png[len(png) // 2 : len(png) // 2 + 60] = bytes(60)
    return batch_of([picture(0), bytes(png), picture(2)])


def nothing() -> EncodedBatch:
    return batch_of([])
