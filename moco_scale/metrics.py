"""What a run writes down: figures of its steps, the samples it consumed, the bad ones among them.

Each rank writes parts, JSON lines, one a checkpoint interval, named by the first step they may
hold: metrics/rank-00000/step-000000001.jsonl; ledger, quarantine and skipped likewise. Steps are
counted from 1: step n is the n-th update.
"""

import ast
import dataclasses
import importlib.util
import inspect
import itertools
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moco_scale.errors import ConfigError
from pipelines.loader import Batch
from shards.errors import NotFoundError
from shards.store import Store, open_store


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """Figures of the steps since the row before, over all ranks."""

    step: int
    """Updates made so far."""
    epoch: float
    """Passes over the shard set so far."""
    loss: float | None
    """InfoNCE in nats, mean over the steps. Guessing costs ln(K + 1). None: none was finite."""
    lookup_accuracy: float | None
    """How often the positive scores highest among 1 + K keys, 0-1, mean over the steps."""
    lr: float
    """Learning rate of the last of the steps."""
    grad_norm: float | None
    """Length of the last step's gradient. Falling to 0 at a high loss: collapsed. None: it was not
    finite."""
    samples_per_s: float
    """Source images per second over all ranks, each counted once though it gives two views."""
    step_s: float
    """Seconds a step took, on the slowest rank."""
    data_wait_frac: float
    """Part of the time that was spent waiting for a batch, 0-1, on the rank that waited most."""
    checkpoint_stall_ms: float
    """Milliseconds that saving held the steps up; the writing itself goes on beside them."""
    queue_filled_frac: float
    """Part of the queue that holds real keys; below 1 the loss still rises."""
    world_size: int
    """Ranks that took part."""
    last_step: int
    """Steps of the whole run, if its epochs stay as long as they are."""
    skipped_steps: int
    """Of the steps since the row before, those that were not finite and changed nothing."""
    queue_age_steps: float
    """Age of the queue's oldest key. The slower the key encoder, the older a key may be."""
    memory_bytes: int
    """Most memory so far, of the rank that has most: of the accelerator's, or of the process where
    there is none."""
    alignment: float | None
    """Mean squared distance of a query and its key, 0 to 4. Falls as views of one image meet."""
    uniformity: float | None
    """Log of the mean closeness of two embeddings, -4 to 0. Near 0: all at one point, collapsed."""
    effective_rank: float | None
    """Directions that the embeddings use, 1 to model.dim. Near 1: collapsed."""
    duplicate_key_frac: float | None
    """Keys that have a twin in the queue (cosine above 0.99), 0-1. High: near-duplicates in the
    data, or a queue that holds the whole set; both are false negatives."""
    knn_accuracy: float | None
    """Online kNN on labelled images, 0-1, in the row of a checkpoint; see run.knn_labels."""


def what_figures_mean() -> dict[str, str]:
    """By field of StepMetrics, the line that explains it: the text under its declaration."""
    (declared,) = ast.parse(inspect.getsource(StepMetrics)).body
    assert isinstance(declared, ast.ClassDef)
    said = {}
    for field, text in itertools.pairwise(declared.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr)
            said[field.target.id] = " ".join(str(ast.literal_eval(text.value)).split())
    return said


_KINDS = ("metrics", "ledger", "quarantine", "skipped")


