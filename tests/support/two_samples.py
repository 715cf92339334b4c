"""Whether two samples of views come from one distribution: features, a small classifier, KS."""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn


def features(views: NDArray[np.uint8]) -> NDArray[np.float64]:
    """N x 19 figures of N x S x S x 3 views: colours, contrast, sharpness, clipping."""
    return np.array([_features(view) for view in views])


def _features(view: NDArray[np.uint8]) -> list[float]:
    pixels = view.reshape(-1, 3).astype(np.float64)
    luma = np.asarray(cv2.cvtColor(view, cv2.COLOR_RGB2GRAY), dtype=np.float64)
    spread = np.ptp(pixels, axis=1)
    saturation = spread / np.maximum(pixels.max(axis=1), 1)
    laplacian = luma[1:-1, 1:-1] * 4 - luma[:-2, 1:-1] - luma[2:, 1:-1]
    laplacian -= luma[1:-1, :-2] + luma[1:-1, 2:]
    return [
        *pixels.mean(axis=0),
        *pixels.std(axis=0),
        float(luma.mean()),
        float(luma.std()),
        float(saturation.mean()),
        float(saturation.std()),
        float(np.log1p(np.abs(np.diff(luma, axis=0)).mean())),
        float(np.log1p(np.abs(np.diff(luma, axis=1)).mean())),
        float(np.log1p(np.abs(laplacian).mean())),
        float(spread.max() <= 2),  # gray
        float((view == 0).mean()),
        float((view == 255).mean()),
        float(spread.mean()),
        *_hue(pixels),
    ]


def _hue(pixels: NDArray[np.float64]) -> tuple[float, float]:
    """Where the mean colour lies on the circle of hues, as a point on it; 0, 0 for gray."""
    red, green, blue = pixels.mean(axis=0)
    across, up = red - (green + blue) / 2, (green - blue) * 0.75**0.5
    length = np.hypot(across, up)
    return (float(across / length), float(up / length)) if length > 1 else (0.0, 0.0)


def classifier_auc(one: NDArray[np.float64], other: NDArray[np.float64], *, seed: int) -> float:
    """How well a small network tells the two apart: area under the ROC curve, 0.5 for not at all.

    Each half is judged by a network that learnt from the other half; the mean of both. Where both
    are of one distribution, it deviates by about 0.009 at 2,048 each.
    """
    inputs = np.concatenate([one, other])
    inputs = (inputs - inputs.mean(axis=0)) / (inputs.std(axis=0) + 1e-9)
    labels = np.repeat([0.0, 1.0], [len(one), len(other)])
    half = np.random.default_rng(seed).permutation(len(inputs)) % 2 == 0
    return float(
        np.mean(
            [
                _auc(_scores(inputs[train], labels[train], inputs[~train], seed), labels[~train])
                for train in (half, ~half)
            ]
        )
    )


def _scores(
    inputs: NDArray[np.float64],
    labels: NDArray[np.float64],
    judged: NDArray[np.float64],
    seed: int,
) -> NDArray[np.float32]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(inputs.shape[1], 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=1e-2)
    x, y = torch.from_numpy(inputs).float(), torch.from_numpy(labels).float()
    for _ in range(150):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(network(x)[:, 0], y)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        scores: NDArray[np.float32] = network(torch.from_numpy(judged).float())[:, 0].numpy()
    return scores


def _auc(scores: NDArray[np.float32], labels: NDArray[np.float64]) -> float:
    """The Mann-Whitney statistic over the number of pairs; scores hardly ever tie."""
    rank = np.empty(len(scores))
    rank[np.argsort(scores)] = np.arange(1, len(scores) + 1)
    positive = labels == 1
    count = positive.sum()
    return float((rank[positive].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


def ks(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Two-sample Kolmogorov-Smirnov statistic."""
    grid = np.unique(np.concatenate([one, other]))
    ours = np.searchsorted(np.sort(one), grid, side="right") / len(one)
    theirs = np.searchsorted(np.sort(other), grid, side="right") / len(other)
    return float(np.abs(ours - theirs).max())


def ks_critical(count: int) -> float:
    """What the statistic of two samples of `count` each exceeds in 1 % of the cases."""
    return float(1.628 * (2 / count) ** 0.5)
