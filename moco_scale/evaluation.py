"""What is written down of an evaluation: tables with intervals, confusions and failures."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moco_scale.errors import EvaluationError
from moco_scale.scoring import ImageTable, Near, Right, find_nearest, knn, paired_interval
from moco_scale.subject import TRAINED
from shards.errors import NotFoundError
from shards.store import Store

EVALUATION_FILE = "evaluation.json"
SAMPLES_FILE = "evaluation.parquet"
PAGE_FILE = "evaluation.html"

Runs = dict[str, dict[str, NDArray[np.float32]]]
"""Of each row of a table and each of its columns: S x N, see `scoring.Right`."""

_GRID_K = (1, 5, 10, 20, 50, 200)
_GRID_T = (0.02, 0.07, 0.1, 0.2, 1.0)
_SHOWN_ROWS, _SHOWN_NEIGHBOURS, _SHOWN_FAILURES = 8, 5, 24
_MOST_CELLS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One row of a table."""

    features: str
    """What was compared: a baseline, the encoder at random initialisation, or the trained one."""
    accuracy: dict[str, float]
    """By column, 0-1: mean over seeds."""
    spread: dict[str, float | None]
    """Standard deviation over seeds; None where there is nothing that a seed could change."""
    gain_of_trained: dict[str, tuple[float, float, float]]
    """Trained minus this row: mean and paired 95 % interval over images; empty for trained."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One table beside that of kNN."""

    name: str
    how: str
    """What was done, in a sentence."""
    num_tested: int
    """Images that were tested by at least one seed."""
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An image that many votes called something else."""

    sample_id: int
    label: str
    guess: str
    share: float
    """The guess's part of the votes."""
    neighbours: list[int]
    """Sample ids of the nearest, in `shards`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A scored checkpoint, as saved in evaluation.json."""

    url: str
    """Where all of it was written: the run, unless another place was given."""
    checkpoint: str
    step: int
    backbone: str
    shards: str
    """The labelled shard set: what is learnt from, and found."""
    test_shards: str
    """The set that was tested on; the same, when it is one set."""
    num_images: int
    """Images that were scored by kNN."""
    num_learnt_from: int
    """Images that voted."""
    num_unlabelled: int
    """Images of the shard sets without a label, or of a class that --on has not; left out."""
    num_labels_unused: int
    """Labels whose image is not in the shard set (rejected, a duplicate, or never packed)."""
    classes: dict[str, int]
    """Images of each class that were scored."""
    majority: float
    """Accuracy of always naming the largest class."""
    scores: tuple[Score, ...]
    """kNN."""
    tasks: tuple[Task, ...]
    """The other tables."""
    grid: dict[str, dict[str, float]]
    """kNN accuracy of the trained features by temperature and k."""
    confusion: list[tuple[str, str, int]]
    """Label, kNN's guess from the trained features at the first k, and images; the most first."""
    neighbours: dict[str, list[int]]
    """Sample ids of the nearest neighbours of some images of `shards`; trained features."""
    failures: tuple[Failure, ...]
    """What kNN got most wrong."""
    settings: dict[str, object]


def read_evaluation(store: Store) -> Evaluation | None:
    """What `moco-scale evaluate` left in a run; None if nothing.

    Raises:
        EvaluationError: it is damaged, or another version's.
    """
    try:
        saved = bytes(store.read(EVALUATION_FILE))
    except NotFoundError:
        return None
    try:
        return _evaluation(json.loads(saved))
    except (ValueError, TypeError, KeyError, AttributeError) as err:
        raise EvaluationError(
            f"{store.uri(EVALUATION_FILE)} is damaged, or of another version of moco-scale; run "
            "'moco-scale evaluate' again"
        ) from err


def _evaluation(saved: dict[str, Any]) -> Evaluation:
    fields = saved | {
        "scores": _scores(saved["scores"]),
        "tasks": tuple(Task(**one | {"scores": _scores(one["scores"])}) for one in saved["tasks"]),
        "confusion": [tuple(one) for one in saved["confusion"]],
        "failures": tuple(Failure(**one) for one in saved["failures"]),
    }
    return Evaluation(**fields)


