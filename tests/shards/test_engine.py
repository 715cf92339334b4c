"""Work on local processes and on a Ray cluster: complete, and clear about what dies."""

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from shards.engine import LocalEngine, RayEngine
from shards.errors import ShardError, StoreError
from tests.support.ray_cluster import ray_cluster


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def refuse_seven(number: int) -> int:
    if number == 7:
        raise ShardError("seven is no number")
    return number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_one_worker_is_this_process_and_two_are_others() -> None:
    here = list(LocalEngine(1).map(square, range(5)))
    there = list(LocalEngine(2).map(square, range(20)))

    assert [value for value, _ in here] == [0, 1, 4, 9, 16]
    assert {process for _, process in here} == {os.getpid()}
    assert sorted(value for value, _ in there) == [n * n for n in range(20)]
    assert os.getpid() not in {process for _, process in there}
    assert LocalEngine(0).workers == os.cpu_count()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_work_reaches_the_caller(workers: int) -> None:
    with pytest.raises(ShardError, match="seven is no number"):
        list(LocalEngine(workers).map(refuse_seven, range(30)))


def test_a_worker_that_is_killed_is_told_in_one_line() -> None:
    with pytest.raises(ShardError, match="run the same command again") as caught:
        list(LocalEngine(2).map(die_at_three, range(10)))

    assert "\n" not in str(caught.value)


def _double(number: int) -> int:
    return 2 * number


def _double_slowly(number: int) -> int:
    time.sleep(0.3)
    return 2 * number


def _refuse(number: int) -> int:
    raise StoreError(f"object {number}: no answer")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with ray_cluster(nodes=2) as found:
        yield found


def test_a_ray_cluster_does_every_item_once(cluster: Any) -> None:
    results = list(RayEngine(cluster.address, 0).map(_double, range(20)))

    assert sorted(results) == [2 * number for number in range(20)]


def test_an_error_of_ours_comes_through_a_ray_cluster_as_it_was(cluster: Any) -> None:
    with pytest.raises(StoreError, match="object 3: no answer"):
        list(RayEngine(cluster.address, 0).map(_refuse, [3]))


def test_what_a_lost_node_was_doing_is_done_elsewhere() -> None:
    with ray_cluster(nodes=3) as cluster:
        results = []
        for result in RayEngine(cluster.address, 0).map(_double_slowly, range(24)):
            results.append(result)
            if len(results) == 4:
                cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)

    assert sorted(results) == [2 * number for number in range(24)]


def test_no_cluster_at_the_address_is_one_line() -> None:
    with pytest.raises(ShardError, match=r"no Ray cluster at 127\.0\.0\.1:1") as refused:
        list(RayEngine("127.0.0.1:1", 0).map(_double, [1]))

    assert "\n" not in str(refused.value)
