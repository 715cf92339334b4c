"""What an encoder learned: kNN on labelled images, beside pixels and a random encoder."""

import csv
import dataclasses
import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from moco_scale.checkpoint import latest, load_checkpoint
from moco_scale.config import read_run_config
from moco_scale.encoders import build_encoder, pooled_features
from moco_scale.errors import EvaluationError
from moco_scale.group_norm import estimate_bn_statistics
from pipelines import iterate_once
from shards import ShardSet, open_store

logger = logging.getLogger(__name__)

EVALUATION_FILE = "evaluation.json"
SAMPLES_FILE = "evaluation.parquet"


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """How features are taken and scored."""

    labels: str = "folder"
    """URL of a CSV with the header uri,label; or 'folder': the folder that an image lies in."""
    on: str = ""
    """URL of the labelled shard set; the set that the run trained on when empty."""
    checkpoint: str = ""
    """URL of the checkpoint; the run's newest when empty."""
    k: tuple[int, ...] = (10, 200)
    """Numbers of neighbours that vote, a column of the table each."""
    temperature: float = 0.1
    """A neighbour's vote weighs exp(cosine / temperature) (Wu et al. 2018, section 3.4)."""
    view_size: int = 0
    """Height and width of the evaluated centre crop, in pixels; 0 takes the run's view size."""
    batch_size: int = 256
    """Images per forward pass."""
    num_threads: int = 0
    """Decoding threads; 0 takes the cores of this machine."""
    bootstrap: int = 2000
    """Resamples of the images for the 95 % intervals."""
    seed: int = 0
    """Seed of the resamples."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One row of the table."""

    features: str
    """What was compared: pixels, the encoder at random initialisation, or the trained one."""
    accuracy: dict[str, float]
    """Leave-one-out kNN accuracy, 0-1, by k."""
    gain_of_trained: dict[str, tuple[float, float, float]]
    """Trained minus this row by k: mean and paired 95 % interval over images; empty for trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A scored checkpoint, as saved in the run's evaluation.json."""

    checkpoint: str
    step: int
    shards: str
    num_images: int
    """Images that were scored."""
    num_unlabelled: int
    """Images of the shard set without a label, left out."""
    num_labels_unused: int
    """Labels whose image is not in the shard set (rejected, or never packed)."""
    classes: dict[str, int]
    """Images of each class."""
    majority: float
    """Accuracy of always naming the largest class."""
    scores: tuple[Score, ...]
    neighbours: dict[str, list[int]]
    """Sample ids of the nearest neighbours of some images, by sample id; trained features."""
    settings: dict[str, object]


def evaluate(run_url: str, config: EvaluateConfig) -> Evaluation:
    """Score a run's encoder; write evaluation.json and .parquet (a row an image).

    Raises:
        EvaluationError: no labels, one class only, or no image with a label.
        CheckpointError: the run has no checkpoint, or it is of another architecture.
    """
    run = read_run_config(run_url)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    store = open_store(run_url)
    checkpoint = load_checkpoint(config.checkpoint) if config.checkpoint else latest(store)
    shard_set = ShardSet.open(config.on or run.data.shards)
    labelled = join_labels(shard_set, config.labels)
    view_size = config.view_size or run.data.view_size

    def images() -> Iterator[Tensor]:
        batches = iterate_once(
            shard_set,
            ordinals=labelled.sample_ids,
            view_size=view_size,
            batch_size=config.batch_size,
            loader=run.data.loader,
            num_threads=config.num_threads,
            device_index=device.index if device.type == "cuda" else None,
        )
        for sample_ids, batch in batches:
            seen.append(sample_ids)
            yield batch

    trained = build_encoder(run.model, seed=run.run.seed).to(device)
    prefix = "encoder_q."
    weights = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.model.items()
        if name.startswith(prefix)
    }
    trained.load_state_dict(weights)
    random = build_encoder(run.model, seed=run.run.seed).to(device)
    # An unwarmed encoder's running statistics are 0 and 1: comparing with them would be unfair.
    seen: list[NDArray[np.int64]] = []
    estimate_bn_statistics(random, images())
    seen.clear()
    columns = _all_features({"pixels": pixel_features, **_encoders(random, trained)}, images())
    kept = np.isin(
        labelled.sample_ids, np.concatenate(seen)
    )  # an undecodable image has no features
    sample_ids, labels = labelled.sample_ids[kept], labelled.labels[kept]

    correct = {
        name: knn_correct(features, labels, ks=config.k, temperature=config.temperature)
        for name, features in columns.items()
    }
    evaluation = Evaluation(
        checkpoint=checkpoint.url,
        step=checkpoint.step,
        shards=shard_set.url,
        num_images=len(labels),
        num_unlabelled=labelled.num_unlabelled,
        num_labels_unused=labelled.num_unused,
        classes={name: int((labels == i).sum()) for i, name in enumerate(labelled.classes)},
        majority=float(np.bincount(labels).max() / len(labels)),
        scores=tuple(_score(name, correct, config=config) for name in correct),
        neighbours=_neighbours(columns["trained"], sample_ids, count=8, each=5),
        settings=dataclasses.asdict(config),
    )
    store.put(SAMPLES_FILE, _samples_table(sample_ids, labels, correct, k=config.k[0]))
    store.put(EVALUATION_FILE, json.dumps(dataclasses.asdict(evaluation), indent=1).encode())
    return evaluation


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


