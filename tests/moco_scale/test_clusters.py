"""Spherical k-means and pairs above a cosine, against all pairs written out plainly."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moco_scale import clusters
from moco_scale.clusters import near_pairs, spherical_kmeans


def unit(*, count: int, dim: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, dim, generator=draw), dim=1)


def around(centres: Tensor, *, each: int, spread: float) -> Tensor:
    """Rows around centres, one after another by turns."""
    draw = torch.Generator().manual_seed(1)
    rows = centres.repeat(each, 1)
    return functional.normalize(rows + spread * torch.randn(rows.shape, generator=draw), dim=1)


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.9])
def test_pairs_are_those_of_the_whole_matrix_whatever_the_block(
    count: int, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "_ROWS", 8)
    features = unit(count=count, dim=4, seed=count)
    cosines = features.double() @ features.double().T
    above = {
        (i, j): float(cosines[i, j])
        for i in range(count)
        for j in range(i + 1, count)
        if cosines[i, j] >= threshold
    }

    found = near_pairs(features, threshold=threshold, keep=1000)

    assert found.count == len(above)
    assert {tuple(pair) for pair in found.rows.tolist()} == set(above)
    assert found.cosine.tolist() == pytest.approx(sorted(above.values(), reverse=True), abs=1e-6)
    others = cosines.masked_fill(torch.eye(count, dtype=torch.bool), -1)
    torch.testing.assert_close(found.nearest.double(), others.amax(1), rtol=0, atol=1e-6)


def test_the_nearest_pairs_are_kept_and_all_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "_ROWS", 8)
    features = unit(count=60, dim=4, seed=0)
    everything = near_pairs(features, threshold=0.5, keep=10_000)

    few = near_pairs(features, threshold=0.5, keep=10)

    assert few.count == everything.count > 100
    assert few.cosine.tolist() == everything.cosine[:10].tolist()
    assert few.rows.tolist() == everything.rows[:10].tolist()


def test_a_collapsed_encoder_takes_no_more_memory_than_what_is_kept() -> None:
    features = functional.normalize(torch.ones(3000, 2), dim=1)

    found = near_pairs(features, threshold=0.98, keep=100)

    assert found.count == 3000 * 2999 // 2
    assert len(found.rows) == 100
    assert float(found.cosine.max()) <= 1.0


def test_progress_counts_every_block() -> None:
    told: list[tuple[int, int]] = []

    near_pairs(
        unit(count=5000, dim=2, seed=0),
        threshold=0.999999,
        keep=1,
        progress=lambda done, of: told.append((done, of)),
    )

    assert told == [(n, 6) for n in range(1, 7)]


def test_kmeans_finds_groups_that_are_apart_and_numbers_them_by_size() -> None:
    centres = torch.eye(5)
    features = torch.cat([around(centres, each=20, spread=0.05), centres[:1].repeat(7, 1)])

    found = spherical_kmeans(features, num_clusters=5, seed=3)

    assert found.sizes == [27, 20, 20, 20, 20]
    for group in range(5):
        members = found.of[group:100:5]
        assert len(set(members.tolist())) == 1
    assert set(found.of[100:].tolist()) == {0} == {int(found.of[0])}
    assert float(found.cosine.min()) > 0.95


def test_kmeans_gives_the_same_for_the_same_seed_and_leaves_no_cluster_empty() -> None:
    features = unit(count=300, dim=8, seed=2)

    one, two = (spherical_kmeans(features, num_clusters=40, seed=9) for _ in range(2))

    assert torch.equal(one.of, two.of)
    assert sum(one.sizes) == 300
    assert min(one.sizes) > 0


@pytest.mark.parametrize("count", [1, 3])
def test_more_clusters_than_rows_are_as_many_as_rows(count: int) -> None:
    found = spherical_kmeans(unit(count=count, dim=4, seed=0), num_clusters=9, seed=0)

    assert found.sizes == [1] * count


def test_equal_rows_are_no_trouble() -> None:
    found = spherical_kmeans(torch.ones(50, 4) / 2, num_clusters=4, seed=0)

    assert sum(found.sizes) == 50
