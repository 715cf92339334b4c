"""Figures about embeddings, on embeddings whose figures are known."""

import math

import pytest
import torch
from torch.nn import functional

from moco_scale.health import embedding_health


def unit(count: int, dim: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(count, dim, generator=generator), dim=1)


def test_collapsed_embeddings_show_it() -> None:
    point = unit(1, 16).expand(64, 16)

    found = embedding_health(point, point, unit(100, 16, seed=1).T)

    assert found["alignment"] == pytest.approx(0, abs=1e-6)
    assert found["uniformity"] == pytest.approx(0, abs=1e-3)
    assert found["effective_rank"] == pytest.approx(1, abs=0.01)


def test_spread_embeddings_use_all_directions() -> None:
    spread = torch.eye(16).repeat(4, 1)

    found = embedding_health(spread, -spread, None)

    assert found["effective_rank"] == pytest.approx(16)
    assert found["alignment"] == pytest.approx(4)
    # Of 63 others, 3 are the same and 60 at a squared distance of 2.
    assert found["uniformity"] == pytest.approx(math.log((3 + 60 * math.exp(-4)) / 63), abs=1e-5)
    assert "duplicate_key_frac" not in found


def test_keys_with_a_twin_in_the_queue_are_counted() -> None:
    keys = unit(64, 32)
    queue = torch.cat([unit(500, 32, seed=1), keys[:16]]).T

    assert embedding_health(keys, keys, queue)["duplicate_key_frac"] == 0.25


def test_queries_alone_have_the_figures_that_need_no_key() -> None:
    assert set(embedding_health(unit(8, 4), None, None)) == {"uniformity", "effective_rank"}
