"""Ranks that train in simulated time, on a store and cores that take their time.

What a forecast is held against: nothing here knows of its formulas. Nobody sleeps, so that no other
work on the machine changes a figure.
"""

import heapq
import random
from collections import deque
from dataclasses import dataclass

PLANNED_AHEAD, PLANNED_AT_MOST = 8, 32  # the rule of pipelines/stream.py
IN_HANDS = 6  # batches behind the reads: two stages with two ready and one more each


class Server:
    """Serves one after another, in `seconds` each."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._free_at = 0.0

    def serve(self, asked_at: float) -> float:
        """When it is done with what was asked then."""
        self._free_at = max(self._free_at, asked_at) + self._seconds
        return self._free_at if self._seconds else asked_at


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """A run of ranks that step together."""

    ranks: int
    reads_per_batch: float
    step_s: float
    latency_s: float = 0.0
    reads_in_flight: int = 16
    late_s: float = 0.0
    """What a late read takes instead of `latency_s`."""
    late_frac: float = 0.0
    get_s: float = 0.0
    """What the store takes for a GET, of all ranks one after another."""
    core_s: float = 0.0
    """Core-seconds of a batch."""
    cores: int = 1

    def mean_step_s(self, *, steps: int, seed: int) -> float:
        """Seconds of a step, the first fifth of them left out."""
        draw = random.Random(seed)
        store, cores = Server(self.get_s), [Server(self.core_s) for _ in range(self.cores)]
        planned: list[deque[float]] = [deque() for _ in range(self.ranks)]  # when reads are done
        threads = [[0.0] * self.reads_in_flight for _ in range(self.ranks)]  # when each is free
        fraction = [draw.random() for _ in range(self.ranks)]
        made = [0.0] * self.ranks
        begun: list[float] = []
        for step in range(steps):
            for rank in range(self.ranks):
                now = max(made[rank], begun[step - IN_HANDS] if step >= IN_HANDS else 0.0)
                mine = planned[rank]
                while len(mine) < PLANNED_AHEAD or (
                    len(mine) < PLANNED_AT_MOST
                    and mine[0] > now
                    and any(free <= now for free in threads[rank])
                ):
                    fraction[rank] += self.reads_per_batch
                    done = now
                    while fraction[rank] >= 1:
                        fraction[rank] -= 1
                        takes = self.late_s if draw.random() < self.late_frac else self.latency_s
                        ends = store.serve(max(heapq.heappop(threads[rank]), now)) + takes
                        heapq.heappush(threads[rank], ends)
                        done = max(done, ends)
                    mine.append(done)
                made[rank] = cores[rank % self.cores].serve(max(now, mine.popleft()))
            begun.append(max([*made, begun[-1] + self.step_s if begun else 0.0]))
        first = steps // 5
        return (begun[-1] - begun[first]) / (steps - 1 - first)
