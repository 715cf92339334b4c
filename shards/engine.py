"""Where work runs: the same `map` over processes of this machine and over a Ray cluster."""

import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Protocol, TypeVar

from shards.errors import ShardError, UserError

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")

_REPEATS = 20
_CONNECT_S = 10.0
_NO_CLUSTER_S = 900.0  # what Ray itself gives a cloud to start a node
_SAID_AFTER_S = 10.0


class Engine(Protocol):
    """Runs a picklable function over items; it may repeat or reorder them, as commits allow."""

    def map(self, run: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """Results as they finish; the first error ends it, after what is running has finished."""


class LocalEngine:
    """Processes of this machine. One worker runs in the calling process.

    They come from a server process that has only imported what they need, so that no client or
    thread is inherited half-made, and importing costs once instead of once a worker.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers or os.cpu_count() or 1

    def map(self, run: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        todo = list(items)
        if self.workers == 1 or len(todo) < 2:
            yield from map(run, todo)
            return
        workers = min(self.workers, len(todo))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([getattr(run, "func", run).__module__])
        with ProcessPoolExecutor(
            workers, mp_context=context, initializer=_begin_worker, initargs=(dict(os.environ),)
        ) as pool:
            rest = iter(todo)
            running: set[Future[Result]] = set()
            try:
                running = {_submit(pool, run, item) for item in islice(rest, 2 * workers)}
                while running:
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
                    running |= {_submit(pool, run, item) for item in islice(rest, len(done))}
            except BrokenProcessPool as err:
                raise ShardError(
                    "a worker process died (killed, or out of memory); what was committed stays: "
                    "run the same command again to continue, with fewer workers if memory is short"
                ) from err
            finally:
                for future in running:
                    future.cancel()


def _submit(
    pool: ProcessPoolExecutor, run: Callable[[Item], Result], item: Item
) -> "Future[Result]":
    try:
        return pool.submit(run, item)
    except (EOFError, ConnectionError) as err:  # the server that workers come from is gone
        raise BrokenProcessPool("no worker could be started") from err


class RayEngine:
    """Tasks of a Ray cluster, one CPU each. What a lost node was doing is done again elsewhere.

    Every node needs this package, and finds credentials for the stores by itself.
    """

    def __init__(self, address: str, workers: int) -> None:
        """Args:
        address: auto for a running cluster that this machine belongs to, or host:port.
        workers: tasks at once; 0 for as many as the cluster has CPUs, also while it grows.
        """
        self._address = address
        self._workers = workers

    def map(self, run: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        ray = _import_ray()
        is_ours = not ray.is_initialized()
        if is_ours:
            self._connect(ray)
        try:
            yield from self._map(ray, run, iter(items))
        finally:
            if is_ours:
                ray.shutdown()

    def _connect(self, ray: Any) -> None:
        try:
            if (place := re.fullmatch(r"([^/]+):(\d+)", self._address)) is not None:
                # Ray itself would ask for minutes.
                socket.create_connection((place[1], int(place[2])), timeout=_CONNECT_S).close()
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError, OSError) as err:
            said = (str(err).splitlines() or ["no answer"])[0]
            raise ShardError(
                f"no Ray cluster at {self._address} ({said}); start one with 'ray start --head', "
                "give --ray-address host:port, or pack with --engine local"
            ) from err

    def _map(
        self, ray: Any, run: Callable[[Item], Result], items: Iterator[Item]
    ) -> Iterator[Result]:
        # Ray repeats a task whose node or process died; an exception of ours comes through.
        task = ray.remote(num_cpus=1, max_retries=_REPEATS, scheduling_strategy="SPREAD")(_call)
        shared = ray.put(run)
        running: list[Any] = []
        last_seen, is_said = time.monotonic(), False
        while True:
            cpus = int(ray.cluster_resources().get("CPU", 0))
            if cpus:
                last_seen, is_said = time.monotonic(), False
            without_s = time.monotonic() - last_seen
            if without_s > _SAID_AFTER_S and not is_said:
                logger.warning(
                    "the Ray cluster has no CPU; waiting up to %.0f s for a node", _NO_CLUSTER_S
                )
                is_said = True
            if without_s > _NO_CLUSTER_S:
                raise ShardError(
                    f"the Ray cluster has had no CPU for {_NO_CLUSTER_S:.0f} s; what was committed "
                    "stays: run the same command again when it has"
                )
            # A cluster that has no worker yet starts one for a task that waits, and more for those
            # that wait then.
            room = (self._workers or 2 * max(1, cpus)) - len(running)
            running += [task.remote(shared, item) for item in islice(items, max(0, room))]
            if not running:
                return
            done, running = ray.wait(running, num_returns=1, timeout=1.0)
            for one in done:
                yield self._result(ray, one)

    def _result(self, ray: Any, task: Any) -> Any:
        try:
            return ray.get(task)
        except ray.exceptions.RayTaskError as err:
            if isinstance(err.cause, UserError):
                raise err.cause from err
            raise
        except ray.exceptions.RayError as err:
            said = (str(err).splitlines() or [type(err).__name__])[0]
            raise ShardError(
                f"a task was lost {_REPEATS} times over ({said}); what was committed stays: run "
                "the same command again to continue, with more memory a CPU if that is short"
            ) from err


def _call(run: Callable[[Item], Result], item: Item) -> Result:
    return run(item)


def _import_ray() -> Any:
    try:
        import ray  # an optional extra, and half a second to import
    except ImportError as err:
        raise ShardError("--engine ray needs Ray: pip install 'moco-scale[ray]'") from err
    return ray


def _begin_worker(environment: dict[str, str]) -> None:
    """The parent alone answers Ctrl-C, and a worker never outlives it.

    Args:
        environment: the parent's, as it is now: the server may be older.
    """
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "this runs in a worker"
    parent.join()
    os._exit(1)
