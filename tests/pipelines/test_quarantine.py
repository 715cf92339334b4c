import numpy as np
import pytest

from pipelines.errors import BadDataError
from pipelines.quarantine import ALLOWED_BAD, BadSample, Quarantine, candidates, damage
from tests.support.shard_sets import picture


def bytes_of(data: bytes) -> np.ndarray:
    return np.frombuffer(data, dtype=np.uint8)


def looked_at(
    data: np.ndarray, *, width: int, height: int, orientation: int, max_pixels: int = 10**6
) -> str | None:
    return damage(data, width, height, orientation, max_pixels=max_pixels)


def size_of(number: int) -> tuple[int, int]:
    rng = np.random.default_rng(number)
    width, height = rng.integers(60, 120, size=2)
    return int(width), int(height)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_sound_images_pass(format: str, orientation: int) -> None:
    width, height = size_of(1)
    if orientation == 6:
        width, height = height, width

    found = looked_at(
        bytes_of(picture(1, format=format, orientation=orientation)),
        width=width,
        height=height,
        orientation=orientation,
    )

    assert found is None


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_a_cut_image_is_bad(format: str) -> None:
    width, height = size_of(1)
    data = bytes_of(picture(1, format=format))

    for cut in (1, 3, len(data) // 2, len(data) - 12):
        found = looked_at(data[:-cut], width=width, height=height, orientation=1)
        # What a JPEG's end marker or a PNG's last chunk loses at its very end harms no pixel.
        assert found is not None or (format == "PNG" and cut <= 4)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_another_size_than_the_index_says_is_bad(format: str) -> None:
    width, height = size_of(1)

    found = looked_at(
        bytes_of(picture(1, format=format)), width=width + 1, height=height, orientation=1
    )

    assert found == f"is {width} x {height} pixels, but the index says {width + 1} x {height}"


def test_bytes_after_a_jpeg_do_no_harm() -> None:
    width, height = size_of(1)

    data = bytes_of(picture(1) + bytes(5000))

    assert looked_at(data, width=width, height=height, orientation=1) is None


def test_a_jpeg_with_a_damaged_header_is_bad() -> None:
    data = bytearray(picture(1))
    data[2:600] = bytes(598)

    assert (
        looked_at(bytes_of(bytes(data)), width=80, height=80, orientation=1)
        == "JPEG with a damaged header"
    )


def substitutes(position: int, shard: int, member: int, samples: list[int], block: int = 4):
    return list(
        candidates(position, shard, member, shard_samples=np.array(samples), block=block, seed=1)
    )


def test_substitutes_are_the_block_s_others_and_then_those_of_the_shards_behind() -> None:
    order = substitutes(1000, 1, 5, [9, 10, 0, 3])

    assert sorted(order[:3]) == [(1, 4), (1, 6), (1, 7)]
    # Shard 2 is empty; of shard 3 its only block; of shard 0 the block two further on, going round.
    assert sorted(order[3:6]) == [(3, 0), (3, 1), (3, 2)]
    assert sorted(order[6:]) == [(0, 4 * ((1 + 3) % 3) + n) for n in range(4)]


def test_an_only_shard_s_substitutes_are_all_its_blocks() -> None:
    order = substitutes(1000, 0, 5, [10])

    assert sorted(order[:3]) == [(0, 4), (0, 6), (0, 7)]
    assert sorted(order[3:5]) == [(0, 8), (0, 9)]
    assert sorted(order[5:]) == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_substitutes_depend_on_the_position() -> None:
    firsts = {substitutes(position, 0, 5, [64], block=64)[0] for position in range(50)}

    assert len(firsts) > 20


def record(number: int) -> BadSample:
    return BadSample(shard="set/a.tar", key=None, sample_id=number, position=0, reason="test")


def test_a_few_bad_samples_are_always_allowed() -> None:
    quarantine = Quarantine(max_bad_frac=0.01, world_size=1)
    quarantine.seen(20)

    for number in range(ALLOWED_BAD):
        quarantine.add(record(number))
    with pytest.raises(BadDataError, match=r"17 of 20.*max_bad_frac 0.01.*set/a.tar: test"):
        quarantine.add(record(99))


def test_a_part_of_many_samples_is_allowed() -> None:
    quarantine = Quarantine(max_bad_frac=0.01, world_size=1)
    quarantine.seen(3000)

    for number in range(30):
        quarantine.add(record(number))
    with pytest.raises(BadDataError, match="31 of 3000"):
        quarantine.add(record(30))
    assert len(quarantine.records()) == 31


def test_more_pixels_than_the_bound_are_bad_whatever_the_header_says() -> None:
    width, height = size_of(1)
    data = bytes_of(picture(1))

    found = looked_at(data, width=width, height=height, orientation=1, max_pixels=1_000)

    assert found == f"{width} x {height} pixels, more than data.max_pixels 1,000"


def test_what_is_no_image_is_bad() -> None:
    assert looked_at(bytes_of(b"<html>" * 50), width=9, height=9, orientation=1) is not None