def _scores(saved: Sequence[dict[str, Any]]) -> tuple[Score, ...]:
    return tuple(
        Score(**one | {"gain_of_trained": {k: tuple(v) for k, v in one["gain_of_trained"].items()}})
        for one in saved
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbourhood:
    """What the trained features' nearest neighbours say, for people to look at."""

    grid: dict[str, dict[str, float]]
    confusion: list[tuple[str, str, int]]
    neighbours: dict[str, list[int]]
    failures: tuple[Failure, ...]


def neighbourhood(
    table: ImageTable, classes: Sequence[str], *, k: int, temperature: float
) -> Neighbourhood:
    """See `Evaluation` for each part."""
    examples = table.examples
    near = find_nearest(table.by_name[TRAINED], examples, max(k, *_GRID_K))
    right, guesses, share = knn(near, examples, k=k, temperature=temperature)
    return Neighbourhood(
        grid={
            f"{one:g}": {
                str(k): float(np.nanmean(knn(near, examples, k=k, temperature=one)[0]))
                for k in _GRID_K
            }
            for one in _GRID_T
        },
        confusion=_confusion(table.labels[near.first :], guesses.cpu().numpy(), classes),
        neighbours=_neighbours(table),
        failures=_failures(right, guesses, share, near, table, classes),
    )


def scores_of(runs: Runs, *, resamples: int) -> tuple[Score, ...]:
    scores = []
    for name, columns in runs.items():
        means = {column: np.nanmean(right, axis=1) for column, right in columns.items()}
        gain = {
            column: paired_interval(runs[TRAINED][column], right, resamples=resamples, seed=0)
            for column, right in columns.items()
            if name != TRAINED
        }
        scores.append(
            Score(
                features=name,
                accuracy={column: float(mean.mean()) for column, mean in means.items()},
                spread={
                    column: float(mean.std(ddof=1)) if len(mean) > 1 else None
                    for column, mean in means.items()
                },
                gain_of_trained=gain,
            )
        )
    return tuple(scores)


def _confusion(
    truth: NDArray[np.int64], guesses: NDArray[np.int64], classes: Sequence[str]
) -> list[tuple[str, str, int]]:
    cells, counts = np.unique(np.stack([truth, guesses]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:_MOST_CELLS]
    return [(classes[cells[0, cell]], classes[cells[1, cell]], int(counts[cell])) for cell in order]


def _neighbours(table: ImageTable) -> dict[str, list[int]]:
    """The nearest neighbours of images spread evenly over the set that is learnt from."""
    count = table.examples.num_train
    unit = functional.normalize(table.by_name[TRAINED][:count], dim=1)
    chosen = torch.from_numpy(np.unique(np.linspace(0, count - 1, _SHOWN_ROWS).astype(int)))
    similarity = unit[chosen.to(unit.device)] @ unit.T
    similarity[torch.arange(len(chosen)), chosen.to(unit.device)] = -torch.inf
    nearest = similarity.topk(min(_SHOWN_NEIGHBOURS, count - 1), dim=1).indices.cpu().numpy()
    return {
        str(int(table.sample_ids[row])): table.sample_ids[found].tolist()
        for row, found in zip(chosen.numpy(), nearest, strict=True)
    }


def _failures(
    right: Right,
    guesses: Tensor,
    share: Tensor,
    near: Near,
    table: ImageTable,
    classes: Sequence[str],
) -> tuple[Failure, ...]:
    """Wrong answers with the largest part of the votes, at most a few of each pair of classes."""
    places = near.places[:, :_SHOWN_NEIGHBOURS].cpu().numpy()
    wrong = np.flatnonzero(right[near.first :] == 0)
    shares = share.cpu().numpy()
    found: list[Failure] = []
    pairs: dict[tuple[str, str], int] = {}
    for row in wrong[np.argsort(-shares[wrong], kind="stable")]:
        label = classes[int(table.labels[near.first + row])]
        guess = classes[int(guesses[row])]
        pairs[label, guess] = pairs.get((label, guess), 0) + 1
        if pairs[label, guess] > 3:
            continue
        found.append(
            Failure(
                sample_id=int(table.sample_ids[near.first + row]),
                label=label,
                guess=guess,
                share=float(shares[row]),
                neighbours=table.sample_ids[places[row]].tolist(),
            )
        )
        if len(found) == _SHOWN_FAILURES:
            break
    return tuple(found)


def samples_table(table: ImageTable, results: Mapping[str, Runs], *, k: str) -> bytes:
    """Parquet with a row an image: by whom it was classified right, in which part of the seeds."""
    columns: dict[str, Any] = {"sample_id": table.sample_ids, "label": table.labels}
    for name, runs in results["kNN"].items():
        columns[f"{name}_is_right"] = _part_right(runs[k])
    for name, by_column in results["linear probe"].items():
        for column, right in by_column.items():
            columns[f"{name}_is_right_by_probe_{column}"] = _part_right(right)
    if not table.examples.is_one_set:
        columns["is_tested"] = np.arange(len(table.labels)) >= table.examples.num_train
    written = io.BytesIO()
    pq.write_table(pa.table(columns), written, compression="zstd")
    return written.getvalue()


def _part_right(runs: NDArray[np.float32]) -> pa.Array:
    known = ~np.isnan(runs)
    part = np.where(known, runs, 0).sum(0) / np.maximum(known.sum(0), 1)
    return pa.array(part.astype(np.float32), mask=~known.any(0))
