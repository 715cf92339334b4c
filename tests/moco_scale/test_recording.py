"""Steps recorded in a run: whole steps, the same on every rank; the run trains as it would."""

import gzip
import json
import logging
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moco_scale.config import load_config
from moco_scale.distributed import Ranks, one_rank
from moco_scale.errors import ConfigError
from moco_scale.metrics import StepMetrics
from moco_scale.optim import OptimConfig
from moco_scale.phases import (
    ALL_REDUCE,
    BACKWARD,
    BN_SHUFFLE,
    CHECKPOINT,
    COLLECTIVE,
    DATA_WAIT,
    ENQUEUE,
    FORWARD,
    KEY_UPDATE,
    MEASURE,
    OPTIMIZER,
    OTHER,
    STEP,
    seconds_by_phase,
)
from moco_scale.profiles import DECODE, HAND_OVER, STORE, Run, read_profile
from moco_scale.sampler import Sampler
from moco_scale.trainer import RunConfig, Trainer
from pipelines import open_loader
from pipelines.config import DataConfig
from pipelines.loader import Batch, Loader
from pipelines.spans import TRANSFER, Span
from tests.moco_scale.test_step import MODEL, small_encoder
from tests.moco_scale.test_trace import events_of
from tests.moco_scale.test_trainer import assert_same_bits, state
from tests.support.distributed import run_distributed
from tests.support.fake_loader import FakeLoader
from tests.support.shard_sets import make_shard_set

pytestmark = pytest.mark.timeout(240)
BATCH = 16


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def build(
    run: Path | str,
    *,
    steps: str,
    max_steps: int = 8,
    ranks: Ranks | None = None,
    loader: Loader | None = None,
    torch_ranks: tuple[int, ...] = (),
    said: list[str] | None = None,
    progress: Callable[[StepMetrics], None] | None = None,
) -> Trainer:
    ranks = ranks or one_rank()
    lines = [] if said is None else said
    return Trainer(
        data=DataConfig(global_batch_size=BATCH),
        model=MODEL,
        optim=OptimConfig(lr=0.1, epochs=3),
        run=RunConfig(
            url=str(run),
            max_steps=max_steps,
            log_every=2,
            checkpoint_every=5,
            profile_steps=steps,
            torch_profile_ranks=torch_ranks,
        ),
        loader=loader or FakeLoader(ranks, global_batch_size=BATCH),
        ranks=ranks,
        progress=progress,
        say=lines.append,
        encoder=small_encoder(),
    )


def profiled(run: Path) -> Run:
    (found,) = read_profile(run / "profile" / "profile.json").runs
    return found


def spans_of(run: Path, rank: int = 0) -> list[dict[str, Any]]:
    """Complete events of a rank's trace, by their begin."""
    trace = (run / "profile" / f"rank-{rank:05}.trace.json.gz").read_bytes()
    events = [event for event in events_of(trace) if event["ph"] == "X"]
    return sorted(events, key=lambda event: event["ts"])


def span(name: str, start_s: float, end_s: float) -> Span:
    return Span(name, "main", start_s, end_s, 0.0, 0, 0)


def test_each_second_of_a_step_counts_in_one_phase() -> None:
    spans = [
        span(f"{COLLECTIVE} barrier", 0, 1),  # before it
        span(STEP, 1, 11),
        span(DATA_WAIT, 1, 3),
        span("wait for views", 1.5, 2.5),
        span(FORWARD, 3, 7),
        span(BN_SHUFFLE, 4, 6),
        span(f"{COLLECTIVE} all_to_all", 4.5, 5.5),
        span(ALL_REDUCE, 7, 10),
        span(f"{COLLECTIVE} all_reduce", 8, 9.5),
        span(STEP, 11, 12),
        Span(FORWARD, "another", 11, 12, 0.0, 0, 0),
    ]

    first, second = seconds_by_phase(spans[::-1], thread="main")

    assert {name: seconds for name, seconds in first.items() if seconds} == {
        DATA_WAIT: 2, FORWARD: 2, BN_SHUFFLE: 1, ALL_REDUCE: 1.5, "collectives": 2.5, OTHER: 1,
    }  # fmt: skip
    assert sum(first.values()) == 10
    assert second[OTHER] == sum(second.values()) == 1


