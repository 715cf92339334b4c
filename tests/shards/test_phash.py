"""Near-duplicates have near hashes, other photos do not, and every path gives the same."""

import io
import subprocess
from collections.abc import Callable, Iterator

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from demo.images import foods
from shards.decoder import Decoder
from shards.images import CheckedImage, ImageRules, check_image
from shards.phash import _COSINES, phash
from tests.support.images import encode, exif, picture

Hash = Callable[[bytes], int]
RULES = ImageRules(max_pixels=10**8, min_side=1, resize_side=0)


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    try:
        folder = foods().folder
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"the photos cannot be fetched: {err}")
    return sorted({path.read_bytes() for path in folder.glob("*.jp*g")})


@pytest.fixture(scope="module")
def hash_of() -> Iterator[Hash]:
    def hash_of(data: bytes) -> int:
        found = check_image(data, RULES, decoder)
        assert isinstance(found, CheckedImage), found
        return found.phash

    with Decoder() as decoder:
        yield hash_of


def library(gray: Image.Image) -> int:
    return int(str(imagehash.phash(gray)), 16)


def test_it_is_the_hash_of_the_library_bit_for_bit(photos: list[bytes]) -> None:
    draw = np.random.default_rng(0)
    pictures = [Image.open(io.BytesIO(data)).convert("L") for data in photos[::3]]
    pictures += [
        Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8))
        for shape in [(1, 1), (3, 500), (31, 40), (32, 32), (63, 63), (40, 290)]
    ]
    for large in pictures:
        image = large.reduce(max(1, min(large.size) // 32))
        assert of_pixels(np.asarray(image)) == library(image)


def of_pixels(gray: np.ndarray) -> int:
    return phash(gray, size=gray.shape[::-1], averaged=1, orientation=1)


def test_no_sum_is_rounded() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32), dtype=np.uint8)
    exact = _COSINES.astype(object) @ pixels.astype(object) @ _COSINES.T.astype(object)

    ordered = sorted(int(value) for value in exact.ravel())
    bits = "".join(str(int(int(value) > ordered[31])) for value in exact.ravel())

    assert of_pixels(pixels) == int(bits, 2)
    assert int(np.abs(_COSINES).sum(1).max()) ** 2 * 255 < 2**53


def test_a_largewithout_structure_has_one_of_two_hashes() -> None:
    for level in (0, 1, 128, 255):
        flat = np.full((40, 50), level, dtype=np.uint8)
        assert of_pixels(flat) == (1 << 63 if level else 0)


def test_the_container_does_not_matter(hash_of: Hash) -> None:
    image = picture(3, size=(500, 300))
    lossless = {hash_of(encode(image, kind)) for kind in ("PNG", "BMP", "TIFF", "PPM", "JPEG2000")}

    assert len(lossless) == 1
    assert near(hash_of(encode(image, "JPEG", quality=95, subsampling=0)), *lossless, distance=4)


def test_the_orientation_does_not_matter(hash_of: Hash) -> None:
    image = picture(3, size=(500, 300))
    upright = hash_of(encode(image, "JPEG", quality=95))
    for orientation in range(1, 9):
        back = {6: 8, 8: 6}.get(orientation, orientation)
        turned = Image.open(io.BytesIO(encode(image, "PNG", exif=exif(back))))
        data = encode(ImageOps.exif_transpose(turned), "JPEG", quality=95, exif=exif(orientation))
        assert near(hash_of(data), upright, distance=4)


def test_a_resized_image_has_the_hash_of_what_is_packed(photos: list[bytes], hash_of: Hash) -> None:
    rules = ImageRules(max_pixels=10**8, min_side=1, resize_side=120)
    with Decoder() as decoder:
        for data in photos[:20]:
            found = check_image(data, rules, decoder)
            assert isinstance(found, CheckedImage)
            assert found.action == "resize"
            assert near(found.phash, hash_of(bytes(found.data)), distance=4)
            assert near(found.phash, hash_of(data), distance=8)


CHANGES: dict[str, Callable[[Image.Image], bytes]] = {
    "half the size": lambda image: encode(image.reduce(2), "JPEG", quality=90),
    "two thirds of the size": lambda image: encode(
        image.resize((image.width * 2 // 3, image.height * 2 // 3)), "JPEG", quality=90
    ),
    "quality 50": lambda image: encode(image, "JPEG", quality=50),
    "1 % cut off": lambda image: encode(
        image.crop((round(image.width * 0.01), 0, image.width, image.height)), "JPEG"
    ),
    "brighter": lambda image: encode(ImageEnhance.Brightness(image).enhance(1.1), "JPEG"),
    "more contrast": lambda image: encode(ImageEnhance.Contrast(image).enhance(1.15), "JPEG"),
    "less colour": lambda image: encode(ImageEnhance.Color(image).enhance(0.7), "JPEG"),
    "gray": lambda image: encode(image.convert("L"), "JPEG"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_near_duplicates_are_near(change: str, photos: list[bytes], hash_of: Hash) -> None:
    photos = photos[::3]
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in photos]

    distances = [
        (hash_of(data) ^ hash_of(CHANGES[change](image))).bit_count()
        for data, image in zip(photos, images, strict=True)
    ]

    assert np.mean(np.array(distances) <= 8) >= 0.98


def test_three_percent_cut_off_are_near_mostly(photos: list[bytes], hash_of: Hash) -> None:
    images = [Image.open(io.BytesIO(data)).convert("RGB") for data in photos[::3]]

    distances = [
        (
            hash_of(data) ^ hash_of(encode(ImageOps.crop(image, image.width * 3 // 200), "JPEG"))
        ).bit_count()
        for data, image in zip(photos[::3], images, strict=True)
    ]

    assert np.mean(np.array(distances) <= 8) >= 0.9


def test_other_photos_are_far(photos: list[bytes], hash_of: Hash) -> None:
    hashes = np.array([hash_of(data) for data in photos], dtype=np.uint64)

    pairs = np.bitwise_count(hashes[:, None] ^ hashes[None, :])[np.triu_indices(len(hashes), 1)]

    assert len(pairs) > 50_000
    assert np.mean(pairs <= 8) < 1e-4
    assert 30 <= np.median(pairs) <= 34


def near(one: int, other: int, *, distance: int) -> bool:
    return (one ^ other).bit_count() <= distance
