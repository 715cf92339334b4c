"""Where work runs: the same `map` over local processes and, in time, over a Ray cluster."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Protocol, TypeVar

from shards.errors import ShardError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Engine(Protocol):
    """Runs a picklable function over items; it may repeat or reorder them, as commits allow."""

    def map(self, run: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results as they finish; the first error ends it, after what is running has finished."""


class LocalEngine:
    """Processes of this machine, spawned so that no client or thread is inherited half-made.

    One worker runs in the calling process.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers or os.cpu_count() or 1

    def map(self, run: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        todo = list(items)
        if self.workers == 1 or len(todo) < 2:
            yield from map(run, todo)
            return
        workers = min(self.workers, len(todo))
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker) as pool:
            rest = iter(todo)
            running = {pool.submit(run, item) for item in islice(rest, 2 * workers)}
            try:
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
                    running |= {pool.submit(run, item) for item in islice(rest, len(done))}
            except BrokenProcessPool as err:
                raise ShardError(
                    "a worker process died (killed, or out of memory); what was committed stays: "
                    "run the same command again to continue, with fewer workers if memory is short"
                ) from err
            finally:
                for future in running:
                    future.cancel()


def _begin_worker() -> None:
    """The parent alone answers Ctrl-C, and a worker never outlives it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"
    parent.join()
    os._exit(1)
