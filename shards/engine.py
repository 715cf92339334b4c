"""Where work runs: the same `map` over local processes and, in time, over a Ray cluster."""

import multiprocessing
import os
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
        """Results as they finish; the first error ends it."""


class LocalEngine:
    """Processes of this machine, spawned so that no client or thread is inherited half-made."""

    def __init__(self, workers: int) -> None:
        self.workers = workers or os.cpu_count() or 1

    def map(self, run: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        todo = list(items)
        if self.workers == 1 or len(todo) < 2:
            yield from map(run, todo)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(self.workers, len(todo)), mp_context=context) as pool:
            rest = iter(todo)
            running = {pool.submit(run, item) for item in islice(rest, 2 * self.workers)}
            try:
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
                    running |= {pool.submit(run, item) for item in islice(rest, len(done))}
            except BrokenProcessPool as err:
                raise ShardError(
                    "a worker process died (out of memory, killed, or a decoder crashed); what was "
                    "committed stays: run the same command again to continue"
                ) from err
            finally:
                for future in running:
                    future.cancel()
