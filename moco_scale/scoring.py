"""What features are worth: neighbours, probes and prototypes on labelled images, and intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moco_scale.knn import nearest, vote
from moco_scale.probe import PENALTIES, fit_logistic

Right = NDArray[np.float32]
"""Of N images: 1 right, 0 wrong, between them in part of several draws, NaN not tested."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examples:
    """Labelled images that can be scored: one set, or one to learn from and one to be tested on."""

    labels: Tensor
    """N class numbers."""
    num_classes: int
    matches: Tensor
    """N numbers: a find in retrieval is right where they are equal."""
    num_train: int
    """The first so many are learnt from and the others tested; all N: each image is left out in
    its turn, and what learns more than neighbours splits them."""

    @property
    def is_one_set(self) -> bool:
        return self.num_train == len(self.labels)


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which images are learnt from, and which tested: places among the examples."""

    train: Tensor
    test: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Near:
    """The nearest of each tested image."""

    first: int
    """Place of the first tested image; the others follow."""
    cosines: Tensor
    """M x k, descending."""
    places: Tensor
    """M x k places among the examples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageTable:
    """All images whose features are there: those learnt from, and after them those tested."""

    examples: Examples
    by_name: dict[str, Tensor]
    """N x D, on the device."""
    sample_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    splits: list[Split]


def splits(examples: Examples, *, test_frac: float, seeds: Sequence[int]) -> list[Split]:
    """The given split, or one for each seed that keeps a part of every class for the test.

    A class of one image is learnt from only.
    """
    if not examples.is_one_set:
        every = torch.arange(len(examples.labels))
        return [Split(train=every[: examples.num_train], test=every[examples.num_train :])]
    return [_stratified(examples.labels.cpu().numpy(), test_frac, seed) for seed in seeds]


def _stratified(labels: NDArray[np.int64], test_frac: float, seed: int) -> Split:
    draw = np.random.default_rng(seed)
    is_test = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = draw.permutation(np.flatnonzero(labels == label))
        count = min(max(1, round(test_frac * len(members))), len(members) - 1)
        is_test[members[:count]] = True
    return Split(
        train=torch.from_numpy(np.flatnonzero(~is_test)),
        test=torch.from_numpy(np.flatnonzero(is_test)),
    )


def find_nearest(features: Tensor, examples: Examples, k: int) -> Near:
    """See `nearest`: within the one set, or of the tested images among those learnt from."""
    unit = functional.normalize(features, dim=1)
    if examples.is_one_set:
        cosines, places = nearest(unit, k)
        return Near(first=0, cosines=cosines, places=places)
    learnt = unit[: examples.num_train]
    cosines, places = nearest(unit[examples.num_train :], k, gallery=learnt)
    return Near(first=examples.num_train, cosines=cosines, places=places)


def knn(
    near: Near, examples: Examples, *, k: int, temperature: float
) -> tuple[Right, Tensor, Tensor]:
    """Right or not; the guess of each tested image, and the guess's part of the votes."""
    guesses, share = vote(
        near.cosines, examples.labels[near.places], k=k, temperature=temperature,
        num_classes=examples.num_classes,
    )  # fmt: skip
    return _right(guesses == examples.labels[near.first :], near.first), guesses, share


def recall(near: Near, examples: Examples, *, k: int) -> Right:
    """Whether one of the first k finds matches; NaN for images that nothing could match."""
    wanted = examples.matches[near.first :]
    within = examples.matches[: examples.num_train]
    found = (examples.matches[near.places[:, :k]] == wanted[:, None]).any(1)
    number = torch.bincount(within, minlength=int(examples.matches.max()) + 1)[wanted]
    right = _right(found, near.first)
    right[near.first :][(number <= examples.is_one_set).cpu().numpy()] = np.nan
    return right


def linear(features: Tensor, examples: Examples, split: Split) -> Right:
    """Logistic regression by L-BFGS on the features as they are."""
    device = features.device
    train, test = split.train.to(device), split.test.to(device)
    fitted = fit_logistic(
        features[train], examples.labels[train], penalties=PENALTIES,
        num_classes=examples.num_classes,
    )  # fmt: skip
    guesses = fitted(features[test]).argmax(1)
    return on_split(guesses == examples.labels[test], split, len(examples.labels))


def few_shot(
    features: Tensor, examples: Examples, split: Split, *, shots: int, draws: int, seed: int
) -> Right:
    """The nearest class mean of a few images (Snell et al. 2017), by cosine; mean of some draws.

    A class with fewer images in the training part gives all it has.
    """
    unit = functional.normalize(features, dim=1)
    labels = examples.labels.cpu().numpy()
    train = split.train.numpy()
    test = split.test.to(features.device)
    right = torch.zeros(len(test), device=features.device)
    for draw in range(draws):
        order = train[np.random.default_rng((seed, shots, draw)).permutation(len(train))]
        by_class = order[np.argsort(labels[order], kind="stable")]
        rank = np.arange(len(order)) - np.searchsorted(labels[by_class], labels[by_class])
        chosen = torch.from_numpy(by_class[rank < shots]).to(features.device)
        means = torch.zeros(examples.num_classes, unit.shape[1], device=unit.device)
        means.index_add_(0, examples.labels[chosen], unit[chosen])
        cosines = unit[test] @ functional.normalize(means, dim=1).T
        seen = torch.zeros(examples.num_classes, dtype=torch.bool, device=unit.device)
        seen[examples.labels[chosen]] = True
        cosines[:, ~seen] = -torch.inf
        right += cosines.argmax(1) == examples.labels[test]
    return on_split(right / draws, split, len(labels))


def on_split(right: Tensor, split: Split, count: int) -> Right:
    """The tested images' answers at their places, NaN elsewhere."""
    found = np.full(count, np.nan, dtype=np.float32)
    found[split.test.numpy()] = right.float().cpu().numpy()
    return found


def _right(right: Tensor, first: int) -> Right:
    untested = np.full(first, np.nan, dtype=np.float32)
    return np.concatenate([untested, right.float().cpu().numpy()])


def paired_interval(
    better: NDArray[np.generic], worse: NDArray[np.generic], *, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean of better - worse over images, with its 95 % bootstrap interval (images resampled).

    Args:
        better, worse: M, or S x M for S seeds; 1 or true is right. An image weighs as many seeds as
            tested it, those where both are known.
    """
    difference = np.atleast_2d(better.astype(np.float64) - worse.astype(np.float64))
    known = ~np.isnan(difference)
    weights, sums = known.sum(0), np.where(known, difference, 0).sum(0)
    sums, weights = sums[weights > 0], weights[weights > 0]
    draw = np.random.default_rng(seed)
    means = []
    for _ in range(resamples):
        drawn = draw.integers(0, len(sums), len(sums))
        means.append(sums[drawn].sum() / weights[drawn].sum())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / weights.sum()), float(low), float(high)
