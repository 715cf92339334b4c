"""Ranks of srun, and the files of deploy/slurm, on a real Slurm of two nodes."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moco_scale.errors import EXIT_AGAIN
from moco_scale.metrics import read_ledger, read_metrics
from tests.integration.conftest import photo
from tests.support.command import MOCO_SCALE, TINY, moco_scale, on_one_core, pretrain_arguments
from tests.support.hosts import wait_until
from tests.support.slurm import Slurm, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
PRETRAIN, PACK = ROOT / "deploy/slurm/pretrain.sbatch", ROOT / "deploy/slurm/pack.sbatch"
NUM_IMAGES, EPOCHS = 96, 12
STEPS = EPOCHS * NUM_IMAGES // 16
NUM_PACKED, SHARD_SAMPLES = 600, 2
WAIT_S = 180.0
"""Longest wait for a start or an end; other work on the machine included."""
ACTIVATED = {
    "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    "PYTHONPATH": str(ROOT),
}
"""What activating this Python's environment sets."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
"""The network of these nodes."""


@dataclass(frozen=True)
class Line:
    """A shard set, and where runs go."""

    folder: Path
    preset: Path
    shard_set: str

    def pretrain(self, name: str, *more: str) -> tuple[str, ...]:
        return tuple(pretrain_arguments(self.preset, self.shard_set, self.run(name), *more))

    def run(self, name: str) -> str:
        return str(self.folder / name)