def on_ranks(ranks: Ranks, folder: str, steps: str, torch_ranks: tuple[int, ...]) -> None:
    torch.set_num_threads(1)
    build(folder, steps=steps, ranks=ranks, torch_ranks=torch_ranks).run()


def test_two_ranks_record_the_same_whole_steps_and_train_the_same_bits(tmp_path: Path) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"

    run_distributed(on_ranks, 2, str(run), "3:6", (1,))
    run_distributed(on_ranks, 2, str(plain), "", ())

    assert_same_bits(state(str(run)), state(str(plain)))
    assert not (plain / "profile").exists()
    assert sorted(path.name for path in (run / "profile").iterdir()) == [
        "profile.json",
        "rank-00000.trace.json.gz",
        "rank-00001.torch.json.gz",
        "rank-00001.trace.json.gz",
    ]
    collectives = []
    for rank in (0, 1):
        spans = spans_of(run, rank)
        steps = [one for one in spans if one["name"] == STEP]
        assert len(steps) == 4
        for name in (DATA_WAIT, TRANSFER, BACKWARD, ALL_REDUCE, KEY_UPDATE, ENQUEUE):
            assert sum(one["name"] == name for one in spans) == 4, name
        for name in (FORWARD, BN_SHUFFLE, OPTIMIZER):
            assert sum(one["name"] == name for one in spans) == 8, name
        assert sum(one["name"] == MEASURE for one in spans) == 3  # of steps 4, 5 and 6
        assert sum(one["name"] == CHECKPOINT for one in spans) == 1  # of step 5
        # There is one thread here, and all that it did lies in a step.
        for one in spans:
            assert any(
                step["ts"] <= one["ts"] and one["ts"] + one["dur"] <= step["ts"] + step["dur"]
                for step in steps
            )
        collectives.append([one for one in spans if one["name"] == f"{COLLECTIVE} all_reduce"])
    # On one time base: neither can leave an all-reduce before the other has come.
    for here, there in zip(*collectives, strict=True):
        assert here["ts"] < there["ts"] + there["dur"]
        assert there["ts"] < here["ts"] + here["dur"]
    assert [one.rank for one in profiled(run).ranks] == [0, 1]
    assert profiled(run).steps == 4
    by_torch = json.loads(gzip.decompress((run / "profile/rank-00001.torch.json.gz").read_bytes()))
    assert any("conv" in event["name"] for event in by_torch["traceEvents"])


def test_figures_of_a_recording_add_up(run: Path) -> None:
    said: list[str] = []
    build(run, steps="3:6", said=said).run()

    found = profiled(run)
    (rank,) = found.ranks
    assert rank.step_s == pytest.approx(sum(rank.phases.values()))
    assert rank.step_s == pytest.approx(found.step.mean_s)
    assert found.samples_per_s == pytest.approx(BATCH / rank.step_s, rel=0.2)
    assert rank.last_frac == 1
    assert said[0].startswith("profile of steps 3 to 6: ")
    assert said[1].startswith("of a step of rank 0: ")
    assert said[2] == (
        f"in {run}/profile: profile.json, and a trace of each rank; open it at ui.perfetto.dev"
    )


def test_the_threads_of_the_loader_are_in_the_trace(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path, count=48, shard_samples=24)
    ranks = one_rank()
    data = DataConfig(
        shards=(shard_set.url,), global_batch_size=BATCH, view_size=32, loader="cpu", num_threads=2
    )
    loader = open_loader(data, seed=1, rank=0, world_size=1, device_index=None, spans=ranks.spans)
    try:
        build(tmp_path / "run", steps="1:6", ranks=ranks, loader=loader).run()
    finally:
        loader.close()

    trace = (tmp_path / "run" / "profile" / "rank-00000.trace.json.gz").read_bytes()
    events = events_of(trace)
    threads = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {threading.current_thread().name, "stream", "views", "views_0"} <= threads
    assert any(name.startswith("block-read-") for name in threads)
    assert {"read", "check", "plan", "assemble", "make", "decode", "augment"} <= {
        event["name"] for event in events
    }
    found = profiled(tmp_path / "run")
    stages = {one.stage: one for one in found.stages}
    assert {STORE, HAND_OVER, DECODE} <= stages.keys()
    step = stages["step"]
    assert step.wait_to_get is not None
    assert step.wait_to_get.count == 6
    (rank,) = found.ranks
    # At work is what is left of a step after its wait for data.
    assert step.busy_frac == pytest.approx(1 - rank.phases[DATA_WAIT] / rank.step_s, abs=0.05)
    assert step.samples_per_s == pytest.approx(found.samples_per_s, rel=0.05)


