import pytest

from pipelines.headers import HEADER_BYTES, look
from tests.support.images import encode, good_images, picture


def seen(data: bytes) -> tuple[int, int] | str:
    return look(data[:HEADER_BYTES], size=len(data))


def test_every_kept_image_of_the_rarer_formats_shows_its_size() -> None:
    kept = {
        name: good
        for name, good in good_images().items()
        if good.action == "keep" and good.format in ("webp", "bmp", "pnm")
    }

    assert {"webp", "webp-lossless", "bmp", "bmp-top-down", "ppm", "pgm", "ppm-comment"} <= set(
        kept
    )
    for name, good in kept.items():
        assert seen(good.data) == good.size, name


@pytest.mark.parametrize("format", ["WEBP", "BMP", "PPM"])
def test_an_image_that_is_cut_short_has_no_end(format: str) -> None:
    data = encode(picture(1), format)

    for kept in (len(data) - 1, len(data) // 2, 60):
        assert str(seen(data[:kept])).endswith("without an end")
    assert isinstance(seen(data[:12]), str)


@pytest.mark.parametrize(
    "header",
    [
        b"P6\n# 15\n72\xff48\n2\xff",  # DALI died of it
        b"P6\n72 48\n15\n",
        b"P6\n72\n",
        b"P6\n72 -48\n255\n",
        b"P3\n72 48\n255\n",
    ],
)
def test_a_damaged_pnm_header_is_seen(header: bytes) -> None:
    assert seen(header + bytes(20_000)) == "PNM with a damaged header"


def test_other_formats_are_refused() -> None:
    assert seen(encode(picture(1), "TIFF")) == "not a format that shards hold"
    assert seen(b"") == "not a format that shards hold"
