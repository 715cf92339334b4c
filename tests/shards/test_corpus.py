"""Odd and broken files from elsewhere, and mutations of good ones: no crash, and no hang."""

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from demo.images import ImageSet, foods, jxl_testdata, manual
from shards.decoder import Decoder
from shards.images import CheckedImage, ImageRules, Reason, Rejection, check_image
from tests.support.dali import assert_dali_agrees, dali_refuses
from tests.support.images import endless_tiff, good_images

RULES = ImageRules(max_pixels=89_478_485, min_side=1, resize_side=0)
SMALL = ImageRules(max_pixels=89_478_485, min_side=1, resize_side=40)
LONGEST_CHECK_S = 20.0
"""Far above what any of these files takes, far below the decoder's own deadline of two minutes."""
SETS: dict[str, Callable[[], ImageSet]] = {
    "foods": foods,
    "jxl_testdata": jxl_testdata,
    "manual": manual,
}
IMAGES = (".jpg", ".jpeg", ".png", ".gif", ".ppm", ".pgm", ".pnm")
REJECTED = {
    # Rates of luma and chroma that libjpeg-turbo's interface has no name for.
    "flower.png.im_q85_asymmetric.jpg": Reason.UNSUPPORTED_FORMAT,
    "flower.png.im_q85_luma_subsample.jpg": Reason.UNSUPPORTED_FORMAT,
    "flower.png.im_q85_rgb_subsample_blue.jpg": Reason.UNSUPPORTED_FORMAT,
}


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as decoder:
        yield decoder


def files(name: str) -> list[Path]:
    try:
        folder = SETS[name]().folder
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"{name} cannot be fetched: {err}")
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def check(data: bytes, decoder: Decoder, rules: ImageRules) -> CheckedImage | Rejection:
    started = time.monotonic()
    found = check_image(data, rules, decoder)
    assert time.monotonic() - started < LONGEST_CHECK_S
    return found


def check_files(
    paths: Sequence[Path], decoder: Decoder, rules: ImageRules
) -> list[tuple[str, CheckedImage]]:
    """What is packed of these files; each other one must be rejected as its name says."""
    packed = []
    for path in paths:
        found = check(path.read_bytes(), decoder, rules)
        if isinstance(found, CheckedImage):
            packed.append((path.name, found))
            continue
        expected = REJECTED.get(path.name)
        if expected is None:
            assert path.suffix.lower() not in IMAGES, (path, found)
            expected = Reason.UNKNOWN_MAGIC
            if found.reason in (Reason.EMPTY, Reason.HTML_OR_XML):
                expected = found.reason
            if path.suffix == ".svg":
                expected = Reason.UNSUPPORTED_FORMAT
        assert found.reason == expected, (path, found)
    return packed


@pytest.mark.dali
@pytest.mark.timeout(120)
@pytest.mark.parametrize("rules", [RULES, SMALL], ids=["keep", "resize"])
def test_rare_files_of_a_package_are_packed_as_dali_sees_them(
    rules: ImageRules, decoder: Decoder
) -> None:
    paths = files("jxl_testdata")
    small = [path for path in paths if path.stat().st_size < 300_000 or path.suffix == ".jpg"]

    packed = check_files(small, decoder, rules)

    assert len(packed) > 70
    assert_dali_agrees(packed)


@pytest.mark.slow
@pytest.mark.dali
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("rules", [RULES, SMALL], ids=["keep", "resize"])
@pytest.mark.parametrize("name", SETS)
def test_all_files_of_the_packages_are_packed_as_dali_sees_them(
    name: str, rules: ImageRules, decoder: Decoder
) -> None:
    packed = check_files(files(name), decoder, rules)

    assert len(packed) > 90
    assert_dali_agrees(packed)


def test_pages_in_a_circle_end(decoder: Decoder) -> None:
    assert isinstance(check(endless_tiff(), decoder, RULES), CheckedImage | Rejection)


@pytest.mark.dali
@pytest.mark.timeout(120)
def test_no_mutation_of_a_good_image_crashes_or_hangs(decoder: Decoder) -> None:
    fuzz(decoder, each=6)


@pytest.mark.slow
@pytest.mark.dali
@pytest.mark.timeout(3000)
def test_no_mutation_of_a_good_image_crashes_or_hangs_in_500_tries_each(decoder: Decoder) -> None:
    fuzz(decoder, each=500)


def fuzz(decoder: Decoder, *, each: int) -> None:
    """Mutate each kind of good image so often; whatever is packed is what DALI decodes."""
    good = {name: image.data for name, image in good_images().items() if len(image.data) < 50_000}
    others = list(good.values())
    packed = []
    for number, (name, data) in enumerate(good.items()):
        draw = np.random.default_rng(number)
        for attempt in range(each):
            changed = mutate(data, others[draw.integers(len(others))], draw)

            found = check(changed, decoder, SMALL if attempt % 3 == 0 else RULES)

            if isinstance(found, Rejection):
                assert found.reason != Reason.DECODER_CRASH, (name, attempt, found)
                assert found.detail
            else:
                packed.append((f"{name} {attempt}", found))
    assert packed
    assert not (refused := dali_refuses(packed)), refused


def mutate(data: bytes, other: bytes, draw: np.random.Generator) -> bytes:
    """Some bytes changed, a piece cut out, doubled, or replaced by one of another image."""
    start, stop = sorted(draw.integers(0, len(data) + 1, 2).tolist())
    match draw.integers(6):
        case 0:
            changed = bytearray(data)
            for at in draw.integers(0, len(data), int(draw.integers(1, 9))):
                changed[at] = draw.integers(256)
            return bytes(changed)
        case 1:  # early, where the headers are
            changed = bytearray(data)
            for at in draw.integers(0, min(len(data), 64), int(draw.integers(1, 4))):
                changed[at] = draw.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF])
            return bytes(changed)
        case 2:
            return data[:stop]
        case 3:
            return data[:start] + data[stop:]
        case 4:
            return data[:stop] + data[start:]
        case _:
            return data[:start] + other[start:stop] + data[stop:]
