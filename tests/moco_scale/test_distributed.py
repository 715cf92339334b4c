"""Who a process is, which worlds are allowed, and the collectives on real gloo ranks."""

import re
from pathlib import Path

import pytest
import torch

from moco_scale import distributed
from moco_scale.distributed import (
    SRUN,
    TORCHRUN,
    Place,
    Ranks,
    allowed_worlds,
    check_world,
    one_rank,
    read_environment,
)
from moco_scale.errors import ConfigError, LostRankError
from tests.support.distributed import run_distributed

BATCH_SCRIPT = {
    "SLURMD_NODENAME": "vm",
    "SLURM_GTIDS": "0",
    "SLURM_JOB_CPUS_PER_NODE": "2(x2)",
    "SLURM_JOB_ID": "3",
    "SLURM_JOB_NODELIST": "vm,vm-second",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_NODELIST": "vm,vm-second",
    "SLURM_NPROCS": "4",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_TASK_PID": "21715",
}
"""What the script of `sbatch -N2 --ntasks-per-node=2` finds (Slurm 22.05, two slurmd)."""

TASK = BATCH_SCRIPT | {
    "SLURMD_NODENAME": "vm-second",
    "SLURM_GTIDS": "2",
    "SLURM_JOB_CPUS_PER_NODE": "2,1",
    "SLURM_JOB_ID": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    "SLURM_NODEID": "1",
    "SLURM_NPROCS": "3",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_STEPID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "vm,vm-second",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_TASKS_PER_NODE": "2,1",
}
"""What the last task of `srun -N2 -n3` finds."""


def test_without_a_launcher_the_world_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*TORCHRUN, *SRUN):
        monkeypatch.delenv(name, raising=False)

    ranks = distributed.start("cpu")

    assert (ranks.rank, ranks.world_size, ranks.device_index) == (0, 1, None)
    distributed.shutdown()


@pytest.mark.parametrize(
    "environment",
    [
        BATCH_SCRIPT,
        TASK
        | {
            "SLURM_PROCID": "0",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_NODELIST": "vm",
            "SLURM_STEP_TASKS_PER_NODE": "1",
        },
    ],
    ids=["batch script", "step of one task"],
)
def test_under_slurm_but_alone_the_world_is_one(environment: dict[str, str]) -> None:
    place = read_environment(environment)

    assert (place.rank, place.world_size, place.local_world_size) == (0, 1, 1)


def test_a_task_of_srun_is_a_rank() -> None:
    place = read_environment(TASK)

    assert place == Place(
        rank=2,
        world_size=3,
        local_rank=0,
        local_world_size=1,
        device_index=0,
        rendezvous="tcp://vm:15031",
    )


def test_torchrun_under_srun_has_the_last_word() -> None:
    place = read_environment(TASK | dict(zip(TORCHRUN, "3412", strict=True)))

    assert place == Place(
        rank=3,
        world_size=4,
        local_rank=1,
        local_world_size=2,
        device_index=1,
        rendezvous="env://",
    )


@pytest.mark.parametrize(
    ("written", "counts"),
    [("2(x3),1", [2, 2, 2, 1]), ("1,3(x2)", [1, 3, 3]), ("8(x12)", [8] * 12), ("4", [4])],
)
def test_each_task_knows_how_many_share_its_node(written: str, counts: list[int]) -> None:
    step = {"SLURM_STEP_NUM_TASKS": str(sum(counts)), "SLURM_STEP_TASKS_PER_NODE": written}
    found = []
    for node, count in enumerate(counts):
        for local_rank in range(count):
            task = {"SLURM_PROCID": str(len(found)), "SLURM_LOCALID": str(local_rank)}
            place = read_environment(TASK | step | task | {"SLURM_NODEID": str(node)})
            found.append((place.rank, place.local_rank, place.local_world_size))

    each = [(local_rank, count) for count in counts for local_rank in range(count)]
    assert found == [(rank, *mine) for rank, mine in enumerate(each)]


