"""Which objects are usable images, and what of them is kept."""

import io
import os
import signal
import struct
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
from tests.support.dali import dali_refuses
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

RULES = ImageRules(max_pixels=89_478_485, min_side=1, resize_side=0)
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


GRAY_ONES = ("png-16-bit", "tiff-16-bit", "tiff-gray", "tiff-white-is-zero", "jp2-gray")


def _expected(name: str) -> np.ndarray:
    """The picture that all good images show, as far as their kind can."""
    image = picture(1)
    if name in ("jpeg-ycck", "tiff-fax", "pbm", "bmp-one-bit"):  # only Pillow can tell
        image = Image.open(io.BytesIO(GOOD[name].data))
    if name.startswith("pgm") or name in GRAY_ONES:
        image = image.convert("L")
    if "alpha" in name:
        alpha = Image.linear_gradient("L").resize(image.size)
        white = Image.new("RGB", image.size, "white")
        gray = image.convert("L").convert("RGB") if "gray" in name else image
        image = Image.composite(gray, white, alpha)
    if "transparent" in name:
        layer = Image.open(io.BytesIO(GOOD[name].data)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    if name.endswith("-turned"):
        turn = Image.Transpose.ROTATE_90 if "cmyk" in name else Image.Transpose.ROTATE_270
        image = image.transpose(turn)
    return np.asarray(image.convert("RGB"), dtype=float)


SMALL = ImageRules(max_pixels=89_478_485, min_side=1, resize_side=24)


@pytest.mark.parametrize("name", GOOD)
def test_a_large_image_of_any_kind_is_resized_to_the_shorter_side(
    name: str, decoder: Decoder
) -> None:
    image = GOOD[name]
    shorter = min(image.size)

    found = checked(image.data, decoder, SMALL)

    if shorter <= 24:
        assert (bytes(found.data), found.action) == (image.data, "keep")
        return
    expected = tuple(round(side * 24 / shorter) for side in image.size)
    assert (found.action, found.format, found.orientation) == ("resize", "jpeg", 1)
    assert (found.width, found.height) == expected
    shown = Image.open(io.BytesIO(found.data))
    assert shown.size == expected
    assert not shown.getexif()
    assert shown.mode == ("L" if Image.open(io.BytesIO(image.data)).mode in GRAY else "RGB")
    assert checked(image.data, decoder, SMALL).data == found.data


GRAY = ("L", "LA", "1", "I", "I;16")


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_object_is_not_resized(name: str, decoder: Decoder) -> None:
    data, reason = SPOILT[name]

    found = check_image(data, SMALL, decoder)

    assert isinstance(found, Rejection)
    assert found.reason == reason, found


def test_what_is_not_larger_than_the_side_keeps_its_bytes(decoder: Decoder) -> None:
    for data in (jpeg(), encode(picture(), "PNG")):
        for side, action in ((0, "keep"), (HEIGHT, "keep"), (HEIGHT - 1, "resize")):
            rules = ImageRules(max_pixels=10**6, min_side=1, resize_side=side)
            assert checked(data, decoder, rules).action == action


# One side for each scale that libjpeg-turbo decodes at, and for each way to go on from there.
@pytest.mark.parametrize("side", [20, 30, 37, 50, 70, 80, 110, 140, 180, 220, 290])
def test_a_resized_photo_shows_what_a_slow_resize_shows(side: int, decoder: Decoder) -> None:
    photo = picture(4, size=(450, 300))
    rules = ImageRules(max_pixels=10**6, min_side=1, resize_side=side)
    for orientation in range(1, 9):
        data = encode(photo, "JPEG", quality=95, exif=exif(orientation))
        turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))

        found = checked(data, decoder, rules)

        slow = turned.resize((found.width, found.height), Image.Resampling.LANCZOS)
        seen = Image.open(io.BytesIO(found.data))
        assert min(seen.size) == side
        # Luma: at half resolution, the strong colours of this picture blur in a small one.
        error = np.asarray(seen.convert("L"), float) - np.asarray(slow.convert("L"), float)
        assert np.abs(error).mean() < 3


