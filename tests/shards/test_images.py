"""Which objects are usable images, and what of them is kept."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image, ImageOps

from shards.decoder import Decoder
from shards.images import CheckedImage, ImageFlag, ImageRules, Rejection, check_image, sniff
from tests.support.images import (
    HEIGHT,
    WIDTH,
    Good,
    encode,
    exif,
    good_images,
    jpeg,
    picture,
    spoilt_images,
)

RULES = ImageRules(max_pixels=89_478_485, min_side=1)
GOOD, SPOILT = good_images(), spoilt_images()


@pytest.fixture(scope="module")
def decoder() -> Iterator[Decoder]:
    with Decoder() as decoder:
        yield decoder


def checked(data: bytes, decoder: Decoder, rules: ImageRules = RULES) -> CheckedImage:
    found = check_image(data, rules, decoder)
    assert isinstance(found, CheckedImage), found
    return found


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=float)


@pytest.mark.parametrize("name", GOOD)
def test_a_good_image_is_kept_or_rewritten_as_its_kind_demands(name: str, decoder: Decoder) -> None:
    image = GOOD[name]

    found = checked(image.data, decoder)

    assert (found.action, found.format) == (image.action, image.format)
    assert (found.width, found.height) == image.size
    assert found.orientation == image.orientation
    assert sniff(bytes(found.data[:64])) == image.format
    if image.action == "keep":
        assert bytes(found.data) == image.data


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_object_is_rejected_with_its_reason(name: str, decoder: Decoder) -> None:
    data, reason = SPOILT[name]

    found = check_image(data, RULES, decoder)

    assert isinstance(found, Rejection)
    assert found.reason == reason, found
    assert found.detail
    assert "\n" not in found.detail


@pytest.mark.parametrize("name", [n for n, good in GOOD.items() if good.action != "keep"])
def test_a_rewritten_image_shows_what_the_original_shows(name: str, decoder: Decoder) -> None:
    image = GOOD[name]

    found = checked(image.data, decoder)

    shown = Image.open(io.BytesIO(found.data))
    assert shown.mode in ("RGB", "L")
    assert not shown.getexif()
    assert shown.size == image.size
    if name != "ico":
        expected = _expected(name)
        error = np.abs(pixels(found.data) - expected).mean()
        assert error < (20 if "palette" in name or "gif" in name else 6)


def _expected(name: str) -> np.ndarray:
    """The picture that all good images show, as far as their kind can."""
    image = picture(1)
    if "16-bit" in name and "rgb" not in name:
        image = image.convert("L")
    if name in ("png-alpha", "webp-alpha", "png-gray-alpha"):
        alpha = Image.linear_gradient("L").resize(image.size)
        white = Image.new("RGB", image.size, "white")
        gray = image.convert("L").convert("RGB") if "gray" in name else image
        image = Image.composite(gray, white, alpha)
    if name == "png-palette-transparent":
        layer = Image.open(io.BytesIO(GOOD[name].data)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    turns = {
        "png-turned": Image.Transpose.ROTATE_270,
        "jpeg-cmyk-turned": Image.Transpose.ROTATE_90,
    }
    if name in turns:
        image = image.transpose(turns[name])
    return np.asarray(image.convert("RGB"), dtype=float)


def test_limits_hold_at_their_exact_values(decoder: Decoder) -> None:
    area = WIDTH * HEIGHT
    for data in (jpeg(), encode(picture(), "PNG")):
        for rules, reason in (
            (ImageRules(max_pixels=area, min_side=HEIGHT), None),
            (ImageRules(max_pixels=area - 1, min_side=1), "bomb"),
            (ImageRules(max_pixels=area, min_side=HEIGHT + 1), "too_small"),
        ):
            found = check_image(data, rules, decoder)
            assert (found.reason if isinstance(found, Rejection) else None) == reason


def test_every_orientation_is_recorded_with_the_upright_size(decoder: Decoder) -> None:
    for orientation in range(1, 9):
        found = checked(jpeg(exif=exif(orientation)), decoder)
        upright = (HEIGHT, WIDTH) if orientation >= 5 else (WIDTH, HEIGHT)
        assert (found.orientation, (found.width, found.height)) == (orientation, upright)


def test_an_orientation_that_only_xmp_tells_does_not_count(decoder: Decoder) -> None:
    # Pillow believes it, training decoders do not: the size in the index must be what they see.
    xmp = b'<x xmlns:tiff="t" tiff:Orientation="6"/>'

    found = checked(jpeg(xmp=xmp), decoder)

    assert (found.orientation, found.width, found.height) == (1, WIDTH, HEIGHT)


def test_flags_tell_what_some_readers_care_about(decoder: Decoder) -> None:
    profiled = jpeg(icc_profile=b"profile" * 30)

    assert checked(GOOD["jpeg"].data, decoder).flags == 0
    assert checked(GOOD["jpeg-progressive"].data, decoder).flags == ImageFlag.PROGRESSIVE
    assert checked(profiled, decoder).flags == ImageFlag.ICC_PROFILE
    assert checked(GOOD["png-opaque"].data, decoder).flags == ImageFlag.ALPHA
    assert checked(GOOD["png-animated"].data, decoder).flags == ImageFlag.ANIMATED


def test_no_random_damage_raises_or_warns(decoder: Decoder) -> None:
    draw = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, good in GOOD.items():
            for _ in range(6):
                data = bytearray(good.data)
                for at in draw.integers(0, len(data), 5):
                    data[at] = draw.integers(256)
                short = bytes(data[: draw.integers(1, len(data) + 1)])
                found = check_image(short, RULES, decoder)
                assert isinstance(found, CheckedImage | Rejection), name


def test_a_decoder_that_dies_costs_one_object(decoder: Decoder) -> None:
    good = GOOD["png"].data
    checked(good, decoder)
    child = decoder._child
    assert child is not None

    os.kill(child.pid, signal.SIGSTOP)  # so that it dies with the request in its hands
    killer = threading.Timer(0.2, child.kill)
    killer.start()
    lost = check_image(good, RULES, decoder)
    killer.join()

    assert isinstance(lost, Rejection)
    assert lost.reason == "decoder_crash"
    assert "-9" in lost.detail
    assert checked(good, decoder).action == "keep"


def test_a_decoder_that_hangs_costs_one_object() -> None:
    good = GOOD["png"].data
    with Decoder(longest_decode_s=0.3) as decoder:
        first = check_image(good, RULES, decoder)  # the child may not even be up in that time
        if decoder._child is None:
            decoder._start()
        assert decoder._child is not None
        os.kill(decoder._child.pid, signal.SIGSTOP)
        started = time.monotonic()

        found = check_image(good, RULES, decoder)

        assert time.monotonic() - started < 5
    assert isinstance(first, CheckedImage | Rejection)
    assert isinstance(found, Rejection)
    assert found.reason == "decoder_crash"
    assert "0.3 s" in found.detail


def test_the_decoding_process_ends_with_its_parent() -> None:
    script = (
        "import sys\n"
        "from shards.decoder import Decoder\n"
        "decoder = Decoder()\n"
        "print(decoder._start().pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()

    deadline = time.monotonic() + 10
    while _is_alive(child):
        assert time.monotonic() < deadline, "the decoder outlived its parent"
        time.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.dali
def test_dali_decodes_everything_that_is_packed_in_the_size_of_the_index(decoder: Decoder) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import pipeline_def, types

    kept: dict[str, tuple[Good, CheckedImage]] = {
        name: (good, checked(good.data, decoder)) for name, good in GOOD.items()
    }
    batch = [np.frombuffer(bytes(found.data), dtype=np.uint8) for _, found in kept.values()]

    @pipeline_def(batch_size=1, num_threads=1, device_id=None)
    def graph(data: np.ndarray) -> object:
        encoded = fn.external_source(source=[[data]], cycle=True)
        return fn.decoders.image(encoded, output_type=types.RGB)

    problems = []
    for (name, (_, found)), data in zip(kept.items(), batch, strict=True):
        pipe = graph(data)
        pipe.build()
        try:
            (images,) = pipe.run()
            shape = np.asarray(images[0]).shape
        except RuntimeError as err:
            problems.append(f"{name}: {str(err).splitlines()[0]}")
            continue
        if shape != (found.height, found.width, 3):
            problems.append(f"{name}: {shape}")
        elif name != "ico":
            error = np.abs(np.asarray(images[0], dtype=float) - _dali_sees(found)).mean()
            if error > 3:
                problems.append(f"{name}: other pixels ({error:.1f})")
    assert not problems, problems


def _dali_sees(found: CheckedImage) -> np.ndarray:
    image = Image.open(io.BytesIO(bytes(found.data)))
    return np.asarray(ImageOps.exif_transpose(image).convert("RGB"), dtype=float)
