"""kNN on labelled images: the nearest, their votes, and a score while training."""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from moco_scale.distributed import Ranks, all_gather_rows
from moco_scale.encoders import pooled_features
from moco_scale.errors import EvaluationError
from moco_scale.labels import join_labels
from pipelines import iterate_once
from shards import ShardSet

_SIMILARITIES_AT_ONCE = 2**26
_NEIGHBOURS, _TEMPERATURE, _BATCH = 20, 0.1, 256


def nearest(features: Tensor, k: int, *, gallery: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and places of each row's nearest in the gallery, the nearest first: M x k each.

    Args:
        features: M x D, unit length.
        k: at most so many; there may be fewer.
        gallery: N x D, unit length; None: the features, an image not being its own neighbour.
    """
    within = features if gallery is None else gallery
    found = min(k, len(within) - (gallery is None))
    cosines, places = [], []
    rows_at_once = max(1, _SIMILARITIES_AT_ONCE // len(within))
    for start in range(0, len(features), rows_at_once):
        similarity = features[start : start + rows_at_once] @ within.T
        if gallery is None:
            rows = torch.arange(len(similarity), device=similarity.device)
            similarity[rows, start + rows] = -torch.inf
        top, place = similarity.topk(found, dim=1)
        cosines.append(top)
        places.append(place)
    return torch.cat(cosines), torch.cat(places)


def vote(
    cosines: Tensor, voters: Tensor, *, k: int, temperature: float, num_classes: int
) -> tuple[Tensor, Tensor]:
    """The class with most votes, and its part of all votes (Wu et al. 2018, section 3.4): M each.

    Args:
        cosines: M x K of the nearest, as `nearest` gives them.
        voters: M x K class numbers of those.
        k: how many of them vote.
        temperature: a vote weighs exp(cosine / temperature).
    """
    # Against the nearest one's, so that no temperature overflows.
    weights = ((cosines[:, :k] - cosines[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes).scatter_add_(1, voters[:, :k], weights)
    most, guesses = votes.max(1)
    return guesses, most / weights.sum(1)


def knn_correct(
    features: Tensor, labels: NDArray[np.int64], *, ks: tuple[int, ...], temperature: float
) -> dict[int, NDArray[np.bool_]]:
    """Leave-one-out weighted kNN: for each k, whether each of the M images is classified right.

    Args:
        features: M x D, unit length.
        labels: M class numbers.
        ks: numbers of neighbours; a k above M - 1 takes all others.
        temperature: a neighbour's vote is exp(cosine / temperature).
    """
    truth = torch.as_tensor(labels, device=features.device)
    cosines, places = nearest(features, max(ks))
    classes = int(labels.max()) + 1
    right = {}
    for k in ks:
        guesses, _ = vote(cosines, truth[places], k=k, temperature=temperature, num_classes=classes)
        right[k] = (guesses == truth).cpu().numpy()
    return right


class OnlineKnn:
    """Scores an encoder on some labelled images while it trains; all ranks take their part."""

    def __init__(
        self,
        shard_set: ShardSet,
        labels: str,
        *,
        num_images: int,
        view_size: int,
        loader: Literal["auto", "dali", "cpu"],
        ranks: Ranks,
    ) -> None:
        """
        Args:
            labels: see `join_labels`.
            num_images: at most so many, spread evenly over the set.

        Raises:
            EvaluationError: the labels cannot be used, or are fewer than the ranks.
        """
        labelled = join_labels(shard_set, labels)
        most = min(num_images, len(labelled.labels))
        count = most // ranks.world_size * ranks.world_size
        if not count:
            raise EvaluationError(
                f"{labels}: {most} labelled images are fewer than the {ranks.world_size} processes "
                "that share them; label more (run.knn_images of them are taken), or leave out "
                "run.knn_labels"
            )
        chosen = np.linspace(0, len(labelled.labels) - 1, count).astype(np.int64)
        self._ids, self._labels = labelled.sample_ids[chosen], labelled.labels[chosen]
        self._set = shard_set
        self._view_size = view_size
        self._loader = loader
        self._ranks = ranks

    @torch.inference_mode()
    def accuracy(self, encoder: nn.Module) -> float:
        """Leave-one-out kNN accuracy (k = 20, T = 0.1) of its pooled features, 0-1.

        A collective: all ranks call it at the same step.
        """
        mine = np.array_split(self._ids, self._ranks.world_size)[self._ranks.rank]
        device = self._ranks.device
        # Of no image: a rank whose images are all bad knows their length, too.
        view = torch.zeros(1, 3, self._view_size, self._view_size, device=device)
        rows, found = [pooled_features(encoder, view)[:0].float()], [mine[:0]]
        for ids, images in iterate_once(
            self._set,
            ordinals=mine,
            view_size=self._view_size,
            batch_size=_BATCH,
            loader=self._loader,
            num_threads=0,
            device_index=self._ranks.device_index,
            local_world_size=self._ranks.local_world_size,
        ):
            rows.append(functional.normalize(pooled_features(encoder, images).float(), dim=1))
            found.append(ids)
        features = torch.cat(rows)
        # An image that could not be decoded has no row: every rank sends as many all the same.
        whole = torch.zeros(len(mine), 1 + features.shape[1], device=device)
        places = torch.from_numpy(np.searchsorted(mine, np.concatenate(found))).to(device)
        whole[places] = torch.cat([torch.ones(len(features), 1, device=device), features], dim=1)
        gathered = all_gather_rows(whole, self._ranks)
        is_there = (gathered[:, 0] > 0).cpu().numpy()
        right = knn_correct(
            gathered[:, 1:][torch.from_numpy(is_there).to(device)],
            self._labels[is_there],
            ks=(_NEIGHBOURS,),
            temperature=_TEMPERATURE,
        )
        return float(right[_NEIGHBOURS].mean())
