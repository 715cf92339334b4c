"""Neighbours, few shots, baselines and intervals, against values worked out by hand or plainly."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from moco_scale import baselines
from moco_scale.knn import knn_correct, nearest, vote
from moco_scale.scoring import (
    Examples,
    few_shot,
    find_nearest,
    paired_interval,
    recall,
    splits,
)
from pipelines import IMAGE_MEAN, IMAGE_STD


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


def test_seeds_that_did_not_test_an_image_say_nothing_about_it() -> None:
    unknown = np.nan
    better = np.array([[1, unknown, 0, unknown], [1, 1, unknown, unknown]], dtype=np.float32)
    worse = np.array([[0, unknown, 0, unknown], [1, 0, unknown, unknown]], dtype=np.float32)

    mean, low, high = paired_interval(better, worse, resamples=100, seed=0)

    assert mean == pytest.approx((1 + 0 + 1 + 0) / 4)
    assert 0 <= low <= mean <= high <= 1


def examples(labels: list[int], *, num_train: int | None = None) -> Examples:
    truth = torch.tensor(labels)
    return Examples(
        labels=truth,
        num_classes=int(truth.max()) + 1,
        matches=truth,
        num_train=len(labels) if num_train is None else num_train,
    )


def on_a_circle(*angles: float) -> torch.Tensor:
    turned = torch.tensor(angles)
    return torch.stack([turned.cos(), turned.sin()], dim=1)


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_neighbours_do_not_depend_on_how_many_are_looked_for_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(0)
    features = functional.normalize(torch.randn(23, 4, generator=draw), dim=1)
    gallery = functional.normalize(torch.randn(11, 4, generator=draw), dim=1)
    monkeypatch.setattr("moco_scale.knn._SIMILARITIES_AT_ONCE", at_once * 23)

    _, within = nearest(features, 5)
    _, across = nearest(features, 50, gallery=gallery)

    similarity = features @ features.T
    similarity.fill_diagonal_(-2)
    assert torch.equal(within, similarity.argsort(dim=1, descending=True)[:, :5])
    assert torch.equal(across, (features @ gallery.T).argsort(dim=1, descending=True))


def test_votes_weigh_by_cosine_and_temperature() -> None:
    cosines, voters = torch.tensor([[0.9, 0.8, 0.8]]), torch.tensor([[1, 0, 0]])

    cold, share = vote(cosines, voters, k=3, temperature=0.01, num_classes=2)
    warm, _ = vote(cosines, voters, k=3, temperature=1.0, num_classes=2)
    one, all_of_it = vote(cosines, voters, k=1, temperature=1.0, num_classes=2)

    assert (cold.item(), warm.item(), one.item()) == (1, 0, 1)
    assert share.item() == pytest.approx(1 / (1 + 2 * np.exp(-10)))
    assert all_of_it.item() == 1.0


def test_recall_counts_images_that_something_could_match() -> None:
    near = find_nearest(on_a_circle(0.0, 0.1, 0.12, 3.0), examples([0, 1, 0, 2]), 3)

    first, second = (recall(near, examples([0, 1, 0, 2]), k=k) for k in (1, 2))

    # Images 0 and 2 are each other's second nearest; 1 and 3 are alone in their classes.
    assert first.tolist()[::2] == [0, 0]
    assert second.tolist()[::2] == [1, 1]
    assert np.isnan(first[[1, 3]]).all()


def test_recall_across_sets_looks_only_at_those_to_be_found() -> None:
    both = examples([0, 1, 0, 1, 2], num_train=2)
    near = find_nearest(on_a_circle(0.0, 3.0, 0.1, 0.2, 0.0), both, 10)

    right = recall(near, both, k=1)

    assert np.isnan(right[[0, 1, 4]]).all()  # not tested, not tested, nothing of its class
    assert right[[2, 3]].tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_a_split_keeps_a_part_of_every_class(seed: int) -> None:
    labels = [0] * 10 + [1] * 2 + [2]

    (split,) = splits(examples(labels), test_frac=0.2, seeds=(seed,))

    tested = np.array(labels)[split.test.numpy()]
    assert np.bincount(tested, minlength=3).tolist() == [2, 1, 0]
    together = torch.cat([split.train, split.test]).sort().values
    assert torch.equal(together, torch.arange(13))


def test_few_shots_name_the_nearest_mean() -> None:
    features = on_a_circle(0.0, 0.2, 0.1, 2.0, 2.2, 1.0)
    both = examples([0, 0, 0, 1, 1, 0], num_train=5)
    (split,) = splits(both, test_frac=0.5, seeds=(0, 1))

    right = few_shot(features, both, split, shots=3, draws=2, seed=0)

    # The mean of class 0 lies at 0.1, of class 1 (which has two images) at 2.1: 1.0 is nearer 0.1.
    assert right[5] == 1
    assert np.isnan(right[:5]).all()
    assert few_shot(features, both, split, shots=1, draws=2, seed=0)[5] in (0, 0.5, 1)


def unit_images(count: int, *, seed: int) -> tuple[torch.Tensor, np.ndarray]:  # type: ignore[type-arg]  # of float
    """Normalised views of 64 pixels, and the same as N x 64 x 64 x 3 from 0 to 1."""
    unit = np.random.default_rng(seed).random((count, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
    normalised = (unit - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    return torch.from_numpy(normalised.transpose(0, 3, 1, 2)).float(), unit


def test_pixels_are_the_view_at_16_pixels() -> None:
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).reshape(2, 3, 32, 32)

    features = baselines.pixels(images)

    assert features.shape == (2, 768)
    assert features[0, 0] == images[0, 0, :2, :2].mean()


def test_a_colour_histogram_is_numpys() -> None:
    images, unit = unit_images(2, seed=0)

    features = baselines.colour_histogram(images)

    for found, pixels in zip(features, unit, strict=True):
        counts, _ = np.histogramdd(pixels.reshape(-1, 3), bins=8, range=[(0, 1)] * 3)
        np.testing.assert_allclose(found.square().numpy(), counts.ravel() / 64**2, atol=2e-3)


def test_hog_is_that_of_a_plain_loop() -> None:
    images, unit = unit_images(1, seed=1)
    luma = unit[0] @ np.array([0.299, 0.587, 0.114])
    padded = np.pad(luma, 1, mode="edge")
    cells = np.zeros((8, 8, 9))
    for y in range(64):
        for x in range(64):
            across = padded[y + 1, x + 2] - padded[y + 1, x]
            down = padded[y + 2, x + 1] - padded[y, x + 1]
            place = (np.arctan2(down, across) % np.pi) / np.pi * 9 - 0.5
            low, strength = int(np.floor(place)), np.hypot(across, down)
            cells[y // 8, x // 8, low % 9] += strength * (1 - (place - low)) / 64
            cells[y // 8, x // 8, (low + 1) % 9] += strength * (place - low) / 64
    expected = []
    for y in range(7):
        for x in range(7):
            block = cells[y : y + 2, x : x + 2].transpose(2, 0, 1).ravel()
            block = np.minimum(block / np.sqrt((block**2).sum() + 1e-5), 0.2)
            expected.append(block / np.sqrt((block**2).sum() + 1e-5))

    features = baselines.hog(images)

    assert features.shape == (1, 1764)
    np.testing.assert_allclose(features[0].numpy(), np.concatenate(expected), atol=1e-4)


def test_a_view_without_an_edge_has_no_gradients() -> None:
    assert baselines.hog(torch.full((2, 3, 48, 48), 0.3)).abs().max() < 1e-3