class MetricsLog:
    """One rank's rows, kept until `flush` writes them as a part."""

    def __init__(self, store: Store, *, rank: int, ledger: bool, first_step: int) -> None:
        """
        Args:
            store: of the run.
            rank: whose parts these are.
            ledger: whether sample ids are written down.
            first_step: the step that comes next.
        """
        self._store = store
        self._rank = rank
        self._ledger = ledger
        self._first_step = first_step
        self._rows: dict[str, list[dict[str, Any]]] = {kind: [] for kind in _KINDS}

    def add(self, metrics: StepMetrics) -> None:
        """Keep a row of figures."""
        self._rows["metrics"].append(dataclasses.asdict(metrics))

    def consumed(self, step: int, batch: Batch) -> None:
        """Keep which bad samples a step has replaced and, if the ledger is on, which it takes."""
        for bad in batch.replaced:
            self._rows["quarantine"].append({"step": step, **dataclasses.asdict(bad)})
        if self._ledger:
            self._rows["ledger"].append(_samples(step, batch.positions, batch.sample_ids))

    def skipped(
        self, step: int, *, positions: NDArray[np.int64], sample_ids: NDArray[np.int64]
    ) -> None:
        """Keep the samples of a step that had no effect, because it was not finite."""
        self._rows["skipped"].append(_samples(step, positions, sample_ids))

    def flush(self, *, next_step: int) -> None:
        """Write what there is as a part, and begin another with `next_step`."""
        for kind, rows in self._rows.items():
            if rows:
                path = f"{kind}/rank-{self._rank:05}/step-{self._first_step:09}.jsonl"
                self._store.put(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
                rows.clear()
        self._first_step = next_step


class Board:
    """The same rows as scalars for TensorBoard."""

    def __init__(self, folder: str) -> None:
        # Deferred: an extra, and slow to import.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)
        meanings = what_figures_mean().items()
        self._writer.add_text(
            "what the figures mean", "\n".join(f"- **{name}**: {text}" for name, text in meanings)
        )

    def add(self, metrics: StepMetrics) -> None:
        for name, value in dataclasses.asdict(metrics).items():
            if value is not None and name != "step":
                self._writer.add_scalar(name, value, metrics.step)
        self._writer.flush()


def open_board(folder: str) -> Board | None:
    """A board in a local folder; None for no folder.

    Raises:
        ConfigError: TensorBoard is not installed.
    """
    if not folder:
        return None
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError(
            "run.tensorboard needs TensorBoard: pip install 'moco-scale[tensorboard]', or leave "
            "it out (the same figures are in the run's metrics)"
        )
    return Board(folder)


def _samples(
    step: int, positions: NDArray[np.int64], sample_ids: NDArray[np.int64]
) -> dict[str, Any]:
    return {
        "step": step,
        "start": int(positions[0]),
        "stop": int(positions[-1]) + 1,
        "sample_ids": sample_ids.tolist(),
    }


def forget_after(store: Store, step: int) -> None:
    """Delete the parts that begin after `step`: the run goes on from there and writes them again.

    Of all ranks, since the world may be another one now.
    """
    stale = [path for kind in _KINDS for path in _parts(store, kind) if _first_step(path) > step]
    if stale:
        store.delete(stale)


def read_metrics(run_url: str) -> list[StepMetrics]:
    """A run's figures, by step."""
    unknown: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(StepMetrics))
    rows = {
        # What an older version did not write is not known.
        row["step"]: StepMetrics(**(unknown | row))
        for row in _rows(open_store(run_url), "metrics")
    }
    return [rows[step] for step in sorted(rows)]


def read_ledger(
    run_url: str, kind: Literal["ledger", "skipped"] = "ledger"
) -> dict[int, tuple[int, ...]]:
    """By step, the sample ids that all ranks consumed, or skipped, in position order."""
    by_step: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for row in _rows(open_store(run_url), kind):
        by_step[row["step"]][row["start"]] = row["sample_ids"]
    return {
        step: tuple(sample for start in sorted(parts) for sample in parts[start])
        for step, parts in sorted(by_step.items())
    }


def read_quarantine(run_url: str) -> list[dict[str, Any]]:
    """A row for each bad sample, by position: the step that replaced it and BadSample's fields."""
    rows = {row["position"]: row for row in _rows(open_store(run_url), "quarantine")}
    return [rows[position] for position in sorted(rows)]


def _rows(store: Store, kind: str) -> Iterator[dict[str, Any]]:
    """All parts' rows, later parts last: they are the ones that count."""
    for path in sorted(_parts(store, kind), key=_first_step):
        for line in bytes(store.read(path)).splitlines():
            yield json.loads(line)


def _parts(store: Store, kind: str) -> list[str]:
    try:
        pages = list(store.list(f"{kind}/"))
    except NotFoundError:  # a place that the first write will make
        return []
    return [path for page in pages for path in page.column("path").to_pylist()]


def _first_step(path: str) -> int:
    return int(path.rpartition("/step-")[2].removesuffix(".jsonl"))
