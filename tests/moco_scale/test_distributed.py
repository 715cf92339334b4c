"""Who a process is, which worlds are allowed, and the collectives on real gloo ranks."""

from pathlib import Path

import pytest
import torch

from moco_scale import distributed
from moco_scale.distributed import Ranks, allowed_worlds, check_world, one_rank
from moco_scale.errors import ConfigError, LostRankError
from tests.support.distributed import run_distributed

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def test_without_torchrun_the_world_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)

    ranks = distributed.start("cpu")

    assert (ranks.rank, ranks.world_size, ranks.device_index) == (0, 1, None)
    distributed.shutdown()


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")

    with pytest.raises(ConfigError, match="torchrun"):
        distributed.start("cpu")


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
