"""What a run writes down: figures of its steps, and the ledger of the samples it consumed.

Each rank writes parts, JSON lines, one a checkpoint interval, named by the first step they may
hold: metrics/rank-00000/step-000000001.jsonl, ledger/rank-00000/step-000000001.jsonl. Steps are
counted from 1: step n is the n-th update.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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
    loss: float
    """InfoNCE in nats, mean over the steps. Guessing costs ln(K + 1)."""
    lookup_accuracy: float
    """How often the positive scores highest among 1 + K keys, 0-1, mean over the steps."""
    lr: float
    """Learning rate of the last of the steps."""
    grad_norm: float
    """Length of the last step's gradient. Falling to 0 at a high loss: collapsed."""
    samples_per_s: float
    """Source images per second over all ranks, each counted once though it gives two views."""
    step_s: float
    """Seconds a step took, on the slowest rank."""
    data_wait_frac: float
    """Part of the time that was spent waiting for a batch, 0-1, on the rank that waited most."""
    queue_filled_frac: float
    """Part of the queue that holds real keys; below 1 the loss still rises."""
    world_size: int
    """Ranks that took part."""


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
        self._rows: dict[str, list[dict[str, Any]]] = {"metrics": [], "ledger": []}

    def add(self, metrics: StepMetrics) -> None:
        """Keep a row of figures."""
        self._rows["metrics"].append(dataclasses.asdict(metrics))

    def consumed(self, step: int, batch: Batch) -> None:
        """Keep which samples a step takes, if the ledger is on."""
        if self._ledger:
            self._rows["ledger"].append(
                {
                    "step": step,
                    "start": int(batch.positions[0]),
                    "stop": int(batch.positions[-1]) + 1,
                    "sample_ids": batch.sample_ids.tolist(),
                }
            )

    def flush(self, *, next_step: int) -> None:
        """Write what there is as a part, and begin another with `next_step`."""
        for kind, rows in self._rows.items():
            if rows:
                path = f"{kind}/rank-{self._rank:05}/step-{self._first_step:09}.jsonl"
                self._store.put(path, "".join(f"{json.dumps(row)}\n" for row in rows).encode())
                rows.clear()
        self._first_step = next_step


def forget_after(store: Store, step: int) -> None:
    """Delete the parts that begin after `step`: the run goes on from there and writes them again.

    Of all ranks, since the world may be another one now.
    """
    stale = [
        path
        for kind in ("metrics", "ledger")
        for path in _parts(store, kind)
        if _first_step(path) > step
    ]
    if stale:
        store.delete(stale)


def read_metrics(run_url: str) -> list[StepMetrics]:
    """A run's figures, by step."""
    rows = {row["step"]: StepMetrics(**row) for row in _rows(open_store(run_url), "metrics")}
    return [rows[step] for step in sorted(rows)]


def read_ledger(run_url: str) -> dict[int, tuple[int, ...]]:
    """By step, the sample ids that all ranks consumed, in position order."""
    by_step: dict[int, dict[int, list[int]]] = defaultdict(dict)
    for row in _rows(open_store(run_url), "ledger"):
        by_step[row["step"]][row["start"]] = row["sample_ids"]
    return {
        step: tuple(sample for start in sorted(parts) for sample in parts[start])
        for step, parts in sorted(by_step.items())
    }


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
