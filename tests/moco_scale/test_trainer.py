"""The run: resume to the bit, signals, the ledger, and what stops a run."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from moco_scale.checkpoint import latest, saved_steps
from moco_scale.distributed import Ranks, one_rank
from moco_scale.errors import CheckpointError, ConfigError, TrainError
from moco_scale.metrics import MetricsLog, StepMetrics, read_ledger, read_metrics
from moco_scale.model import ModelConfig
from moco_scale.optim import OptimConfig
from moco_scale.trainer import RunConfig, RunResult, Trainer
from pipelines.config import DataConfig
from pipelines.errors import BadDataError
from shards.store import Store, open_store
from tests.moco_scale.test_step import small_encoder
from tests.support.distributed import run_distributed
from tests.support.fake_loader import FakeLoader

BATCH = 16
MODEL = ModelConfig(
    dim=6, queue_size=40, momentum=0.9, bn_sub_batch=4, shuffle_domain=16, temperature=0.2
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def build(
    url: str,
    *,
    ranks: Ranks | None = None,
    max_steps: int = 0,
    resume: str = "auto",
    seed: int = 0,
    lr: float = 0.1,
    num_replaced: int = 0,
    max_bad_frac: float = 0.01,
    checkpoint_every: int = 5,
    progress: Callable[[StepMetrics], None] | None = None,
    saved: Callable[[str], None] | None = None,
    view_dtype: torch.dtype = torch.float32,
    bf16: Literal["on", "off"] = "off",
    channels_last: bool = True,
    compile: bool = False,
    weight_decay: float = 1e-4,
    encoder: torch.nn.Module | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
) -> Trainer:
    """Twelve steps: three epochs of four."""
    ranks = ranks or one_rank()
    return Trainer(
        data=DataConfig(global_batch_size=BATCH, max_bad_frac=max_bad_frac, **(data or {})),
        model=replace(MODEL, **(model or {})),
        optim=OptimConfig(lr=lr, epochs=3, weight_decay=weight_decay),
        run=RunConfig(
            url=url,
            seed=seed,
            resume=resume,
            max_steps=max_steps,
            log_every=2,
            checkpoint_every=checkpoint_every,
            ledger=True,
            bf16=bf16,
            channels_last=channels_last,
            compile=compile,
        ),
        loader=FakeLoader(
            ranks, global_batch_size=BATCH, num_replaced=num_replaced, dtype=view_dtype
        ),
        ranks=ranks,
        progress=progress,
        saved=saved,
        encoder=encoder or small_encoder(),
    )


def state(url: str) -> dict[str, torch.Tensor]:
    return latest(open_store(url)).model


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(url: str) -> None:
    straight = f"{url}-straight"
    build(straight).run()

    build(url, max_steps=7).run()
    resumed = build(url)
    result = resumed.run()

    assert resumed.resumed_from.endswith("step-000000007.pt")
    assert result == RunResult(step=12, steps_now=5, preempted=False)
    assert_same_bits(state(url), state(straight))
    assert read_ledger(url) == read_ledger(straight)
    assert list(read_ledger(url)) == list(range(1, 13))
    # Row 12 sums the same steps in both runs, so nothing but the clock may differ.
    assert read_metrics(url)[-1].loss == read_metrics(straight)[-1].loss


class KilledError(Exception):
    """Stands for a process that ends without a word."""


def test_a_run_that_dies_between_checkpoints_repeats_the_steps_since(url: str) -> None:
    straight = f"{url}-straight"
    build(straight).run()

    def die(metrics: StepMetrics) -> None:
        if metrics.step == 8:
            raise KilledError

    with pytest.raises(KilledError):
        build(url, progress=die).run()
    assert list(read_ledger(url)) == list(range(1, 9))  # flushed on the way down
    resumed = build(url)
    result = resumed.run()

    assert resumed.resumed_from.endswith("step-000000005.pt")
    assert result.steps_now == 7
    assert_same_bits(state(url), state(straight))
    assert read_ledger(url) == read_ledger(straight)


def on_ranks(ranks: Ranks, url: str, max_steps: int) -> tuple[int, int]:
    torch.set_num_threads(1)
    result = build(url, ranks=ranks, max_steps=max_steps).run()
    return result.step, result.steps_now


def with_dropout() -> torch.nn.Module:
    encoder = small_encoder()
    assert isinstance(encoder, torch.nn.Sequential)
    return encoder.insert(7, torch.nn.Dropout2d(0.5))


def of_first_steps(ranks: Ranks, url: str) -> list[torch.Tensor]:
    """What dropout has left of this rank's queries in two steps."""
    torch.set_num_threads(1)
    trainer = build(url, ranks=ranks, max_steps=2, encoder=with_dropout())
    seen: list[torch.Tensor] = []
    layer = trainer.model.encoder_q.get_submodule("7")
    layer.register_forward_hook(lambda _, __, left: seen.append(left.flatten(1) == 0))
    trainer.run()
    return seen


