"""kNN, the paired interval and the join of labels, against values worked out by hand."""

import numpy as np
import pytest
import torch

from moco_scale.evaluate import knn_correct, paired_interval, pixel_features


def test_knn_counts_weighted_votes_and_leaves_the_image_itself_out() -> None:
    angles = torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1, 0.15])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = np.array([0, 0, 0, 1, 1, 1])

    right = knn_correct(features, labels, ks=(1, 3), temperature=0.1)

    # The last image lies among class 0; the one at 0.2 has it as its nearest neighbour.
    assert right[1].tolist() == [True, False, False, True, True, False]
    assert right[3].tolist() == [True, True, True, True, True, False]


def test_a_k_beyond_the_set_takes_all_others() -> None:
    features = torch.eye(4)
    labels = np.array([0, 0, 0, 1])

    right = knn_correct(features, labels, ks=(100,), temperature=0.1)

    assert right[100].tolist() == [True, True, True, False]


def test_paired_interval_covers_the_mean_and_is_narrow_for_equal_answers() -> None:
    draw = np.random.default_rng(0)
    worse = draw.random(2000) < 0.70
    better = worse | (draw.random(2000) < 0.10)

    mean, low, high = paired_interval(better, worse, resamples=500, seed=1)

    assert mean == pytest.approx(better.mean() - worse.mean())
    assert 0 < low < mean < high
    assert high - low < 0.02  # unpaired it would be about 0.055
    assert paired_interval(worse, worse, resamples=10, seed=0) == (0.0, 0.0, 0.0)


def test_seeds_are_averaged_image_by_image() -> None:
    better = np.array([[True, True, False], [True, False, False]])
    worse = np.array([[False, True, False], [False, False, False]])

    mean, _, _ = paired_interval(better, worse, resamples=10, seed=0)

    assert mean == pytest.approx(1 / 3)


def test_pixel_features_are_the_view_at_16_pixels() -> None:
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).reshape(2, 3, 32, 32)

    features = pixel_features(images)

    assert features.shape == (2, 768)
    assert features[0, 0] == images[0, 0, :2, :2].mean()
