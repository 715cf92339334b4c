"""Ranks that sleep instead of training, on a store and cores that sleep instead of working.

What a forecast is held against: nothing here knows of its formulas.
"""

import heapq
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

DEADLINE_S = 30.0
PLANNED_AHEAD, PLANNED_AT_MOST = 8, 32  # the rule of pipelines/stream.py
IN_HANDS = 6  # batches behind the reads: two stages with two ready and one more each


class Server:
    """Serves one after another, in `seconds` each; None: at once."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._free_at = 0.0
        self._lock = threading.Lock()

    def serve(self) -> None:
        if self._seconds is None:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + self._seconds
            until = self._free_at
        time.sleep(max(0.0, until - time.perf_counter()))


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A run of sleeping ranks that step together."""

    ranks: int
    batch_size: int
    block: int
    step_s: float
    reads_in_flight: int
    get_s: float | None = None
    """What the store takes for a GET, of all ranks one after another."""
    latency_s: float = 0.0
    core_s: float | None = None
    """Core-seconds of a batch."""
    cores: int = 1

    def samples_per_s(self, *, warm_up: int, steps: int) -> float:
        """Of all ranks, over `steps` steps after the first `warm_up`."""
        store, cores = Server(self.get_s), [Server(self.core_s) for _ in range(self.cores)]
        together = threading.Barrier(self.ranks)
        times: list[float] = []

        def read() -> None:
            store.serve()
            time.sleep(self.latency_s)

        def train(rank: int) -> None:
            with ThreadPoolExecutor(self.reads_in_flight) as pool:
                loader = _Loader(
                    lambda: [pool.submit(read) for _ in range(self.batch_size // self.block)],
                    decode=cores[rank % self.cores].serve,
                    reads_in_flight=self.reads_in_flight,
                )
                with loader:
                    for _ in range(warm_up + steps):
                        loader.take()
                        together.wait(DEADLINE_S)
                        if rank == 0:
                            times.append(time.perf_counter())
                        time.sleep(self.step_s)

        with ThreadPoolExecutor(self.ranks) as pool:
            for done in [pool.submit(train, rank) for rank in range(self.ranks)]:
                done.result(DEADLINE_S)
        return self.ranks * self.batch_size * (steps - 1) / (times[-1] - times[warm_up])


class _Loader:
    """Plans, reads and decodes ahead in a thread."""

    def __init__(
        self,
        start: Callable[[], list[Future[None]]],
        *,
        decode: Callable[[], None],
        reads_in_flight: int,
    ) -> None:
        self._start = start
        self._decode = decode
        self._most = reads_in_flight
        self._ready = threading.Semaphore(0)
        self._room = threading.Semaphore(IN_HANDS)
        self._closed = False
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self._room.release()
        self._thread.join(DEADLINE_S)

    def take(self) -> None:
        assert self._ready.acquire(timeout=DEADLINE_S), "no batch came"
        self._room.release()

    def _run(self) -> None:
        planned: deque[list[Future[None]]] = deque()
        while self._room.acquire(timeout=DEADLINE_S) and not self._closed:
            while not self._is_enough(planned):
                planned.append(self._start())
            for one in planned.popleft():
                one.result(DEADLINE_S)
            self._decode()
            self._ready.release()
        for reads in planned:
            for one in reads:
                one.cancel()

    def _is_enough(self, planned: "deque[list[Future[None]]]") -> bool:
        if not PLANNED_AHEAD <= len(planned) < PLANNED_AT_MOST:
            return len(planned) >= PLANNED_AHEAD
        running = sum(not one.done() for reads in planned for one in reads)
        return running >= self._most or all(one.done() for one in planned[0])


def step_with_late_reads(
    *,
    ranks: int,
    reads_per_batch: float,
    step_s: float,
    latency_s: float,
    late_s: float,
    late_frac: float,
    steps: int,
    seed: int,
) -> float:
    """Mean seconds of a step where some reads are late, by the same rule in simulated time."""
    draw = random.Random(seed)
    planned: list[deque[float]] = [deque() for _ in range(ranks)]  # when a batch's reads are done
    threads = [[0.0] * 16 for _ in range(ranks)]  # when each will be free
    fraction = [draw.random() for _ in range(ranks)]
    made = [0.0] * ranks
    begun: list[float] = []
    for step in range(steps):
        for rank in range(ranks):
            now = max(made[rank], begun[step - IN_HANDS] if step >= IN_HANDS else 0.0)
            mine = planned[rank]
            while len(mine) < PLANNED_AHEAD or (
                len(mine) < PLANNED_AT_MOST
                and mine[0] > now
                and any(free <= now for free in threads[rank])
            ):
                fraction[rank] += reads_per_batch
                done = now
                while fraction[rank] >= 1:
                    fraction[rank] -= 1
                    takes = late_s if draw.random() < late_frac else latency_s
                    ends = max(heapq.heappop(threads[rank]), now) + takes
                    heapq.heappush(threads[rank], ends)
                    done = max(done, ends)
                mine.append(done)
            made[rank] = max(now, mine.popleft())
        begun.append(max([*made, begun[-1] + step_s if begun else 0.0]))
    first = steps // 5
    return (begun[-1] - begun[first]) / (steps - 1 - first)
