"""Kills at random moments: a run goes on from, and ends with, what the uninterrupted one has.

    KILLS_SEED=123 python -m pytest -m slow -s tests/integration/test_kills.py

draws again the moments of the test that printed this seed; what the run is doing by then depends on
the machine as well.
"""

import contextlib
import dataclasses
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Self

import pytest
import torch

from moco_scale.checkpoint import (
    Checkpoint,
    UnfinishedError,
    checkpoint_path,
    latest,
    load_checkpoint,
    saved_steps,
)
from moco_scale.metrics import StepMetrics, read_ledger, read_metrics
from shards.folder import UNFINISHED
from shards.store import open_store
from tests.support.command import MOCO_SCALE, TINY, on_one_core, pretrain_arguments
from tests.support.shard_sets import make_shard_set

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KILLS = 30
NUM_IMAGES, EPOCHS, EVERY = 96, 50, 4  # long enough for the kills
STEPS = EPOCHS * NUM_IMAGES // 16
# A backbone with dropout: what it draws must be the same after a resume.
PRESET = (
    TINY.replace('backbone = "resnet18"', 'backbone = "mobilenet_v3_small"\nmlp_head = false')
    .replace("epochs = 3", f"epochs = {EPOCHS}")
    .replace("checkpoint_every = 4", f"checkpoint_every = {EVERY}\nkeep_checkpoints = 1000")
)
PATIENCE_S = 180.0
"""Longest wait for anything that a run does; other work on the machine included."""


@dataclass(frozen=True)
class Place:
    """Where the runs of this file are, and what they read."""

    folder: Path
    preset: Path
    shard_set: str

    def url(self, run: str) -> str:
        return str(self.folder / run)


