import threading
import weakref
from collections.abc import Generator

import pytest

from pipelines.ahead import Ahead


def test_items_come_in_order_and_then_the_end() -> None:
    ahead = Ahead((item for item in range(5)), size=2, name="test")

    assert [ahead.get(timeout_s=5) for _ in range(5)] == list(range(5))
    with pytest.raises(StopIteration):
        ahead.get(timeout_s=5)
    assert ahead.close(timeout_s=5)


def test_it_runs_no_further_ahead_than_its_size() -> None:
    made = threading.Semaphore(0)
    count = [0]

    def source() -> Generator[int, None, None]:
        while True:
            count[0] += 1
            made.release()
            yield count[0]

    ahead = Ahead(source(), size=2, name="test")

    # Two are ready and a third waits for room; a fourth is made only once one was taken.
    assert all(made.acquire(timeout=5) for _ in range(3))
    assert not made.acquire(timeout=0.2)
    ahead.get(timeout_s=5)
    assert made.acquire(timeout=5)
    assert ahead.close(timeout_s=5)


def test_an_error_comes_after_the_items_before_it() -> None:
    def source() -> Generator[int, None, None]:
        yield 1
        raise KeyError("the cause")

    ahead = Ahead(source(), size=4, name="test")

    assert ahead.get(timeout_s=5) == 1
    with pytest.raises(KeyError, match="the cause"):
        ahead.get(timeout_s=5)
    assert ahead.close(timeout_s=5)


def test_a_wait_has_a_deadline_and_close_ends_it() -> None:
    go_on = threading.Event()

    def source() -> Generator[int, None, None]:
        go_on.wait(30)
        yield 1

    ahead = Ahead(source(), size=1, name="test")

    with pytest.raises(TimeoutError):
        ahead.get(timeout_s=0.05)
    assert not ahead.close(timeout_s=0.05)
    with pytest.raises(StopIteration):
        ahead.get(timeout_s=5)
    go_on.set()
    assert ahead.close(timeout_s=5)


def test_an_item_is_its_takers_alone_while_the_next_is_made_and_after_an_error() -> None:
    class Item:
        pass

    making, go_on = threading.Event(), threading.Event()

    def source() -> Generator[Item, None, None]:
        yield Item()
        making.set()
        assert go_on.wait(30)
        mine = Item()
        seen.append(weakref.ref(mine))
        raise KeyError(len(repr(mine)))

    seen: list[weakref.ref[Item]] = []
    ahead = Ahead(source(), size=1, name="test")
    item = ahead.get(timeout_s=5)
    seen.append(weakref.ref(item))
    assert making.wait(5)

    del item
    assert seen[0]() is None
    go_on.set()
    assert ahead.close(timeout_s=5)
    assert seen[1]() is None


def test_the_source_is_closed_when_it_is_no_longer_wanted() -> None:
    closed = threading.Event()

    def source() -> Generator[int, None, None]:
        try:
            while True:
                yield 1
        finally:
            closed.set()

    ahead = Ahead(source(), size=1, name="test")
    ahead.get(timeout_s=5)

    assert ahead.close(timeout_s=5)
    assert closed.is_set()