class Job:
    """A file of deploy/slurm, submitted."""

    def __init__(self, slurm: Slurm, folder: Path, *arguments: str) -> None:
        self.slurm, self.log = slurm, folder / "log"
        fabric = folder / "lo.env"
        fabric.write_text("".join(f"{name}={value}\n" for name, value in LOOPBACK.items()))
        environment = {**ACTIVATED, "FABRIC": str(fabric)}
        self.number = slurm.submit(*arguments, log=self.log, env=environment)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for something; in vain once the job is over."""
        try:
            wait_until(lambda: condition() or self.is_over(), timeout_s=WAIT_S, what=what)
        except TimeoutError as err:
            err.add_note(f"job {self.number} is {self.state()}; it said:\n{self.said()}")
            raise
        assert condition(), f"no {what}: job {self.number} is {self.state()}; {self.said()}"

    def state(self) -> str:
        return self.slurm.state(self.number)

    def await_step(self, step: int) -> None:
        def is_there() -> bool:
            return any(
                int(number) >= step
                for number in re.findall(r"^step +(\d+)  epoch", self.said(), re.M)
            )

        self.wait_until(is_there, f"step {step}")

    def is_over(self) -> bool:
        return self.state() not in ("PENDING", "RUNNING", "COMPLETING")

    def await_end(self) -> None:
        self.wait_until(self.is_over, "the end")
        assert self.state() == "COMPLETED", self.said()


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    with Slurm() as slurm:
        yield slurm


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("slurm")
    write_photos(folder / "raw", NUM_IMAGES)
    preset = folder / "tiny.toml"
    preset.write_text(TINY.replace("epochs = 3\n", f"epochs = {EPOCHS}\n"))
    shard_set = str(folder / "shards")
    packed = moco_scale("pack", str(folder / "raw"), shard_set, "--shard-bytes", "200000")
    assert packed.returncode == 0, packed.stderr
    return Line(folder, preset, shard_set)


@pytest.fixture(scope="module")
def straight(line: Line) -> dict[int, tuple[int, ...]]:
    """The ledger of a run of one rank that nothing befell."""
    command = [*on_one_core(), *MOCO_SCALE, *line.pretrain("straight")]
    subprocess.run(command, check=True, timeout=WAIT_S, stdout=subprocess.DEVNULL)
    ledger = read_ledger(line.run("straight"))
    assert len(ledger) == STEPS
    return ledger


def write_photos(folder: Path, count: int) -> None:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number:03}.jpg").write_bytes(photo(seed=number))


def worlds(run: str) -> set[int]:
    return {row.world_size for row in read_metrics(run)}


def test_tasks_of_srun_are_the_ranks_of_one_run(
    slurm: Slurm, line: Line, straight: dict[int, tuple[int, ...]]
) -> None:
    run = line.run("srun")
    command = [*MOCO_SCALE, *line.pretrain("srun", "--run.max-steps", "6")]

    done = slurm.run("srun", "-N2", "-n2", *command, env=LOOPBACK, timeout_s=WAIT_S)

    assert done.returncode == 0, done.stderr
    assert worlds(run) == {2}
    assert read_ledger(run) == {step: ids for step, ids in straight.items() if step <= 6}


@pytest.mark.parametrize("file", [PRETRAIN, PACK], ids=lambda file: file.stem)
def test_slurm_would_take_the_files_as_they_are_but_for_the_number_of_gpus(
    slurm: Slurm, file: Path
) -> None:
    done = slurm.run("sbatch", "--test-only", "--gpus-per-node=2", str(file))

    assert done.returncode == 0, done.stderr
    assert "to start at" in done.stderr


def test_pretraining_takes_its_processes_from_the_allocation(
    slurm: Slurm, line: Line, straight: dict[int, tuple[int, ...]], tmp_path: Path
) -> None:
    run = line.run("counts")
    _, *settings = line.pretrain("counts", "--run.max-steps", "6")

    Job(slurm, tmp_path, "--gpus-per-node=2", str(PRETRAIN), *settings).await_end()

    assert worlds(run) == {4}
    assert read_ledger(run) == {step: ids for step, ids in straight.items() if step <= 6}


@pytest.mark.parametrize(
    "stop",
    [
        "scontrol requeue",
        "scancel --batch --signal=USR1",  # as near the end of the job's time: --signal=B:USR1@240
        "scancel --signal=TERM",
    ],
)
def test_pretraining_that_is_stopped_at_any_step_goes_on_and_consumes_the_same_ids(
    slurm: Slurm, line: Line, straight: dict[int, tuple[int, ...]], tmp_path: Path, *, stop: str
) -> None:
    name = re.sub(r"\W+", "-", stop)
    run = line.run(name)
    _, *settings = line.pretrain(name)
    step = random.randint(5, STEPS // 2)  # past the first checkpoint

    # A process a node is enough here: one GPU each, without the rest that --exclusive gives.
    few = ("--oversubscribe", "--gpus-per-node=1")
    job = Job(slurm, tmp_path, *few, str(PRETRAIN), *settings)
    job.await_step(step)
    slurm.run(*stop.split(), job.number)
    job.await_end()

    said = job.said()
    resumed = re.search(r"resuming after step (\d+),", said)
    assert resumed is not None, said
    assert 4 <= int(resumed[1]) < STEPS, said
    if stop.startswith("scancel"):
        assert f"stopped by a signal and saved after step {resumed[1]}:" in said
        assert f"srun ended with {EXIT_AGAIN}\n" in said
    assert read_ledger(run) == straight
    assert worlds(run) == {2}
    print(f"{stop} after step {step}, resumed after step {resumed[1]}")


def test_packing_that_is_requeued_in_the_middle_writes_the_set_that_is_packed_at_once(
    slurm: Slurm, tmp_path: Path
) -> None:
    raw, whole, requeued = (tmp_path / name for name in ("raw", "whole", "requeued"))
    write_photos(raw, NUM_PACKED)
    settings = ["--max-shard-samples", str(SHARD_SAMPLES), "--workers", "1"]
    packed = moco_scale("pack", str(raw), str(whole), *settings)
    assert packed.returncode == 0, packed.stderr
    num_shards = NUM_PACKED // SHARD_SAMPLES

    job = Job(slurm, tmp_path, str(PACK), str(raw), str(requeued), *settings)
    job.wait_until(lambda: num_committed(requeued) > num_shards // 5, "a fifth of the shards")
    slurm.run("scontrol", "requeue", job.number)
    job.wait_until(lambda: job.state() == "PENDING", "the end of the first start")
    committed = num_committed(requeued)
    job.await_end()

    assert 0 < committed < num_shards
    assert num_committed(requeued) == num_shards
    assert files(requeued) == files(whole)
    print(f"requeued with {committed} of {num_shards} shards")


def num_committed(shard_set: Path) -> int:
    return len(list(shard_set.glob("_commit/*.json")))


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