class Job:
    """One start of a run: a command, the processes below it, and what they print."""

    def __init__(
        self, place: Place, run: str, *, launch: Sequence[str] = (), more: Sequence[str] = ()
    ) -> None:
        self.url = place.url(run)
        self._log = place.folder / f"{run}.log"
        arguments = pretrain_arguments(place.preset, place.shard_set, self.url, *more)
        self.started = time.monotonic()
        with self._log.open("wb") as written:
            self.process = subprocess.Popen(
                [*(launch or alone()), *arguments], stdout=written, stderr=subprocess.STDOUT
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:  # a failed test must not leave it running
            self.kill()

    @property
    def output(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def steps(self) -> list[int]:
        """Steps that this start has made."""
        printed = re.findall(r"^step +([\d,]+)  epoch", self.output, re.M)
        return [int(number.replace(",", "")) for number in printed]

    @property
    def begun(self) -> list[int]:
        """Of these, those that a checkpoint is written after."""
        return [step for step in self.steps if step % EVERY == 0]

    @property
    def whole(self) -> list[int]:
        """Of these, those whose checkpoint is whole."""
        return [
            step
            for step in self.begun
            if Path(self.url, f"{checkpoint_path(step)}.sha256").exists()
        ]

    @property
    def resumed_step(self) -> int | None:
        """Of the checkpoint that it says it goes on from; None before it has said so."""
        found = re.search(r"^resuming after step ([\d,]+)", self.output, re.M)
        return int(found[1].replace(",", "")) if found else None

    def wait_for(self, condition: Callable[[], object]) -> float:
        """Until something is so; when that was, in seconds since the start."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"it ended by itself:\n{self.output}"
            assert time.monotonic() < deadline, f"waited in vain:\n{self.output}"
            time.sleep(0.002)  # between two looks
        return time.monotonic() - self.started

    def wait_for_step(self, step: int) -> None:
        self.wait_for(lambda: step in self.steps)

    def kill(self) -> None:
        """Of all its processes at once, as when the power fails."""
        assert self.process.poll() is None, f"it ended before the kill:\n{self.output}"
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout=PATIENCE_S)

    def finish(self) -> None:
        """Let it come to its end."""
        code = self.process.wait(timeout=2 * PATIENCE_S)
        assert code == 0, self.output


def alone() -> list[str]:
    """On one core, so that no bit of a sum depends on the number of threads."""
    return [*on_one_core(), *MOCO_SCALE]


def torchrun(processes: int) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launch, "--nproc-per-node", str(processes), "-m", "moco_scale"]


def descendants(pid: int) -> list[int]:
    """Of a process, by what each says of its parent."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = list(children.get(pid, []))
    for one in found:  # grows while it is walked
        found += children.get(one, [])
    return found


@dataclass(frozen=True)
class Straight:
    """The uninterrupted run on one process, and its pace in seconds."""

    url: str
    start_s: float
    """From the command to the end of the step before the first checkpoint."""
    cycle_s: float
    """From one checkpoint to the next."""
    write_s: float
    """From the end of a step that a checkpoint is due after, to the checkpoint's being whole."""


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    # Not pytest's folder, which stays: a run's checkpoints are a gigabyte.
    with tempfile.TemporaryDirectory(prefix="moco-kills-") as folder:
        shard_set = make_shard_set(Path(folder, "data"), count=NUM_IMAGES, shard_samples=24)
        preset = Path(folder, "tiny.toml")
        preset.write_text(PRESET)
        yield Place(Path(folder), preset, shard_set.url)


@pytest.fixture(scope="module")
def straight(place: Place) -> Straight:
    begun: dict[int, float] = {}
    whole: dict[int, float] = {}
    with Job(place, "straight") as job:
        is_over = False
        while not is_over:
            is_over = job.process.poll() is not None  # one more look then
            now = time.monotonic() - job.started
            for step in job.begun:
                begun.setdefault(step, now)
            for step in job.whole:
                whole.setdefault(step, now)
            time.sleep(0.005)  # between two looks
        job.finish()
    assert list(read_ledger(job.url)) == list(range(1, STEPS + 1))
    assert saved_steps(open_store(job.url)) == list(range(EVERY, STEPS + 1, EVERY))
    pace = Straight(
        job.url,
        start_s=begun[EVERY],
        cycle_s=(whole[STEPS] - whole[EVERY]) / (STEPS // EVERY - 1),
        write_s=statistics.median(whole[step] - begun[step] for step in whole),
    )
    print(f"\n{pace}")
    return pace


@pytest.fixture
def draw() -> Random:
    seed = int(os.environ.get("KILLS_SEED", time.time_ns() % 2**32))
    print(f"\nKILLS_SEED={seed}")
    return Random(seed)


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths at which two nested values are not the same to the bit."""
    if isinstance(one, torch.Tensor):
        same = one.dtype == other.dtype and torch.equal(one, other)
        return [] if same else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [path]
        return [p for key in one for p in differences(one[key], other[key], f"{path}.{key}")]
    if isinstance(one, list | tuple):
        if len(one) != len(other):
            return [path]
        pairs = zip(one, other, strict=True)
        return [p for i, pair in enumerate(pairs) for p in differences(*pair, f"{path}.{i}")]
    return [] if one == other else [path]


def assert_same_checkpoint(found: Checkpoint, straight: Straight) -> None:
    """Model, momentum, position in the data: all but where the run is."""
    wanted = load_checkpoint(f"{straight.url}/{checkpoint_path(found.step)}")
    one, other = (
        {f.name: getattr(checkpoint, f.name) for f in dataclasses.fields(checkpoint)}
        for checkpoint in (found, wanted)
    )
    for content in (one, other):
        del content["url"], content["config"]["run"]["url"]
    wrong = differences(one, other)
    assert not wrong, f"checkpoint of step {found.step}: {len(wrong)} differ, {wrong[-3:]} ..."


def assert_begun_after(step: int, job: Job) -> None:
    """Of a start that came so far as to make a step."""
    if job.steps:
        assert job.resumed_step == (step or None)
        assert job.steps[0] == step + 1


def figures(url: str) -> list[tuple[int, float, float, float]]:
    """Of every step, what does not depend on the clock."""
    rows: list[StepMetrics] = read_metrics(url)
    return [(row.step, row.loss, row.grad_norm, row.lr) for row in rows]


def kill_in(moment: str, job: Job, straight: Straight, draw: Random) -> None:
    """Kill at a moment that is uniform over the start, a cycle, or the writing of a checkpoint.

    By the pace of the uninterrupted run. Where this one is faster by now, the moment ends with what
    it is of: else so much would be done by each start that the last ones had nothing left.
    """
    if moment == "start":
        delay_s = draw.uniform(0, straight.start_s)
        most = 1
    elif moment == "cycle":
        delay_s = draw.uniform(0, straight.cycle_s)
        job.wait_for(lambda: job.whole)
        most = 3
    else:
        delay_s = draw.uniform(0, straight.write_s)
        most = draw.choice((1, 2))
        job.wait_for(lambda: len(job.begun) >= most)
        most += 1
    until = time.monotonic() + delay_s  # the random moment
    while time.monotonic() < until and len(job.begun) < most:
        time.sleep(0.002)  # between two looks
    job.kill()


@dataclass
class Tally:
    """What the kills fell on."""

    starting: int = 0
    """Before the first step."""
    writing: int = 0
    """A checkpoint was begun and not whole."""
    stepping: int = 0
    """Neither."""
    progressed: int = 0
    """At least one new checkpoint was whole."""
    torn: int = 0
    """Of the kills, those at which a checkpoint lay there without its checksum."""
    unfinished: int = 0
    """Files that were being written."""

    def add(self, job: Job) -> None:
        """Look at what a killed start has left."""
        if not job.steps:
            self.starting += 1
        elif job.begun != job.whole:
            self.writing += 1
        else:
            self.stepping += 1
        self.progressed += bool(job.whole)
        folder = Path(job.url, "checkpoints")
        here = {path.name for path in folder.glob("step-*")}
        self.torn += any(name.endswith(".pt") and f"{name}.sha256" not in here for name in here)
        self.unfinished = len(list(folder.glob(f"{UNFINISHED}*")))


def test_a_run_killed_at_30_random_moments_has_the_bits_of_one_that_never_was(
    place: Place, straight: Straight, draw: Random
) -> None:
    moments = ["start"] * 8 + ["cycle"] * 14 + ["write"] * 8
    draw.shuffle(moments)
    assert len(moments) == KILLS
    store = open_store(place.url("killed"))
    tally, gone_on_from = Tally(), {0}

    for moment in moments:
        with Job(place, "killed") as job:
            kill_in(moment, job, straight, draw)
        tally.add(job)
        assert_begun_after(max(gone_on_from), job)
        if saved_steps(store):
            with contextlib.suppress(UnfinishedError):  # killed inside its first
                newest = latest(store)
                assert_same_checkpoint(newest, straight)
                gone_on_from.add(newest.step)
    with Job(place, "killed") as job:
        job.finish()
    assert_begun_after(max(gone_on_from), job)

    print(
        f"{KILLS} kills: {tally.starting} before the first step, {tally.writing} while a "
        f"checkpoint was written, {tally.stepping} between; {tally.progressed} after a new "
        f"checkpoint. At {tally.torn} one lay there without its checksum, and "
        f"{tally.unfinished} files were cut off. Gone on from {len(gone_on_from) - 1} checkpoints."
    )
    assert saved_steps(store) == saved_steps(open_store(straight.url))
    for step in saved_steps(store):
        found = load_checkpoint(f"{job.url}/{checkpoint_path(step)}")
        assert_same_checkpoint(found, straight)
    assert read_ledger(job.url) == read_ledger(straight.url)
    assert figures(job.url) == figures(straight.url)


def test_a_run_killed_on_4_ranks_and_on_2_consumes_on_1_what_one_rank_consumes(
    place: Place, straight: Straight, draw: Random
) -> None:
    third = STEPS // 3
    url = place.url("shrinking")

    for processes, first in ((4, 0), (2, third)):
        kill_at = draw.randrange(first + third // 2, first + third)
        with Job(place, "shrinking", launch=torchrun(processes)) as job:
            job.wait_for_step(kill_at)
            job.kill()
        print(f"killed on {processes} ranks after step {kill_at}")
    with Job(place, "shrinking") as job:
        job.finish()

    worlds = [row.world_size for row in read_metrics(url)]
    print(f"steps on 4, 2 and 1 ranks: {[worlds.count(world) for world in (4, 2, 1)]}")
    assert worlds == sorted(worlds, reverse=True)
    assert set(worlds) == {4, 2, 1}
    assert read_ledger(url) == read_ledger(straight.url)


def test_a_run_killed_inside_its_first_checkpoint_begins_anew(place: Place) -> None:
    steps = list(range(1, EVERY + 1))
    more = ("--run.max-steps", str(EVERY))
    with Job(place, "first", more=more) as job:
        job.finish()
    # As a kill between the two writes leaves it.
    Path(job.url, f"{checkpoint_path(EVERY)}.sha256").unlink()

    with Job(place, "first", more=more) as job:
        job.finish()

    assert job.steps == steps
    assert job.whole == [EVERY]