def test_what_dropout_draws_depends_on_seed_step_and_rank_alone(tmp_path: Path) -> None:
    url, straight = str(tmp_path / "run"), str(tmp_path / "straight")
    build(straight, encoder=with_dropout()).run()
    torch.manual_seed(1)  # another process would have other numbers
    build(url, encoder=with_dropout(), max_steps=7).run()
    torch.manual_seed(2)
    build(url, encoder=with_dropout()).run()
    assert_same_bits(state(url), state(straight))

    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, other = (
        run_distributed(of_first_steps, 2, str(tmp_path / name)) for name in ("one", "two")
    )
    for rank in (0, 1):
        assert all(map(torch.equal, one[rank], other[rank]))
        assert not torch.equal(one[rank][0], one[rank][1])
    assert not torch.equal(one[0][0], one[1][0])


def test_two_ranks_resume_to_the_bit_and_share_the_batches_of_one(tmp_path: Path) -> None:
    straight, stopped, alone = (str(tmp_path / name) for name in ("straight", "stopped", "alone"))

    for url in (straight, stopped):  # there already, as after the command line's config.json
        Path(url).mkdir()
    assert run_distributed(on_ranks, 2, straight, 0) == [(12, 12)] * 2
    assert run_distributed(on_ranks, 2, stopped, 7) == [(7, 7)] * 2
    assert run_distributed(on_ranks, 2, stopped, 0) == [(12, 5)] * 2
    build(alone).run()

    assert_same_bits(state(stopped), state(straight))
    assert read_ledger(stopped) == read_ledger(straight) == read_ledger(alone)
    assert read_metrics(straight)[-1].world_size == 2
    for name, tensor in state(alone).items():
        torch.testing.assert_close(state(straight)[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_run_goes_on_in_another_world(tmp_path: Path) -> None:
    url, alone = str(tmp_path / "run"), str(tmp_path / "alone")
    build(url, max_steps=7).run()
    build(alone).run()

    assert run_distributed(on_ranks, 2, url, 0) == [(12, 5)] * 2

    assert read_ledger(url) == read_ledger(alone)
    for name, tensor in state(alone).items():
        torch.testing.assert_close(state(url)[name], tensor, rtol=1e-3, atol=1e-4)


def test_a_smaller_world_overwrites_what_a_larger_one_wrote_ahead(url: str) -> None:
    build(url, max_steps=5).run()
    # Two ranks went on to step 6 and died there: rank 1's part would double that step.
    ahead = FakeLoader(replace(one_rank(), rank=1, world_size=2), global_batch_size=BATCH)
    ahead.taken = 5
    lost = MetricsLog(open_store(url), rank=1, ledger=True, first_step=6)
    lost.consumed(6, next(ahead))
    lost.flush(next_step=7)

    build(url).run()

    assert {len(ids) for ids in read_ledger(url).values()} == {BATCH}


def signal_one(ranks: Ranks, url: str) -> tuple[int, bool]:
    def interrupt(metrics: StepMetrics) -> None:
        if metrics.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    # Only rank 0 is shown the figures, so only rank 0 gets the signal.
    result = build(url, ranks=ranks, progress=interrupt).run()
    return result.step, result.preempted


def test_a_signal_to_one_rank_stops_all_at_one_step_and_saves(tmp_path: Path) -> None:
    url = str(tmp_path)

    found = run_distributed(signal_one, 2, url)

    assert found == [(5, True), (5, True)]
    assert latest(open_store(url)).step == 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_between_checkpoints_and_the_old_handler_comes_back(
    url: str, number: signal.Signals
) -> None:
    before = signal.getsignal(number)

    def interrupt(metrics: StepMetrics) -> None:
        if metrics.step == 2:
            os.kill(os.getpid(), number)

    result = build(url, progress=interrupt).run()

    assert result == RunResult(step=3, steps_now=3, preempted=True)
    assert saved_steps(open_store(url)) == [3]
    assert list(read_ledger(url)) == [1, 2, 3]
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_stopped_inside_its_first_checkpoint_begins_anew(
    url: str, resume: str, caplog: pytest.LogCaptureFixture
) -> None:
    build(url, max_steps=2).run()
    open_store(url).delete(["checkpoints/step-000000002.pt.sha256"])

    again = build(url, max_steps=2, resume=resume)

    assert again.step == 0
    assert "beginning anew" in caplog.text
    again.run()
    assert latest(open_store(url)).step == 2


def test_a_finished_run_is_left_alone(url: str) -> None:
    build(url).run()
    before = saved_steps(open_store(url))

    again = build(url)

    assert again.finished
    assert again.run() == RunResult(step=12, steps_now=0, preempted=False)
    assert saved_steps(open_store(url)) == before == [5, 10, 12]


def test_nothing_is_written_before_run(tmp_path: Path) -> None:
    build(str(tmp_path / "run"))

    assert not list(tmp_path.iterdir())


def test_never_resuming_into_a_run_with_checkpoints_is_refused(url: str) -> None:
    build(url, max_steps=2).run()

    with pytest.raises(CheckpointError, match=r"another run\.url"):
        build(url, resume="never")


def test_a_new_run_starts_from_a_checkpoint_given_by_url(url: str) -> None:
    build(url, max_steps=5).run()
    first = latest(open_store(url))

    branched = build(f"{url}-branch", resume=first.url)

    assert branched.step == 5
    assert_same_bits(dict(branched.model.state_dict()), first.model)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        build(f"{url}-other", resume=f"{url}/checkpoints/step-000000099.pt").run()


def test_a_branch_that_was_stopped_goes_on_with_the_same_command(url: str) -> None:
    build(url, max_steps=5).run()
    first, branch = latest(open_store(url)).url, f"{url}-branch"
    build(branch, resume=first, max_steps=8).run()

    again = build(branch, resume=first)

    assert again.resumed_from == f"{branch}/checkpoints/step-000000008.pt"
    assert again.run().step == 12
    assert_same_bits(state(branch), state(straight_run(url)))
    with pytest.raises(CheckpointError, match=r"already has checkpoints"):
        build(branch, resume=f"{url}/checkpoints/step-000000004.pt")


def test_a_branch_that_was_stopped_inside_its_first_checkpoint_begins_anew(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    build(url, max_steps=5).run()
    first, branch = latest(open_store(url)).url, f"{url}-branch"
    build(branch, resume=first, max_steps=8).run()
    open_store(branch).delete(["checkpoints/step-000000008.pt.sha256"])

    again = build(branch, resume=first)

    assert again.resumed_from == first
    assert "beginning anew" in caplog.text
    again.run()
    assert_same_bits(state(branch), state(straight_run(url)))


def straight_run(url: str) -> str:
    build(f"{url}-straight").run()
    return f"{url}-straight"


@pytest.mark.parametrize("then", [True, False])
def test_a_run_goes_on_in_another_layout_in_memory(url: str, then: bool) -> None:
    build(url, max_steps=6, channels_last=not then).run()
    before = [one.clone() for one in momentum(build(url, channels_last=not then))]

    after = momentum(build(url, channels_last=then))

    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    build(url, channels_last=then).run()
    for name, tensor in state(straight_run(url)).items():
        torch.testing.assert_close(state(url)[name], tensor, rtol=1e-3, atol=1e-4)


def momentum(trainer: Trainer) -> list[torch.Tensor]:
    return [trainer.optimizer.state[one]["momentum_buffer"] for one in trainer.parameters]


def test_the_optimizers_settings_are_those_of_now_and_the_log_says_so(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    build(url, max_steps=5).run()

    resumed = build(url, weight_decay=0.25)

    assert resumed.optimizer.param_groups[0]["weight_decay"] == 0.25
    assert "optim.weight_decay 0.0001 -> 0.25" in caplog.text


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": {"temperature": 0.1}}, r"model\.temperature 0\.2, this run 0\.1.*run\.init"),
        ({"model": {"symmetric": True}}, r"model\.symmetric False, this run True"),
        ({"data": {"recipe": "moco_v1"}}, r"data\.recipe '.*', this run 'moco_v1'"),
    ],
)
def test_a_checkpoint_of_another_recipe_is_refused(
    url: str, change: dict[str, dict[str, object]], expected: str
) -> None:
    build(url, max_steps=5).run()

    with pytest.raises(CheckpointError, match=expected):
        build(url, **change)


def test_metrics_say_what_happened(url: str) -> None:
    shown: list[StepMetrics] = []

    build(url, progress=shown.append).run()

    rows = read_metrics(url)
    assert rows == shown
    assert [row.step for row in rows] == [2, 4, 5, 6, 8, 10, 12]
    assert [row.queue_filled_frac for row in rows[:2]] == [32 / 40, 1]
    assert rows[-1].epoch == 3
    for row in rows:
        assert row.loss is not None
        assert row.loss > 0
        assert row.lookup_accuracy is not None
        assert 0 <= row.lookup_accuracy <= 1
        assert 0 < row.data_wait_frac < 1
        assert row.samples_per_s == pytest.approx(BATCH / row.step_s)
        assert row.grad_norm is not None
        assert row.grad_norm > 0


def test_writing_the_rows_of_a_checkpoint_counts_among_what_saving_held_up(url: str) -> None:
    class Slow:
        def __init__(self, inner: Store) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

        def put(self, path: str, *arguments: Any, **more: Any) -> Any:
            if path.startswith("metrics/"):
                time.sleep(0.2)
            return self._inner.put(path, *arguments, **more)

    trainer = build(url, max_steps=6)
    trainer.store = Slow(trainer.store)  # type: ignore[assignment]

    trainer.run()

    stalls = {row.step: row.checkpoint_stall_ms for row in read_metrics(url)}
    assert stalls[4] == 0
    assert stalls[6] >= 200  # the first row after the checkpoint of step 5


@pytest.mark.parametrize("bf16", ["on", "off"])
@pytest.mark.parametrize("view_dtype", [torch.uint8, torch.float16, torch.float32])
def test_a_run_takes_views_of_any_type(
    url: str, view_dtype: torch.dtype, bf16: Literal["on", "off"]
) -> None:
    assert build(url, max_steps=1, view_dtype=view_dtype, bf16=bf16).run().step == 1


@pytest.mark.slow
def test_a_compiled_run_makes_the_same_steps_and_checkpoints(url: str) -> None:
    build(url, max_steps=3, compile=True).run()
    build(f"{url}-plain", max_steps=3).run()

    counters = import_module("torch._dynamo.utils").counters  # which torch gives no types
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 1, "only the trial before the encoders was compiled"
    plain, compiled = state(f"{url}-plain"), state(url)
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-4)
    assert build(url).resumed_from.endswith("step-000000003.pt")


def test_compiling_without_a_compiler_is_refused_before_the_first_step(url: str) -> None:
    torch.compiler.reset()
    nothing = torch._inductor.config.patch({"cpp.cxx": (None, "/no/such/compiler")})

    with nothing, pytest.raises(ConfigError, match=r"^run\.compile: .*No working C\+\+ compiler"):
        build(url, compile=True)


def test_a_run_that_is_broken_for_good_stops_and_saves_none_of_it(url: str) -> None:
    with pytest.raises(TrainError, match=r"step 12: 11 steps in a row .*skipped.*optim\.lr"):
        build(url, lr=1e30, checkpoint_every=4).run()

    assert saved_steps(open_store(url)) == []


def test_more_bad_samples_than_the_budget_stop_the_run(url: str) -> None:
    # 2 of 16 are bad, 12.5 %; with the 16 that every budget allows, step 10 is the first to tell.
    with pytest.raises(BadDataError, match=r"step 10: 20 bad samples.*data\.max_bad_frac"):
        build(url, num_replaced=2, max_bad_frac=0.12).run()
    assert build(f"{url}-b", num_replaced=2, max_bad_frac=0.13).run().step == 12


@pytest.mark.parametrize("name", ["log_every", "checkpoint_every", "keep_checkpoints"])
def test_settings_out_of_range_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"run\.{name}"):
        RunConfig(**{name: 0})