@pytest.mark.parametrize(
    ("shown", "device_index"),
    [
        ({"CUDA_VISIBLE_DEVICES": "1", "SLURM_GPUS_ON_NODE": "2"}, 0),  # --gpus-per-task=1
        ({"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"}, 1),  # --gpus-per-node=2
        ({"SLURM_GPUS_ON_NODE": "2"}, 1),  # --gpus-per-task=1 --gpu-bind=none
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_ON_NODE": "1"}, 1),  # two tasks, one GPU
        ({}, 1),
    ],
)
def test_a_task_takes_the_accelerator_that_slurm_means_for_it(
    shown: dict[str, str], device_index: int
) -> None:
    second = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}

    assert read_environment(TASK | second | shown).device_index == device_index


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("vm,vm-second", "vm"),
        ("gpu[001-003,7]", "gpu001"),
        ("gpu[7,010-012],big1", "gpu7"),
        ("a1,b[2-3]", "a1"),
        ("rack[2-3]-node[05,09]", "rack2-node05"),
        ("node-1.example.org", "node-1.example.org"),
    ],
)
def test_ranks_of_srun_meet_on_the_first_node_of_the_step(nodes: str, first: str) -> None:
    place = read_environment(TASK | {"SLURM_STEP_NODELIST": nodes})

    assert place.rendezvous == f"tcp://{first}:15031"


def test_jobs_steps_and_starts_meet_at_ports_of_their_own_below_the_ephemeral() -> None:
    def port(**changes: str) -> int:
        return int(read_environment(TASK | changes).rendezvous.rpartition(":")[2])

    jobs = [port(SLURM_JOB_ID=str(job)) for job in range(4_000_000, 4_010_000)]

    assert len(set(jobs)) == len(jobs)
    assert (min(jobs), max(jobs)) == (15000, 24999)
    assert len({port(), port(SLURM_STEP_ID="1"), port(SLURM_JOB_ID="2")}) == 3
    assert port() != port(SLURM_RESTART_COUNT="1")


