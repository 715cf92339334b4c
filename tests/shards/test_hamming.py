"""Hashes near a kept one: exactly what comparing all with all finds."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from shards import hamming
from shards.hamming import KEPT, keep_first

Words = NDArray[np.uint64]


def compare_all(hashes: Words, ranks: Words, distance: int) -> tuple[Words, Words]:
    first = np.full(len(hashes), KEPT)
    away = np.zeros(len(hashes), dtype=np.uint8)
    kept: list[int] = []
    for one in np.argsort(ranks).tolist():
        bits = np.bitwise_count(hashes[kept] ^ hashes[one])
        near = np.flatnonzero(bits <= distance)
        if len(near):
            first[one], away[one] = ranks[kept[near[0]]], bits[near[0]]
        else:
            kept.append(one)
    return first, away


def flipped(rng: np.random.Generator, hashes: Words, times: int) -> Words:
    for _ in range(times):
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, len(hashes), dtype=np.uint64))
    return hashes


def check(hashes: Words, *, distance: int, folder: Path, seed: int = 0) -> Words:
    hashes = np.unique(hashes)
    ranks = np.random.default_rng(seed).permutation(len(hashes)).astype(np.uint64)
    folder.mkdir()

    first, away = keep_first(hashes, ranks, distance=distance, scratch=folder, threads=2)

    expected, bits = compare_all(hashes, ranks, distance)
    assert first.tolist() == expected.tolist()
    assert away[first != KEPT].tolist() == bits[first != KEPT].tolist()
    return first


@pytest.mark.parametrize("distance", range(17))
def test_every_distance_finds_all_and_no_more(distance: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(distance)
    base = rng.integers(0, 2**64, 60, dtype=np.uint64)
    clusters = [flipped(rng, np.repeat(base, 5), times) for times in range(distance + 2)]

    first = check(np.concatenate([base, *clusters]), distance=distance, folder=tmp_path / "f")

    assert (first == KEPT).any()
    assert (first != KEPT).any() or distance == 0


@pytest.mark.parametrize("rows", [100, 1024])
@pytest.mark.parametrize("few", [8, 4096])
def test_parts_and_halves_change_nothing(
    rows: int, few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hamming, "_ROWS", rows)
    monkeypatch.setattr(hamming, "_FEW", few)
    monkeypatch.setattr(hamming, "_MOST_PAIRS", 300)
    monkeypatch.setattr(hamming, "_SMALL_BUCKET", 4)
    rng = np.random.default_rng(rows)
    dense = flipped(rng, np.zeros(600, dtype=np.uint64), 6)
    sparse = rng.integers(0, 2**64, 800, dtype=np.uint64)
    near = flipped(rng, sparse[:300], 5)

    check(np.concatenate([dense, sparse, near]), distance=5, folder=tmp_path / "f")


def test_a_dense_heap_of_hashes_is_no_quadratic_work(tmp_path: Path) -> None:
    """Its near pairs are 8e7, which the limit on pairs does not hold."""
    rng = np.random.default_rng(1)
    hashes = np.unique(flipped(rng, np.zeros(16_000, dtype=np.uint64), 4))
    assert len(hashes) > 12_000
    told: list[tuple[int, int]] = []

    first, _ = keep_first(
        hashes,
        np.arange(len(hashes), dtype=np.uint64),
        distance=8,
        scratch=tmp_path,
        threads=2,
        progress=lambda done, total: told.append((done, total)),
    )

    assert np.count_nonzero(first == KEPT) == 1
    assert told[-1][0] <= told[-1][1]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_hashes(count: int, tmp_path: Path) -> None:
    check(np.arange(count, dtype=np.uint64), distance=3, folder=tmp_path / "f")
