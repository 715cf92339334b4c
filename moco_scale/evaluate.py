"""What an encoder learned: kNN on labelled images, beside pixels and a random encoder."""

import dataclasses
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

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
from moco_scale.knn import join_labels, knn_correct
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
    if not config.on and len(run.data.shards) != 1:
        raise EvaluationError(
            f"the run has {len(run.data.shards)} shard sets; say by --on which one to evaluate on"
        )
    shard_set = ShardSet.open(config.on or run.data.shards[0])
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