@pytest.mark.parametrize(
    ("given", "rendezvous"),
    [
        ({"MASTER_ADDR": "10.0.0.7"}, "tcp://10.0.0.7:15031"),
        ({"MASTER_PORT": "20000"}, "tcp://vm:20000"),
        ({"MASTER_ADDR": "fd00::7", "MASTER_PORT": "1"}, "tcp://[fd00::7]:1"),
    ],
)
def test_a_meeting_point_that_is_given_is_taken(given: dict[str, str], rendezvous: str) -> None:
    place = read_environment(TASK | given)

    assert place.rendezvous == rendezvous


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"RANK": "0"}, "but not WORLD_SIZE; start the ranks with torchrun"),
        (dict(zip(TORCHRUN, "0x01", strict=True)), "must be whole numbers"),
        (dict(zip(TORCHRUN, "2201", strict=True)), "rank 2 of 2"),
        ({"SLURM_STEP_NUM_TASKS": "3"}, "but not SLURM_PROCID; start the ranks with srun"),
        (TASK | {"SLURM_STEP_NUM_TASKS": "many"}, "must be whole numbers"),
        (TASK | {"SLURM_PROCID": "3"}, "rank 3 of 3"),
        (TASK | {"SLURM_LOCALID": "1"}, "local rank 1 of 1"),
        (TASK | {"SLURM_LOCALID": "-1"}, "local rank -1 of 1"),
        (TASK | {"SLURM_NODEID": "2"}, "local rank 0 of 0"),
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "2,2"}, "does not add up to"),
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": "2,1(y2)"}, "does not add up to"),
        (TASK | {"SLURM_STEP_TASKS_PER_NODE": ""}, "does not add up to"),
        (TASK | {"SLURM_STEP_NODELIST": "gpu["}, "names no first node; set MASTER_ADDR"),
        (TASK | {"SLURM_STEP_NODELIST": ""}, "names no first node; set MASTER_ADDR"),
        (TASK | {"MASTER_PORT": "http"}, "MASTER_PORT 'http' is no port"),
        (TASK | {"MASTER_PORT": "70000"}, "MASTER_PORT '70000' is no port"),
    ],
)
def test_half_an_environment_or_a_wrong_one_is_refused_in_one_line(
    environment: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read_environment(environment)

    assert "\n" not in str(caught.value)


def test_a_first_node_without_an_address_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in (TASK | {"MASTER_ADDR": "no host"}).items():
        monkeypatch.setenv(name, value)

    with pytest.raises(ConfigError, match=r"no host, has no address here .* set MASTER_ADDR"):
        distributed.start("cpu", timeout_s=5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_driver_is_named_with_the_version_that_is_needed() -> None:
    needed = rf"nvidia-smi .* CUDA {torch.version.cuda} or newer"

    with pytest.raises(ConfigError, match=needed):
        distributed.start("cuda")


def test_a_rank_whose_others_do_not_come_says_so_at_its_deadline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    for name, value in zip(TORCHRUN, "0201", strict=True):
        monkeypatch.setenv(name, value)

    with pytest.raises(LostRankError, match="start the same command again"):
        distributed.start("cpu", timeout_s=1, rendezvous=f"file://{tmp_path / 'meeting'}")


@pytest.mark.parametrize("world_size", range(1, 9))
def test_a_world_that_cuts_a_bn_group_is_refused_with_those_that_do_not(world_size: int) -> None:
    allowed = allowed_worlds(global_batch_size=192, bn_sub_batch=32)

    assert allowed == [1, 2, 3, 6]
    if world_size in allowed:
        check_world(world_size, global_batch_size=192, bn_sub_batch=32)
    else:
        with pytest.raises(ConfigError, match="start 1, 2, 3, 6"):
            check_world(world_size, global_batch_size=192, bn_sub_batch=32)


def test_a_batch_of_broken_groups_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"not a multiple of model\.bn_sub_batch 32"):
        check_world(1, global_batch_size=100, bn_sub_batch=32)


def test_alone_collectives_need_no_group() -> None:
    rows = torch.ones(2, 3)

    distributed.all_reduce_flat([rows], one_rank())
    distributed.barrier(one_rank())

    assert torch.equal(rows, torch.ones(2, 3))
    assert distributed.all_gather_rows(rows, one_rank()) is rows
    assert distributed.broadcast_object("said", one_rank()) == "said"


def collectives(ranks: Ranks) -> dict[str, object]:
    ones = torch.full((2, 3), float(ranks.rank))
    other = torch.full((4, 1, 2, 2), 10.0 * ranks.rank).contiguous(
        memory_format=torch.channels_last
    )
    distributed.all_reduce_flat([ones, other], ranks)
    return {
        "mean": (ones.unique().tolist(), other.unique().tolist()),
        "rows": distributed.all_gather_rows(torch.tensor([[ranks.rank, 7]]), ranks).tolist(),
        "said": distributed.broadcast_object({"by": ranks.rank}, ranks),
        "world": ranks.world_size,
    }


def test_collectives_of_three_ranks() -> None:
    found = run_distributed(collectives, 3)

    for answer in found:
        assert answer == {
            "mean": ([1.0], [10.0]),
            "rows": [[0, 7], [1, 7], [2, 7]],
            "said": {"by": 0},
            "world": 3,
        }


def fail_on_one(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise ValueError("rank one has had enough")
    distributed.barrier(ranks)


def test_a_ranks_traceback_reaches_the_test() -> None:
    with pytest.raises(AssertionError, match=r"(?s)rank 1 failed.*fail_on_one.*had enough"):
        run_distributed(fail_on_one, 2, timeout=30)


def wait_for_nobody(ranks: Ranks) -> None:
    if ranks.rank == 0:
        distributed.barrier(ranks)
    else:
        torch.multiprocessing.Event().wait(60)


def test_ranks_that_hang_are_ended_at_the_deadline() -> None:
    with pytest.raises((TimeoutError, AssertionError)):
        run_distributed(wait_for_nobody, 2, timeout=3)
