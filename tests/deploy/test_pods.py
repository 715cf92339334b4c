"""The commands of deploy/k8s as they stand, in pods on network namespaces, and the loss of pods."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from demo.local_s3 import LocalS3
from moco_scale.errors import EXIT_AGAIN
from moco_scale.metrics import read_ledger, read_metrics
from shards import open_store
from tests.integration.conftest import photo
from tests.support.command import moco_scale, on_one_core
from tests.support.hosts import Network, why_not
from tests.support.kubernetes import RunningJob, build, only
from tests.support.s3_environment import only_s3

pytestmark = [pytest.mark.s3, pytest.mark.slow, pytest.mark.timeout(900)]

OVERLAY = "overlays/cpu-3"
NUM_IMAGES, EPOCHS = 96, 40
STEPS = EPOCHS * NUM_IMAGES // 48
FAULT_AT = 25  # past the checkpoint of step 20
# What makes a trial of minutes one of seconds; the rest of the settings is the overlay's.
FASTER = f"--data.view-size 32 --optim.epochs {EPOCHS} --run.log-every 1 --run.checkpoint-every 10"
SMALL_SHARDS = "--shard-bytes 200000"
BACK_S = 240.0


@dataclass(frozen=True)
class Cluster:
    """The hosts, the store on one of them, and what the user wrote into the settings."""

    network: Network
    secret: dict[str, str]
    shards: str
    base: str
    flags: str


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Packed by the Job for that."""
    if reason := why_not():
        pytest.skip(reason)
    objects, packing = build(OVERLAY), build("pack")
    flags = f"{only(objects, 'ConfigMap')['data']['PRETRAIN_FLAGS']} {FASTER} --run.ledger"
    hosts = ["store", *RunningJob.host_names(objects), *RunningJob.host_names(packing)]
    with pytest.MonkeyPatch.context() as patch, Network(hosts) as network:
        store = network["store"]
        with LocalS3(address=store.address, enter=store.enter) as server:
            only_s3(patch, server.environment)
            raw, base = server.make_bucket("pods-raw"), server.make_bucket("pods-out")
            for number in range(NUM_IMAGES):
                open_store(raw).put(f"{number:03}.jpg", photo(seed=number))
            pack = RunningJob(
                packing,
                network,
                tmp_path_factory.mktemp("pack"),
                config={"RAW": raw, "SHARDS": f"{base}/shards", "PACK_FLAGS": SMALL_SHARDS},
                secret=server.environment,
            )
            try:
                pack.start_all()
                pack.run_to_the_end(timeout_s=BACK_S)
            finally:
                pack.close()
                print(pack.log(0))
            assert pack.ended == {0: [0]}
            yield Cluster(network, server.environment, f"{base}/shards", base, flags)


@pytest.fixture(scope="module")
def straight(cluster: Cluster) -> dict[int, tuple[int, ...]]:
    """The ledger of a run that nothing befell, on one process."""
    run = f"{cluster.base}/straight"
    arguments = ["pretrain", "--data", cluster.shards, "--out", run, *cluster.flags.split()]
    done = moco_scale(*arguments, before=on_one_core(), timeout_s=2 * BACK_S)
    assert done.returncode == 0, done.stderr
    ledger = read_ledger(run)
    assert len(ledger) == STEPS
    return ledger


@pytest.fixture
def job(cluster: Cluster, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[RunningJob]:
    run = f"{cluster.base}/{request.node.name}"
    job = RunningJob(
        build(OVERLAY),
        cluster.network,
        tmp_path,
        config={"SHARDS": cluster.shards, "RUN": run, "PRETRAIN_FLAGS": cluster.flags},
        secret=cluster.secret,
    )
    try:
        yield job
    finally:
        job.close()
        for index in job.starts:  # pytest shows it with a failure
            print(f"--- pod {index}\n{job.log(index)}")


def test_a_pod_that_is_lost_is_replaced_and_the_run_goes_on(
    job: RunningJob, straight: dict[int, tuple[int, ...]]
) -> None:
    job.start_all()
    job.run(lambda: job.step() >= FAULT_AT, timeout_s=BACK_S, what=f"step {FAULT_AT}")

    job.lose(1)
    job.run_to_the_end(timeout_s=BACK_S)

    print(f"exit codes of each index: {job.ended}")
    assert job.starts[1] == 2
    assert job.failures == {}
    assert read_ledger(job.config["RUN"]) == straight
    assert {metrics.world_size for metrics in read_metrics(job.config["RUN"])} == {3}


def test_a_drain_of_the_rendezvous_pod_saves_within_its_time_and_all_go_on(
    job: RunningJob, straight: dict[int, tuple[int, ...]]
) -> None:
    job.start_all()
    job.run(lambda: job.step() >= FAULT_AT, timeout_s=BACK_S, what=f"step {FAULT_AT}")

    took = job.evict(0)
    job.run_to_the_end(timeout_s=BACK_S)

    print(f"gone after {took:.1f} s; exit codes of each index: {job.ended}")
    assert job.ended[0] == [EXIT_AGAIN, 0]
    assert "stopped by a signal and saved after step" in job.log(0)
    assert job.failures == {}
    assert read_ledger(job.config["RUN"]) == straight


def test_wrong_usage_ends_the_job_at_the_first_pod(job: RunningJob) -> None:
    job.config = {**job.config, "PRETRAIN_FLAGS": "--no-such-flag"}

    job.start_all()
    with pytest.raises(RuntimeError, match=r"the Job failed: pod \d ended with 2"):
        job.run(lambda: False, timeout_s=BACK_S, what="nothing")

    assert "no-such-flag" in "".join(job.log(index) for index in job.starts)
