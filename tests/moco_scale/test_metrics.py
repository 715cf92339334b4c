"""Metrics and the ledger: parts of all ranks, merged by step."""

import dataclasses
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moco_scale.metrics import (
    MetricsLog,
    StepMetrics,
    forget_after,
    open_board,
    read_ledger,
    read_metrics,
    read_quarantine,
    what_figures_mean,
)
from pipelines.loader import Batch
from shards.store import open_store
from tests.support.fake_loader import bad_sample


def row(step: int, *, loss: float = 1.0) -> StepMetrics:
    return StepMetrics(
        step=step,
        epoch=step / 10,
        loss=loss,
        lookup_accuracy=0.5,
        lr=0.03,
        grad_norm=2.0,
        samples_per_s=100.0,
        step_s=0.1,
        data_wait_frac=0.25,
        checkpoint_stall_ms=3.0,
        queue_filled_frac=1.0,
        world_size=2,
        last_step=100,
        skipped_steps=0,
        queue_age_steps=4.0,
        memory_bytes=2**30,
        alignment=0.5,
        uniformity=-2.0,
        effective_rank=5.0,
        duplicate_key_frac=0.0,
        knn_accuracy=None,
    )


def batch(*positions: int) -> Batch:
    views = torch.zeros(len(positions), 3, 2, 2)
    numbers = np.array(positions, dtype=np.int64)
    return Batch(views, views, sample_ids=100 + numbers, positions=numbers)


@pytest.fixture
def url() -> str:
    return f"memory://{uuid.uuid4()}"


def test_rows_come_back_by_step_over_parts(url: str) -> None:
    log = MetricsLog(open_store(url), rank=0, ledger=False, first_step=1)
    log.add(row(2))
    log.add(row(4))
    log.flush(next_step=5)
    log.add(row(6, loss=float(3)))
    log.flush(next_step=7)
    log.flush(next_step=9)

    assert read_metrics(url) == [row(2), row(4), row(6, loss=3.0)]
    names = [p for page in open_store(url).list() for p in page.column("path").to_pylist()]
    assert sorted(names) == [
        "metrics/rank-00000/step-000000001.jsonl",
        "metrics/rank-00000/step-000000005.jsonl",
    ]


def test_the_ledger_joins_ranks_in_position_order(url: str) -> None:
    for rank, positions in ((0, (2, 3)), (1, (0, 1))):
        log = MetricsLog(open_store(url), rank=rank, ledger=True, first_step=1)
        log.consumed(1, batch(*positions))
        log.consumed(2, batch(*(4 + p for p in positions)))
        log.flush(next_step=3)

    assert read_ledger(url) == {1: (100, 101, 102, 103), 2: (104, 105, 106, 107)}


def test_a_run_that_goes_back_forgets_what_came_after_on_all_ranks(url: str) -> None:
    for rank in (0, 1):
        log = MetricsLog(open_store(url), rank=rank, ledger=True, first_step=1)
        log.consumed(1, batch(2 * rank, 2 * rank + 1))
        log.flush(next_step=2)
        log.consumed(2, batch(4 + 2 * rank, 5 + 2 * rank))
        log.add(row(2, loss=9.0))
        log.flush(next_step=3)

    forget_after(open_store(url), 1)
    alone = MetricsLog(open_store(url), rank=0, ledger=True, first_step=2)
    alone.consumed(2, batch(4, 5, 6, 7))
    alone.add(row(2, loss=1.0))
    alone.flush(next_step=3)

    assert read_ledger(url) == {1: (100, 101, 102, 103), 2: (104, 105, 106, 107)}
    assert read_metrics(url) == [row(2, loss=1.0)]


def test_a_repeated_part_replaces_the_first(url: str) -> None:
    for loss in (5.0, 6.0):
        log = MetricsLog(open_store(url), rank=0, ledger=False, first_step=1)
        log.add(row(1, loss=loss))
        log.flush(next_step=2)

    assert read_metrics(url) == [row(1, loss=6.0)]


def test_without_a_ledger_nothing_is_kept_and_a_run_without_rows_reads_empty(
    url: str, tmp_path: Path
) -> None:
    log = MetricsLog(open_store(url), rank=0, ledger=False, first_step=1)
    log.consumed(1, batch(0, 1))
    log.flush(next_step=2)

    assert read_ledger(url) == {}
    assert read_metrics(str(tmp_path / "nothing")) == []


def test_bad_samples_are_written_down_with_their_step_and_forgotten_with_it(url: str) -> None:
    bad = [bad_sample(position) for position in (4, 9)]
    for rank, one in enumerate(bad):
        log = MetricsLog(open_store(url), rank=rank, ledger=False, first_step=1)
        log.consumed(1 + rank, dataclasses.replace(batch(3, 4), replaced=(one,)))
        log.flush(next_step=3)

    found = read_quarantine(url)

    assert [(row["step"], row["position"], row["shard"]) for row in found] == [
        (1, 4, bad[0].shard),
        (2, 9, bad[1].shard),
    ]
    assert all("checksum" in row["reason"] for row in found)
    forget_after(open_store(url), 0)
    assert read_quarantine(url) == []


def test_the_same_rows_are_scalars_for_tensorboard(tmp_path: Path) -> None:
    board = open_board(str(tmp_path))
    assert board is not None
    board.add(row(2, loss=3.5))
    board.add(dataclasses.replace(row(4), knn_accuracy=0.75))

    events = EventAccumulator(str(tmp_path)).Reload()
    assert "what the figures mean/text_summary" in events.Tags()["tensors"]

    assert [(one.step, one.value) for one in events.Scalars("loss")] == [(2, 3.5), (4, 1.0)]
    assert [(one.step, one.value) for one in events.Scalars("knn_accuracy")] == [(4, 0.75)]
    assert open_board("") is None


def test_every_figure_is_explained_in_a_line() -> None:
    said = what_figures_mean()

    assert list(said) == [field.name for field in dataclasses.fields(StepMetrics)]
    assert said["lr"] == "Learning rate of the last of the steps."
    assert all(text.endswith(".") or "run.knn_labels" in text for text in said.values())
