"""Numbers that are not finite: such a step changes nothing, on any rank, and is written down."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from moco_scale.checkpoint import latest, load_checkpoint, save_checkpoint, saved_steps
from moco_scale.distributed import Ranks, one_rank
from moco_scale.errors import TrainError
from moco_scale.metrics import read_ledger, read_metrics
from moco_scale.optim import OptimConfig
from moco_scale.trainer import RunConfig, Trainer
from pipelines.config import DataConfig
from pipelines.loader import Batch
from shards.store import open_store
from tests.moco_scale.test_step import BATCH, MODEL, small_encoder
from tests.support.distributed import run_distributed
from tests.support.fake_loader import FakeLoader

BAD_STEP = 4
Where = Literal["query", "key", "gradient", "nowhere"]


class PoisonedLoader(FakeLoader):
    """Puts one NaN in one view of one step, on the last rank."""

    def __init__(self, ranks: Ranks, where: Where, steps: tuple[int, ...] = (BAD_STEP,)) -> None:
        super().__init__(ranks, global_batch_size=BATCH)
        self._where = where
        self._steps = steps
        self._poisons = ranks.rank == ranks.world_size - 1

    def __next__(self) -> Batch:
        batch = super().__next__()
        if self.taken in self._steps and self._poisons:
            if self._where == "query":
                batch.view_q[1, 2, 3, 3] = float("nan")
            if self._where == "key":
                batch.view_k[0, 0, 1, 1] = float("inf")
        return batch


def build(
    ranks: Ranks,
    url: str,
    where: Where,
    *,
    max_steps: int,
    bad_steps: tuple[int, ...] = (BAD_STEP,),
    checkpoint_every: int = 0,
    log_every: int = 2,
    max_skipped_frac: float = 0.5,
) -> Trainer:
    return Trainer(
        data=DataConfig(global_batch_size=BATCH),
        model=dataclasses.replace(MODEL, shuffle_domain=16),
        optim=OptimConfig(lr=0.1, epochs=3, max_skipped_steps=2, max_skipped_frac=max_skipped_frac),
        run=RunConfig(
            url=url,
            log_every=log_every,
            checkpoint_every=checkpoint_every or max_steps,
            max_steps=max_steps,
            ledger=True,
        ),
        loader=PoisonedLoader(ranks, where, bad_steps),
        ranks=ranks,
        encoder=small_encoder(),
    )


def train(ranks: Ranks, url: str, where: Where, steps: int) -> dict[str, Any]:
    """State after some steps: model and momentum."""
    trainer = build(ranks, url, where, max_steps=steps)
    if where == "gradient" and ranks.rank == ranks.world_size - 1:
        weight = trainer.parameters[0]

        def poison(gradient: torch.Tensor) -> torch.Tensor:
            return gradient * float("nan") if trainer.step == BAD_STEP - 1 else gradient

        weight.register_hook(poison)
    trainer.run()
    momentum = [one["momentum_buffer"] for one in trainer.optimizer.state_dict()["state"].values()]
    return {**trainer.model.state_dict(), **{f"momentum {n}": t for n, t in enumerate(momentum)}}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("where", ["query", "key", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_on_any_rank(
    where: Where, world_size: int, tmp_path: Path
) -> None:
    def after(steps: int, what: Where) -> list[dict[str, Any]]:
        url = str(tmp_path / f"{what}-{steps}")
        if world_size == 1:
            return [train(one_rank(), url, what, steps)]
        return run_distributed(train, world_size, url, what, steps)

    # The steps before the bad one, and none of the bad one: as if it had not been made.
    before, bad = after(BAD_STEP - 1, where), after(BAD_STEP, where)

    for rank in range(world_size):
        for name, tensor in bad[rank].items():
            assert torch.equal(tensor, before[rank][name]), name
    for rank in after(7, where):
        assert all(tensor.isfinite().all() for tensor in rank.values())
    url = str(tmp_path / f"{where}-7")
    skipped = read_ledger(url, "skipped")
    assert skipped == {BAD_STEP: read_ledger(url)[BAD_STEP]}
    assert all(row.loss and row.loss > 0 for row in read_metrics(url))


def test_the_data_go_on_after_a_step_that_had_no_effect(tmp_path: Path) -> None:
    train(one_rank(), str(tmp_path / "bad"), "query", 7)
    train(one_rank(), str(tmp_path / "good"), "nowhere", 7)

    assert read_ledger(str(tmp_path / "bad")) == read_ledger(str(tmp_path / "good"))


def test_a_checkpoint_that_is_not_finite_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = str(tmp_path)
    train(one_rank(), url, "nowhere", 3)
    train(one_rank(), url, "nowhere", 6)
    store = open_store(url)
    newest = load_checkpoint(f"{url}/checkpoints/step-000000006.pt")
    newest.model["encoder_q.0.weight"][0, 0, 0, 0] = float("nan")
    save_checkpoint(store, newest, keep=5)
    assert saved_steps(store) == [3, 6]

    found = latest(store)

    assert found.step == 3
    assert "encoder_q.0.weight" in caplog.text
    assert "not finite" in caplog.text


def test_a_momentum_that_is_not_finite_makes_a_checkpoint_torn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = str(tmp_path)
    train(one_rank(), url, "nowhere", 3)
    train(one_rank(), url, "nowhere", 6)
    newest = load_checkpoint(f"{url}/checkpoints/step-000000006.pt")
    newest.optimizer["state"][0]["momentum_buffer"][0] = float("inf")
    save_checkpoint(open_store(url), newest, keep=5)

    assert latest(open_store(url)).step == 3
    assert "momentum 0" in caplog.text


def test_a_run_whose_last_step_had_no_effect_is_saved_and_finished(tmp_path: Path) -> None:
    url = str(tmp_path)

    build(one_rank(), url, "query", max_steps=7, bad_steps=(7,), checkpoint_every=4).run()

    assert saved_steps(open_store(url)) == [4, 7]
    assert list(read_ledger(url)) == list(range(1, 8))
    assert list(read_ledger(url, "skipped")) == [7]
    assert read_metrics(url)[-1].step == 7
    assert build(one_rank(), url, "nowhere", max_steps=7).finished


def test_a_checkpoint_waits_one_step_where_the_one_due_had_no_effect(tmp_path: Path) -> None:
    url = str(tmp_path)

    build(one_rank(), url, "query", max_steps=9, bad_steps=(4,), checkpoint_every=4).run()

    assert saved_steps(open_store(url)) == [5, 8, 9]


def test_figures_that_are_not_finite_are_none_in_strict_json(tmp_path: Path) -> None:
    url = str(tmp_path)

    build(one_rank(), url, "query", max_steps=4, bad_steps=(3,), log_every=1).run()

    rows = read_metrics(url)
    assert [row.loss is None for row in rows] == [False, False, True, False]
    assert [row.grad_norm is None for row in rows] == [False, False, True, False]
    for part in (tmp_path / "metrics").rglob("*.jsonl"):
        for line in part.read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)


def test_a_step_without_effect_fills_no_queue(tmp_path: Path) -> None:
    url = str(tmp_path)

    build(one_rank(), url, "query", max_steps=3, bad_steps=(1,), log_every=1).run()

    one_step = BATCH / MODEL.queue_size
    assert [row.queue_filled_frac for row in read_metrics(url)] == [0, one_step, 2 * one_step]


def test_the_budget_counts_all_steps_and_goes_on_after_a_resume(tmp_path: Path) -> None:
    def run(url: str, max_steps: int, frac: float) -> None:
        build(
            one_rank(),
            url,
            "query",
            max_steps=max_steps,
            bad_steps=(2, 4, 6),
            max_skipped_frac=frac,
        ).run()

    # The third of them, at step 6, is one more than a third of the steps, and than the two of
    # max_skipped_steps; two of them were before the stop.
    run(str(tmp_path / "a"), 5, 1 / 3)
    with pytest.raises(TrainError, match=r"step 6: 3 steps were not finite.*max_skipped_frac"):
        run(str(tmp_path / "a"), 12, 1 / 3)
    run(str(tmp_path / "b"), 12, 1 / 2)
