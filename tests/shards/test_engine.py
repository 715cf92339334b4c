"""Work on local processes: complete, and clear about a worker that dies."""

import os
import signal

import pytest

from shards.engine import LocalEngine
from shards.errors import ShardError


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
