"""kNN on labelled images: labels joined on samples, votes, and a score while training."""

import csv
import io
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from moco_scale.distributed import Ranks, all_gather_rows
from moco_scale.encoders import pooled_features
from moco_scale.errors import EvaluationError
from pipelines import iterate_once
from shards import ShardSet, open_store

logger = logging.getLogger(__name__)

_NEIGHBOURS, _TEMPERATURE, _BATCH = 20, 0.1, 256


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledSamples:
    """Which samples of a shard set have which label."""

    sample_ids: NDArray[np.int64]
    """M ordinals, ascending."""
    labels: NDArray[np.int64]
    """M numbers of classes."""
    classes: tuple[str, ...]
    num_unlabelled: int
    num_unused: int


def join_labels(shard_set: ShardSet, labels: str) -> LabelledSamples:
    """Join labels on the samples by uri.

    A CSV's uri is an object's full URI, or its path below the source that was packed.

    Raises:
        EvaluationError: the labels cannot be read, match no image, or are all the same.
    """
    table = shard_set.table(columns=["uri"])
    uris: list[str] = table.column("uri").to_pylist()
    ids = table.column("sample_id").to_numpy()
    if labels == "folder":
        by_uri = {uri: PurePosixPath(uri).parent.name for uri in uris}
    else:
        by_uri = _read_labels(labels)
    sources = [f"{source.rstrip('/')}/" for source in json.loads(shard_set.metadata["sources"])]
    found = [_label(uri, by_uri, sources) for uri in uris]
    matched = np.array([label is not None for label in found], dtype=bool)
    if not matched.any():
        raise EvaluationError(
            f"none of the {len(by_uri)} labels in {labels} names an image of {shard_set.url}: "
            f"a label's uri is like {next(iter(by_uri), '(none)')!r}, an image's like {uris[0]!r}"
        )
    classes = tuple(sorted({label for label in found if label is not None}))
    if len(classes) < 2:
        raise EvaluationError(
            f"{labels}: all {int(matched.sum())} labels are {classes[0]!r}; kNN needs two classes"
        )
    numbers = {name: number for number, name in enumerate(classes)}
    return LabelledSamples(
        sample_ids=ids[matched],
        labels=np.array([numbers[label] for label in found if label is not None], dtype=np.int64),
        classes=classes,
        num_unlabelled=int((~matched).sum()),
        num_unused=max(0, len(by_uri) - int(matched.sum())),
    )


def _label(uri: str, by_uri: Mapping[str, str], sources: Sequence[str]) -> str | None:
    if uri in by_uri:
        return by_uri[uri]
    below = (uri.removeprefix(source) for source in sources if uri.startswith(source))
    return next((by_uri[path] for path in below if path in by_uri), None)


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
    count, classes = len(labels), int(labels.max()) + 1
    one_hot = functional.one_hot(torch.as_tensor(labels), classes).float().to(features.device)
    right: dict[int, list[NDArray[np.bool_]]] = {k: [] for k in ks}
    for start in range(0, count, 1024):
        rows = torch.arange(start, min(start + 1024, count), device=features.device)
        similarity = features[rows] @ features.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf  # an image does not vote for itself
        top, nearest = similarity.topk(min(max(ks), count - 1), dim=1)
        votes = (top / temperature).exp()[:, :, None] * one_hot[nearest]
        for k in ks:
            guess = votes[:, :k].sum(1).argmax(1).cpu().numpy()
            right[k].append(guess == labels[rows.cpu().numpy()])
    return {k: np.concatenate(parts) for k, parts in right.items()}


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


def _read_labels(url: str) -> dict[str, str]:
    folder, _, name = url.rpartition("/")
    text = bytes(open_store(folder or ".").read(name)).decode("utf-8-sig")
    rows = csv.DictReader(io.StringIO(text))
    if not {"uri", "label"} <= set(rows.fieldnames or ()):
        raise EvaluationError(
            f"{url}: the first line must be 'uri,label', not {text.partition(chr(10))[0]!r}"
        )
    labels = {row["uri"]: row["label"] for row in rows}
    logger.info("%s: %d labels of %d classes", url, len(labels), len(Counter(labels.values())))
    return labels
