"""Ranks of srun, with torchrun and without, and a requeued job, on a real Slurm of two nodes."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from moco_scale.errors import EXIT_AGAIN
from moco_scale.metrics import read_ledger, read_metrics
from tests.integration.conftest import photo
from tests.support.command import MOCO_SCALE, TINY, moco_scale, pretrain_arguments
from tests.support.hosts import wait_until
from tests.support.slurm import NODES, Slurm, free_ports, why_not

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_IMAGES, EPOCHS = 96, 8
STEPS = EPOCHS * NUM_IMAGES // 16
WAIT_S = 180.0
"""Longest wait for a start or an end; other work on the machine included."""
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "TORCH_CPP_LOG_LEVEL": "ERROR"}

_CORES = " ".join(map(str, sorted(os.sched_getaffinity(0))))
ON_ITS_CORE = (
    *("bash", "-c"),
    f'cores=({_CORES}); exec taskset -c ${{cores[SLURM_NODEID % ${{#cores[@]}}]}} "$@"',
    "on-its-core",
)
"""Before a command: nodes have cores of their own, see `tests.support.hosts.Host.start`."""

BATCH = """\
#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue
srun {command}
code=$?
echo "srun ended with $code"
if [ $code = {again} ]; then scontrol requeue $SLURM_JOB_ID; fi
exit $code
"""


@dataclass(frozen=True)
class Line:
    """A shard set, and where runs go."""

    folder: Path
    preset: Path
    shard_set: str

    def pretrain(self, name: str, *more: str) -> list[str]:
        arguments = pretrain_arguments(self.preset, self.shard_set, self.run(name), *more)
        return [*ON_ITS_CORE, *MOCO_SCALE, *arguments]

    def launch(self, name: str, *more: str, nproc_per_node: int) -> list[str]:
        """The same under torchrun, one a node; its ranks are the job's."""
        launch = [*ON_ITS_CORE, sys.executable, "-m", "moco_scale.launch", "--nnodes=2"]
        launch += [f"--nproc-per-node={nproc_per_node}", "--rdzv-backend=c10d"]
        launch += [f"--rdzv-endpoint={NODES[0]}:{free_ports(1)[0]}", f"--rdzv-id={name}"]
        launch += ["--local-addr=localhost"]  # the second node's name has no address
        pretrain = self.pretrain(name, *more)
        return [*launch, *pretrain[pretrain.index("-m", len(ON_ITS_CORE)) :]]

    def run(self, name: str) -> str:
        return str(self.folder / name)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    if reason := why_not():
        pytest.skip(reason)
    with Slurm() as slurm:
        yield slurm


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Line:
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "raw").mkdir()
    for number in range(NUM_IMAGES):
        (folder / f"raw/{number:03}.jpg").write_bytes(photo(seed=number))
    preset = folder / "tiny.toml"
    preset.write_text(TINY.replace("epochs = 3\n", f"epochs = {EPOCHS}\n"))
    shard_set = str(folder / "shards")
    packed = moco_scale("pack", str(folder / "raw"), shard_set, "--shard-bytes", "200000")
    assert packed.returncode == 0, packed.stderr
    return Line(folder, preset, shard_set)


@pytest.fixture(scope="module")
def straight(line: Line) -> dict[int, tuple[int, ...]]:
    """The ledger of a run of one rank that nothing befell."""
    subprocess.run(line.pretrain("straight"), check=True, timeout=WAIT_S, stdout=subprocess.DEVNULL)
    ledger = read_ledger(line.run("straight"))
    assert len(ledger) == STEPS
    return ledger


def worlds(run: str) -> set[int]:
    return {row.world_size for row in read_metrics(run)}


def test_tasks_of_srun_are_the_ranks_of_one_run(
    slurm: Slurm, line: Line, straight: dict[int, tuple[int, ...]]
) -> None:
    run = line.run("srun")
    command = line.pretrain("srun", "--run.max-steps", "6")

    done = slurm.run("srun", "-N2", "-n2", *command, env=LOOPBACK, timeout_s=WAIT_S)

    assert done.returncode == 0, done.stderr
    assert worlds(run) == {2}
    assert read_ledger(run) == {step: ids for step, ids in straight.items() if step <= 6}


def test_torchrun_under_srun_counts_its_own_ranks(
    slurm: Slurm, line: Line, straight: dict[int, tuple[int, ...]]
) -> None:
    run = line.run("srun-torchrun")
    command = line.launch("srun-torchrun", "--run.max-steps", "6", nproc_per_node=2)

    done = slurm.run("srun", "-N2", "-n2", *command, env=LOOPBACK, timeout_s=WAIT_S)

    assert done.returncode == 0, done.stderr
    assert worlds(run) == {4}
    assert read_ledger(run) == {step: ids for step, ids in straight.items() if step <= 6}


# USR1 would end torchrun itself.
@pytest.mark.parametrize(("launched", "signal"), [(False, "USR1"), (True, "TERM")])
def test_a_batch_job_near_its_limit_saves_and_is_requeued_and_finishes(
    slurm: Slurm,
    line: Line,
    straight: dict[int, tuple[int, ...]],
    tmp_path: Path,
    *,
    launched: bool,
    signal: str,
) -> None:
    name = f"requeued-{signal}"
    run, log = line.run(name), tmp_path / "log"
    words = line.launch(name, nproc_per_node=1) if launched else line.pretrain(name)
    command = " ".join(f"'{word}'" for word in words)
    job = slurm.submit(BATCH.format(command=command, again=EXIT_AGAIN), log=log, env=LOOPBACK)

    def printed(pattern: str) -> bool:
        return log.exists() and re.search(pattern, log.read_text(), re.M) is not None

    wait_until(lambda: printed(r"^step +1\d  epoch"), timeout_s=WAIT_S, what="step 10")
    slurm.run("scancel", f"--signal={signal}", job)  # to all tasks, as --signal does
    try:
        slurm.await_restart(job, timeout_s=WAIT_S)
    except TimeoutError as err:
        err.add_note(f"job {job} is {slurm.state(job)}; it printed:\n{log.read_text()}")
        raise
    wait_until(
        lambda: slurm.state(job) not in ("RUNNING", "COMPLETING"), timeout_s=WAIT_S, what="its end"
    )

    said = log.read_text()
    assert slurm.state(job) == "COMPLETED", said
    saved = re.search(r"stopped by a signal and saved after step (\d+)", said)
    assert saved is not None, said
    assert f"srun ended with {EXIT_AGAIN}" in said
    assert f"resuming after step {saved[1]}," in said
    assert worlds(run) == {2}
    assert read_ledger(run) == straight
