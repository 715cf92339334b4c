"""Three hosts for real: a store and two trainers in network namespaces, and what befalls them."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from demo.local_s3 import LocalS3
from moco_scale.errors import EXIT_AGAIN
from moco_scale.metrics import read_ledger, read_metrics
from shards import open_store
from tests.integration.conftest import photo
from tests.support.command import MOCO_SCALE, TINY, moco_scale, pretrain_arguments
from tests.support.hosts import Network, wait_until, why_not
from tests.support.s3_environment import only_s3

pytestmark = [pytest.mark.s3, pytest.mark.timeout(900)]

NUM_IMAGES, EPOCHS = 96, 20
STEPS = EPOCHS * NUM_IMAGES // 16
FAULT_AT = 25  # past the checkpoint of step 20
COLLECTIVE_S = 20
BACK_S = 180.0
"""Longest wait for what follows a fault; other work on the machine included."""
LOST = "another process of the run is gone"


@dataclass(frozen=True)
class Cluster:
    """The hosts, and what is on the store's."""

    network: Network
    shard_set: str
    base: str
    preset: Path


@dataclass
class Job:
    """One run on the hosts `first`, which is also the rendezvous host, and `second`."""

    cluster: Cluster
    run: str
    nnodes: str
    logs: Path
    join_s: int = 300
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """What a scheduler does, at first and again."""
        network = self.cluster.network
        conf = {
            "is_host": int(name == "first"),
            "join_timeout": self.join_s,
            "last_call_timeout": 3,
            "keep_alive_interval": 2,
        }
        launch = [sys.executable, "-m", "moco_scale.launch", f"--nnodes={self.nnodes}"]
        launch += ["--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=job"]
        launch += ["--rdzv-backend=c10d", f"--rdzv-endpoint={network['first'].address}:29400"]
        launch += ["--rdzv-conf=" + ",".join(f"{key}={value}" for key, value in conf.items())]
        launch += [f"--local-addr={network[name].address}", "-m", "moco_scale"]
        arguments = pretrain_arguments(self.cluster.preset, self.cluster.shard_set, self.run)
        self.processes[name] = network[name].start(
            [*launch, *arguments],
            log=self.logs / f"{name}.log",
            env={"GLOO_SOCKET_IFNAME": "eth0", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )

    def kill(self, name: str) -> None:
        """The machine is off."""
        self.cluster.network[name].kill()
        self.processes[name].wait(timeout=30)

    def log(self, name: str) -> str:
        path = self.logs / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def step(self) -> int:
        """The last step that was printed; either host may be the one that speaks."""
        printed = re.findall(
            r"^step +([\d,]+)  epoch", self.log("first") + self.log("second"), re.M
        )
        return max((int(number.replace(",", "")) for number in printed), default=0)

    def await_step(self, step: int) -> float:
        return wait_until(lambda: self.step() >= step, timeout_s=BACK_S, what=f"step {step}")

    def await_exit(self, name: str) -> int:
        process = self.processes[name]
        wait_until(lambda: process.poll() is not None, timeout_s=BACK_S, what=f"the end of {name}")
        return process.returncode

    def worlds(self) -> list[int]:
        return [metrics.world_size for metrics in read_metrics(self.run)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if reason := why_not():
        pytest.skip(reason)
    preset = tmp_path_factory.mktemp("hosts") / "tiny.toml"
    few = f"epochs = {EPOCHS}\n"
    preset.write_text(
        TINY.replace("epochs = 3\n", few).replace(
            "checkpoint_every = 4\n",
            f"checkpoint_every = 10\ncollective_timeout_s = {COLLECTIVE_S}.0\n",
        )
    )
    with pytest.MonkeyPatch.context() as patch, Network(["store", "first", "second"]) as network:
        store = network["store"]
        with LocalS3(address=store.address, enter=store.enter) as server:
            only_s3(patch, server.environment)
            bucket, base = server.make_bucket("hosts-raw"), server.make_bucket("hosts-out")
            raw = open_store(bucket)
            for number in range(NUM_IMAGES):
                raw.put(f"{number:03}.jpg", photo(seed=number))
            packed = moco_scale("pack", bucket, f"{base}/shards", "--shard-bytes", "200000")
            assert packed.returncode == 0, packed.stderr
            yield Cluster(network, f"{base}/shards", base, preset)


@pytest.fixture(scope="module")
def straight(
    cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[int, ...]]:
    """The ledger of a run that nothing befell, on one process."""
    run = f"{cluster.base}/straight"
    arguments = pretrain_arguments(cluster.preset, cluster.shard_set, run)
    log = tmp_path_factory.mktemp("straight") / "log"
    with cluster.network["first"].start([*MOCO_SCALE, *arguments], log=log) as process:
        try:
            process.wait(timeout=2 * BACK_S)
        finally:
            process.kill()
    assert process.returncode == 0, log.read_text()
    ledger = read_ledger(run)
    assert len(ledger) == STEPS
    return ledger


@pytest.fixture
def job(cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Job]:
    name = re.sub(r"\W+", "-", request.node.name)
    job = Job(cluster, f"{cluster.base}/{name}", nnodes="2", logs=tmp_path)
    try:
        yield job
    finally:
        cluster.network["store"].signal(signal.SIGCONT)
        for host in (cluster.network["first"], cluster.network["second"]):
            host.link_up()
            host.kill()
        for process in job.processes.values():
            process.wait(timeout=30)
        for name in ("first", "second"):  # pytest shows it with a failure
            print(f"--- {name}\n{job.log(name)}")


def test_losing_the_rendezvous_host_ends_the_run_with_the_code_for_another_start(job: Job) -> None:
    job.start("first")
    job.start("second")
    job.await_step(3)

    job.kill("first")
    code = job.await_exit("second")

    assert code == EXIT_AGAIN
    said = job.log("second")
    assert LOST in said
    assert "moco-scale launch: the rendezvous failed" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_rendezvous_host_without_power_ends_the_run_and_the_next_start_finishes_it(
    job: Job, straight: dict[int, tuple[int, ...]]
) -> None:
    job.join_s = 60
    network = job.cluster.network
    job.start("first")
    job.start("second")
    job.await_step(FAULT_AT)

    network["first"].link_down()
    network["second"].give_up_after(tcp_retries=6)
    second = job.await_exit("second")
    network["second"].give_up_after(tcp_retries=15)
    first = job.await_exit("first")
    network["first"].link_up()
    job.start("first")
    job.start("second")

    assert (first, second) == (EXIT_AGAIN, EXIT_AGAIN)
    assert [job.await_exit(name) for name in ("first", "second")] == [0, 0]
    assert read_ledger(job.run) == straight


@pytest.mark.slow
@pytest.mark.parametrize("nnodes", ["1:2", "2"])
def test_a_killed_host_that_is_started_again_takes_part_again(
    job: Job, nnodes: str, straight: dict[int, tuple[int, ...]]
) -> None:
    job.nnodes = nnodes
    job.start("first")
    job.start("second")
    job.await_step(FAULT_AT)

    begun = time.monotonic()
    killed_at = job.step()
    job.kill("second")
    if nnodes == "1:2":
        job.await_step(killed_at + 5)
        print(f"went on alone {time.monotonic() - begun:.1f} s after the kill")
    started_at = job.step()
    job.start("second")
    job.await_step(started_at + 10)
    print(f"10 steps on {time.monotonic() - begun:.1f} s after the kill")

    assert [job.await_exit(name) for name in ("first", "second")] == [0, 0]
    assert read_ledger(job.run) == straight
    assert job.worlds()[-1] == 2
    assert (1 in job.worlds()) == (nnodes == "1:2")


@pytest.mark.slow
def test_a_killed_process_is_started_again_by_its_own_host(
    job: Job, straight: dict[int, tuple[int, ...]]
) -> None:
    job.start("first")
    job.start("second")
    job.await_step(FAULT_AT)

    begun, step = time.monotonic(), job.step()
    launcher = job.processes["second"].pid
    for process in job.cluster.network["second"].processes():
        if process != launcher:
            os.kill(process, signal.SIGKILL)
    job.await_step(step + 1)
    print(f"went on {time.monotonic() - begun:.1f} s after the kill")

    assert [job.await_exit(name) for name in ("first", "second")] == [0, 0]
    assert read_ledger(job.run) == straight
    assert set(job.worlds()) == {2}


@pytest.mark.slow
def test_a_cut_link_ends_the_processes_at_their_deadline_and_they_start_again_by_themselves(
    job: Job, straight: dict[int, tuple[int, ...]]
) -> None:
    job.start("first")
    job.start("second")
    job.await_step(FAULT_AT)

    job.cluster.network["second"].link_down()
    noticed = wait_until(
        lambda: LOST in job.log("first") and LOST in job.log("second"),
        timeout_s=BACK_S,
        what="both sides to notice",
    )
    step = job.step()
    job.cluster.network["second"].link_up()
    back = job.await_step(step + 1)
    print(f"noticed after {noticed:.1f} s, went on {back:.1f} s after the link was back")

    assert noticed > COLLECTIVE_S / 2
    assert [job.await_exit(name) for name in ("first", "second")] == [0, 0]
    assert read_ledger(job.run) == straight


@pytest.mark.slow
def test_a_store_that_is_silent_for_20_seconds_delays_training_and_no_more(
    job: Job, straight: dict[int, tuple[int, ...]]
) -> None:
    # The others wait for the one that waits for the store.
    job.start("first")
    job.start("second")
    job.await_step(FAULT_AT)

    store = job.cluster.network["store"]
    store.signal(signal.SIGSTOP)
    time.sleep(20)  # the fault
    store.signal(signal.SIGCONT)
    back = job.await_step(job.step() + 1)
    print(f"went on {back:.1f} s after the store was back")

    assert [job.await_exit(name) for name in ("first", "second")] == [0, 0]
    assert LOST not in job.log("first") + job.log("second")
    assert read_ledger(job.run) == straight