@pytest.mark.parametrize(
    ("stops", "steps", "recorded"),
    [
        pytest.param((8,), "2:3", 2, id="within"),
        pytest.param((8,), "6:90", 3, id="beyond the end: what there is"),
        pytest.param((8,), "9:10", None, id="behind the end"),
        pytest.param((4, 8), "3:6", 2, id="resumed in it: what is left"),
        pytest.param((4, 8), "1:3", 3, id="resumed behind it: as it was"),
    ],
)
def test_the_window_is_of_the_steps_that_are_made(
    stops: tuple[int, ...], steps: str, recorded: int | None, run: Path
) -> None:
    for max_steps in stops:
        build(run, steps=steps, max_steps=max_steps).run()

    if recorded is None:
        assert not (run / "profile").exists()
    else:
        assert profiled(run).steps == recorded
        assert sum(one["name"] == STEP for one in spans_of(run)) == recorded


def test_a_run_that_is_told_to_stop_in_the_window_writes_what_there_is(run: Path) -> None:
    def stop(metrics: StepMetrics) -> None:
        if metrics.step == 4:
            os.kill(os.getpid(), signal.SIGUSR1)

    result = build(run, steps="3:8", progress=stop).run()

    assert result.preempted
    assert result.step < 8
    assert profiled(run).steps == result.step - 2


class BrokenLoader(FakeLoader):
    def __next__(self) -> Batch:
        if self.taken == 4:
            raise OSError("the disk is gone")
        return super().__next__()


def test_a_run_that_fails_while_it_is_recorded_fails_as_it_would(run: Path) -> None:
    ranks = one_rank()
    loader = BrokenLoader(ranks, global_batch_size=BATCH)

    with pytest.raises(OSError, match="the disk is gone"):
        build(run, steps="3:6", ranks=ranks, loader=loader).run()

    assert not (run / "profile").exists()
    assert not ranks.spans.recording
    assert not [thread for thread in threading.enumerate() if thread.name == "sampler"]


def test_a_profile_that_cannot_be_written_ends_no_run(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run.mkdir()
    (run / "profile").write_text("in its place")
    said: list[str] = []

    with caplog.at_level(logging.WARNING):
        result = build(run, steps="3:6", said=said).run()

    assert result.step == 8
    assert any("the profile could not be written" in line for line in caplog.messages)
    assert [line.partition(" ")[0] for line in said] == ["profile", "of"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--run.profile-steps", "5"], "first:last, such as 101:150, counted from 1, not '5'"),
        (["--run.profile-steps", "0:5"], "counted from 1, not '0:5'"),
        (["--run.profile-steps", "9:5"], "counted from 1, not '9:5'"),
        (["--run.profile-steps", "1:5000"], "are 5,000 steps; at most 1,000"),
        (["--run.torch-profile-ranks", "0"], "needs the steps: give run.profile_steps"),
        (
            ["--run.profile-steps", "1:2", "--run.torch-profile-ranks", "0", "2"],
            "run.torch_profile_ranks has 2, and the 2 ranks are counted from 0",
        ),
    ],
)
def test_a_window_that_cannot_be_is_refused_in_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(["--preset", "smoke", "--data", "set", "--out", "run", *flags]).validate(
            world_size=2
        )

    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_sampler_sees_a_busy_process() -> None:
    with Sampler(FakeLoader(one_rank(), global_batch_size=BATCH), cores=1) as sampler:
        while len(sampler.moments) < 5:
            sum(range(10_000))

    moments = sampler.moments
    assert all(0 <= one.cpu_frac <= 1 for one in moments)
    assert any(one.cpu_frac > 0 for one in moments)
    assert [one.second for one in moments] == sorted(one.second for one in moments)
    assert moments[0].gpu_frac is None
