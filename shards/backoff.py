"""Requests to a store: few enough at a time, tried again while that may help, and counted."""

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from shards.errors import StoreError
from shards.objects import StoreStats

logger = logging.getLogger(__name__)
T = TypeVar("T")

DEADLINE_S = 180.0
"""How long after its first attempt a request is begun anew. (The last attempt may take longer.)"""
FIRST_ANSWER_S = 15.0
"""The same, while a root has not answered this process once: an address is wrong more often."""
FEW = 4
"""Attempts where an answer is wrong, not late: what is so four times is always so."""
MOST_AT_ONCE = 128
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 20.0
_HALVED_AT_MOST_EVERY_S = 0.3
_WARNED_AT_MOST_EVERY_S = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """What an exception of a client means."""

    error: StoreError
    attempts: int | None
    """In all: 1 where another cannot help, None for as many as the time allows."""
    throttled: bool = False


class WrongAnswer(Exception):
    """An answer to something else than what was asked, or of another length."""


class Limiter:
    """How many requests this process has under way at one root.

    Halved when the store says that it is too much, raised by one for each round of successes.
    """

    def __init__(self, most: int = MOST_AT_ONCE) -> None:
        self._most = most
        self._lock = threading.Lock()  # taken alone it costs a third of the condition around it
        self._free = threading.Condition(self._lock)
        self._waiting = 0
        self._limit = float(most)
        self._running = 0
        self._halved_at = self._warned_at = float("-inf")
        self.answered = False

    @property
    def limit(self) -> int:
        return int(self._limit)

    def enter(self) -> None:
        """Wait for a place. Those who hold one have a deadline each, so this ends."""
        with self._lock:
            while self._running >= int(self._limit):
                self._waiting += 1
                self._free.wait()
                self._waiting -= 1
            self._running += 1

    def leave(self, *, answered: bool, throttled: bool = False) -> None:
        with self._lock:
            if throttled:
                now = time.monotonic()
                # Answers that were under way together tell of one overload, not of many.
                if now - self._halved_at >= _HALVED_AT_MOST_EVERY_S:
                    self._limit = max(1.0, min(self._limit, self._running) / 2)
                    self._halved_at = now
            elif answered and self._limit < self._most:
                self._limit = min(float(self._most), self._limit + 1 / self._limit)
            self.answered = self.answered or answered
            self._running -= 1
            if self._waiting:
                self._free.notify(2)  # one place is free, and the limit may have risen by one

    def may_warn(self) -> bool:
        """True once in a while: ten thousand throttled requests are one event."""
        with self._lock:
            now = time.monotonic()
            if now - self._warned_at < _WARNED_AT_MOST_EVERY_S:
                return False
            self._warned_at = now
            return True


_limiters: dict[tuple[int, str], Limiter] = {}


def limiter_of(root: str) -> Limiter:
    """The one limiter of this process for a root, such as endpoint and bucket."""
    # By process, since a fork may have copied one whose lock was held.
    return _limiters.setdefault((os.getpid(), root), Limiter())


class Requests:
    """Runs the requests of one store.

    Args:
        judge: what an exception means, given where it happened and the right that the request
            needs; what is not of the types `caught` is a bug and passes through.
    """

    def __init__(
        self,
        limiter: Limiter,
        *,
        caught: tuple[type[Exception], ...],
        judge: Callable[[Exception, str, str], Refusal],
        deadline_s: float = DEADLINE_S,
    ) -> None:
        self._limiter = limiter
        self._caught = caught
        self._judge = judge
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._requests = self._retries = self._resumes = self._throttles = 0
        self._read_bytes = self._written_bytes = 0

    def run(self, where: str, action: Callable[[int], T], *, right: str, reads: bool = False) -> T:
        """Do one request; `action` is given the number of the attempt, from 1.

        With `reads`, what it returns are bytes that were read. `right` is named where it is denied.

        Waits between attempts at random up to a bound that doubles (full jitter), so that clients
        which failed together do not come back together.
        """
        begun, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            self._limiter.enter()
            try:
                found = action(attempt)
            except self._caught as err:
                refusal, cause = self._judge(err, where, right), err
            except BaseException:
                self._limiter.leave(answered=False)
                raise
            else:
                self._limiter.leave(answered=True)
                with self._lock:
                    self._requests += 1
                    if reads:
                        self._read_bytes += len(found)  # type: ignore[arg-type]  # then it is bytes
                return found
            self._limiter.leave(
                answered=refusal.throttled or refusal.attempts is not None,
                throttled=refusal.throttled,
            )
            self._wait_or_raise(refusal, cause, attempt=attempt, begun=begun)

    def count(self, *, requests: int = 0, resumes: int = 0, written: int = 0) -> None:
        """Add to the statistics what `run` cannot know."""
        with self._lock:
            self._requests += requests
            self._resumes += resumes
            self._written_bytes += written

    def stats(self) -> StoreStats:
        with self._lock:
            return StoreStats(
                requests=self._requests,
                retries=self._retries,
                resumes=self._resumes,
                throttles=self._throttles,
                read_bytes=self._read_bytes,
                written_bytes=self._written_bytes,
            )

    def _wait_or_raise(
        self, refusal: Refusal, cause: Exception, *, attempt: int, begun: float
    ) -> None:
        with self._lock:
            self._requests += 1
            self._throttles += refusal.throttled
        bound = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(attempt, 16))
        wait = random.uniform(0, bound)
        over = attempt >= (refusal.attempts or float("inf"))
        limit = self._deadline_s if self._limiter.answered else FIRST_ANSWER_S
        passed = time.monotonic() - begun
        # An upload may take longer than the deadline; it, too, has a second attempt.
        late = attempt > 1 and passed + wait > min(limit, self._deadline_s)
        if over or late:
            if attempt == 1:
                raise refusal.error from cause
            error = type(refusal.error)(f"{refusal.error} ({attempt} attempts in {passed:.0f} s)")
            raise error from cause
        with self._lock:
            self._retries += 1
        if self._limiter.may_warn():
            logger.warning("%s; attempt %d, trying again", refusal.error, attempt)
        time.sleep(wait)
