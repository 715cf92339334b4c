"""What lies together in features: spherical k-means, and pairs above a cosine.

Features are N x D, unit length. Memory beside them is bounded, whatever N and however alike they
are; nothing is approximated.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_ROWS = 2048
"""Rows and columns of the block of cosines that is held at a time: 16 MiB."""
_ROUNDS = 50
_SEEDED_FROM = 65_536


@dataclass(frozen=True, kw_only=True, slots=True)
class Clusters:
    """A partition of the rows; clusters are numbered by size, the largest is 0."""

    of: Tensor
    """N numbers of clusters."""
    cosine: Tensor
    """N cosines with the centre of the own cluster."""
    sizes: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class NearPairs:
    """Pairs of rows whose cosine is at least a threshold."""

    count: int
    """All of them."""
    rows: Tensor
    """M x 2, first < second: of the pairs those with the highest cosine, highest first."""
    cosine: Tensor
    """M"""
    nearest: Tensor
    """N cosines of each row with the row nearest to it; -1 for an only row."""


@torch.inference_mode()
def spherical_kmeans(features: Tensor, *, num_clusters: int, seed: int) -> Clusters:
    """k-means on the sphere (Dhillon and Modha 2001), begun by k-means++; the same for one seed.

    A cluster that runs empty takes the row that is farthest from its centre; it stays empty only
    where fewer rows differ than there are clusters.
    """
    count = len(features)
    num_clusters = min(num_clusters, count)
    centres = _first_centres(features, num_clusters, seed=seed)
    before = torch.full((count,), -1, device=features.device)
    for _ in range(_ROUNDS):
        of, cosine = _assign(features, centres)
        sizes = torch.bincount(of, minlength=num_clusters)
        for empty in (sizes == 0).nonzero().flatten().tolist():
            farthest = int(cosine.argmin())
            of[farthest], cosine[farthest] = empty, 1.0
        if torch.equal(of, before):
            break
        before = of
        sums = torch.zeros_like(centres).index_add_(0, of, features)
        centres = functional.normalize(sums, dim=1)
    sizes = torch.bincount(of, minlength=num_clusters)
    order = torch.argsort(sizes, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(num_clusters, device=order.device)
    return Clusters(of=rank[of], cosine=cosine, sizes=sizes[order].tolist())


@torch.inference_mode()
def near_pairs(
    features: Tensor,
    *,
    threshold: float,
    keep: int,
    progress: Callable[[int, int], None] = lambda _done, _of: None,
) -> NearPairs:
    """Every pair is looked at, a block of cosines at a time.

    Args:
        keep: at most so many pairs are returned.
        progress: called with the blocks done and all of them.
    """
    count, device = len(features), features.device
    nearest = torch.full((count,), -1.0, device=device)
    kept = _Kept(keep, device)
    total = done = 0
    starts = range(0, count, _ROWS)
    blocks = len(starts) * (len(starts) + 1) // 2
    for top in starts:
        rows = features[top : top + _ROWS]
        for left in range(top, count, _ROWS):
            cosines = rows @ features[left : left + _ROWS].T
            if left == top:  # each pair once, and no row with itself
                above = torch.ones_like(cosines, dtype=torch.bool).triu_(diagonal=1)
                cosines.masked_fill_(~above, -torch.inf)
            largest = cosines.amax(1)
            for start, of_each in ((top, largest), (left, cosines.amax(0))):
                here = nearest[start : start + len(of_each)]
                torch.maximum(here, of_each, out=here)
            if float(largest.max()) >= threshold:
                total += kept.add(cosines, top, left, threshold=threshold)
            done += 1
            progress(done, blocks)
    rows, cosine = kept.best()
    return NearPairs(
        count=total, rows=rows, cosine=cosine.clamp(max=1.0), nearest=nearest.clamp(max=1.0)
    )


class _Kept:
    """The pairs with the highest cosines so far."""

    def __init__(self, keep: int, device: torch.device) -> None:
        self._keep = keep
        self._rows = torch.zeros((0, 2), dtype=torch.int64, device=device)
        self._cosine = torch.zeros(0, device=device)
        self._floor = -torch.inf

    def add(self, cosines: Tensor, top: int, left: int, *, threshold: float) -> int:
        """Look at a block; how many of its pairs are above the threshold."""
        found = cosines >= threshold
        count = int(torch.count_nonzero(found))
        # What is below all that are kept would only be thrown away again.
        places = (found & (cosines > self._floor)).nonzero()
        offset = torch.tensor([top, left], device=places.device)
        self._rows = torch.cat([self._rows, places + offset])
        self._cosine = torch.cat([self._cosine, cosines[places[:, 0], places[:, 1]]])
        if len(self._cosine) > 2 * self._keep:
            self._trim()
        return count

    def best(self) -> tuple[Tensor, Tensor]:
        self._trim()
        return self._rows, self._cosine

    def _trim(self) -> None:
        by_row = torch.argsort(self._rows[:, 0] << 32 | self._rows[:, 1])
        order = by_row[torch.argsort(self._cosine[by_row], descending=True, stable=True)]
        order = order[: self._keep]
        self._rows, self._cosine = self._rows[order], self._cosine[order]
        if len(order) == self._keep:
            self._floor = float(self._cosine[-1])


def _first_centres(features: Tensor, num_clusters: int, *, seed: int) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each drawn by its distance from those before."""
    draw = torch.Generator().manual_seed(seed)
    if len(features) > _SEEDED_FROM:
        chosen = torch.randperm(len(features), generator=draw)[:_SEEDED_FROM].sort().values
        features = features[chosen.to(features.device)]
    first = int(torch.randint(len(features), (1,), generator=draw))
    chosen_rows = [first]
    distance = 1 - features @ features[first]
    while len(chosen_rows) < num_clusters:
        weights = distance.clamp(min=0).double().cpu()
        if float(weights.sum()) == 0:  # fewer different rows than clusters
            weights = torch.ones_like(weights)
        weights[chosen_rows] = 0
        # Not multinomial, which takes at most 2^24 weights.
        ends = weights.cumsum(0)
        at = float(torch.rand(1, generator=draw, dtype=torch.float64)) * float(ends[-1])
        chosen_rows.append(min(int(torch.searchsorted(ends, at, right=True)), len(features) - 1))
        distance = torch.minimum(distance, 1 - features @ features[chosen_rows[-1]])
    return features[chosen_rows].clone()


def _assign(features: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    parts = [(part @ centres.T).max(dim=1) for part in torch.split(features, _ROWS)]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])