@pytest.mark.parametrize("side", [20, 40, 70, 110, 140])
def test_damage_shows_at_every_scale_of_decoding(side: int, decoder: Decoder) -> None:
    whole = encode(Image.effect_noise((200, 150), 90).convert("RGB"), "JPEG", quality=90)
    rules = ImageRules(max_pixels=10**6, min_side=1, resize_side=side)
    draw = np.random.default_rng(side)
    verdicts = set()
    for _ in range(40):
        data = bytearray(whole)
        at, count = int(draw.integers(700, len(data) - 50)), int(draw.integers(1, 40))
        data[at : at + count] = draw.integers(0, 256, count, dtype=np.uint8).tobytes()

        kept, smaller = (check_image(bytes(data), r, decoder) for r in (RULES, rules))

        assert type(kept) is type(smaller)
        if isinstance(kept, Rejection):
            assert isinstance(smaller, Rejection)
            assert kept.reason == smaller.reason
        verdicts.add(type(kept))
    assert Rejection in verdicts


def test_limits_hold_at_their_exact_values(decoder: Decoder) -> None:
    area = WIDTH * HEIGHT
    for data in (jpeg(), encode(picture(), "PNG")):
        for rules, reason in (
            (ImageRules(max_pixels=area, min_side=HEIGHT, resize_side=0), None),
            (ImageRules(max_pixels=area - 1, min_side=1, resize_side=0), "bomb"),
            (ImageRules(max_pixels=area, min_side=HEIGHT + 1, resize_side=0), "too_small"),
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


def test_a_decoder_that_was_killed_costs_nothing(decoder: Decoder) -> None:
    good = GOOD["png"].data
    checked(good, decoder)
    child = decoder._child
    assert child is not None

    os.kill(child.pid, signal.SIGSTOP)  # so that it dies with the request in its hands
    killer = threading.Timer(0.2, child.kill)
    killer.start()
    found = check_image(good, RULES, decoder)
    killer.join()

    assert isinstance(found, CheckedImage)
    assert decoder._child is not child


def test_an_image_that_two_decoders_die_of_costs_one_object() -> None:
    good = GOOD["png"].data

    class Fragile(Decoder):
        fragile = True

        def _start(self) -> "subprocess.Popen[bytes]":
            child = super()._start()
            if self.fragile:
                os.kill(child.pid, signal.SIGSTOP)
                threading.Timer(0.1, child.kill).start()
            return child

    with Fragile() as decoder:
        lost = check_image(good, RULES, decoder)
        decoder.fragile = False
        next_one = check_image(good, RULES, decoder)

    assert isinstance(lost, Rejection)
    assert lost.reason == "decoder_crash"
    assert "-9" in lost.detail
    assert isinstance(next_one, CheckedImage)


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


def _exif_segment(*, order: str = ">", head: bytes = b"", kind: int = 3, value: int = 6) -> bytes:
    """An EXIF segment with one tag, the orientation (0x0112) unless value is 0: then another."""
    tag = 0x0112 if value else 0x0110
    head = head or (b"MM\0*" if order == ">" else b"II*\0")
    entry = struct.pack(f"{order}HHHIHH", 1, tag, kind, 1, value, 0)
    body = b"Exif\0\0" + head + struct.pack(f"{order}I", 8) + entry + bytes(4)
    return b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body


@pytest.mark.dali
def test_of_strange_exif_the_orientation_is_the_one_that_dali_goes_by(decoder: Decoder) -> None:
    pytest.importorskip("nvidia.dali")
    segments = {
        "big-endian": _exif_segment(),
        "little-endian": _exif_segment(order="<"),
        "long": _exif_segment(order="<", kind=4),
        "of no type": _exif_segment(kind=99),
        "bad order": _exif_segment(head=b"xx\0*"),
        "bad magic": _exif_segment(head=b"MM\0+"),
        "bad value": _exif_segment(value=77),
        "upright, then turned": _exif_segment(value=1) + _exif_segment(),
        "turned, then upright": _exif_segment() + _exif_segment(value=1),
        "turned, then none": _exif_segment() + _exif_segment(value=0),
        "turned, then broken": _exif_segment() + b"\xff\xe1\0\x0cExif\0\0MM\0*",
    }
    plain = jpeg()
    found = [
        (name, checked(plain[:2] + exif_bytes + plain[2:], decoder))
        for name, exif_bytes in segments.items()
    ]

    assert {image.orientation for _, image in found} == {1, 6}
    assert not dali_refuses(found)


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