def paired_interval(
    better: NDArray[np.bool_], worse: NDArray[np.bool_], *, resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean of better - worse over images, with its 95 % bootstrap interval (images resampled).

    Args:
        better, worse: M, or S x M for S training seeds, averaged image by image.
    """
    difference = np.atleast_2d(better.astype(np.float64) - worse.astype(np.float64)).mean(0)
    draw = np.random.default_rng(seed)
    means = [
        difference[draw.integers(0, len(difference), len(difference))].mean()
        for _ in range(resamples)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def pixel_features(images: Tensor) -> Tensor:
    """N x 768: the view averaged down to 16 x 16 pixels."""
    return functional.adaptive_avg_pool2d(images, 16).flatten(1)


def _encoders(random: nn.Module, trained: nn.Module) -> dict[str, Callable[[Tensor], Tensor]]:
    return {
        "random": lambda images: pooled_features(random, images),
        "trained": lambda images: pooled_features(trained, images),
    }


@torch.inference_mode()
def _all_features(
    extractors: Mapping[str, Callable[[Tensor], Tensor]], batches: Iterator[Tensor]
) -> dict[str, Tensor]:
    """Unit-length features of every image by every extractor, each image decoded once."""
    parts: dict[str, list[Tensor]] = {name: [] for name in extractors}
    for images in batches:
        for name, extract in extractors.items():
            parts[name].append(functional.normalize(extract(images).float(), dim=1))
    return {name: torch.cat(rows) for name, rows in parts.items()}


def _score(
    name: str, correct: Mapping[str, dict[int, NDArray[np.bool_]]], *, config: EvaluateConfig
) -> Score:
    gain = {
        str(k): paired_interval(
            correct["trained"][k], correct[name][k], resamples=config.bootstrap, seed=config.seed
        )
        for k in config.k
        if name != "trained"
    }
    accuracy = {str(k): float(right.mean()) for k, right in correct[name].items()}
    return Score(features=name, accuracy=accuracy, gain_of_trained=gain)


def _samples_table(
    sample_ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    correct: Mapping[str, dict[int, NDArray[np.bool_]]],
    *,
    k: int,
) -> bytes:
    """Parquet with a row an image: which features classified it right at the first k."""
    right = {f"{name}_is_right": by_k[k] for name, by_k in correct.items()}
    written = io.BytesIO()
    table = pa.table({"sample_id": sample_ids, "label": labels, **right})
    pq.write_table(table, written, compression="zstd")
    return written.getvalue()


def _neighbours(
    features: Tensor, sample_ids: NDArray[np.int64], *, count: int, each: int
) -> dict[str, list[int]]:
    """The nearest neighbours of images spread evenly over the set."""
    chosen = np.unique(np.linspace(0, len(sample_ids) - 1, count).astype(int))
    similarity = features[chosen] @ features.T
    similarity[np.arange(len(chosen)), chosen] = -torch.inf
    nearest = similarity.topk(min(each, len(sample_ids) - 1), dim=1).indices.cpu().numpy()
    return {
        str(int(sample_ids[row])): [int(sample_ids[i]) for i in found]
        for row, found in zip(chosen, nearest, strict=True)
    }


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
