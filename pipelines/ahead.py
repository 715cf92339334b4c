"""A bounded hand-over between two stages: a generator run by a thread, some items ahead."""

import threading
import time
import traceback
from collections import deque
from collections.abc import Generator
from typing import Generic, TypeVar

from pipelines.spans import Spans
from pipelines.stats import StageStats

T = TypeVar("T")


class Ahead(Generic[T]):
    """Runs `source` in a thread, at most `size` finished items ahead of whoever takes them."""

    def __init__(
        self,
        source: Generator[T, None, None],
        *,
        size: int,
        name: str,
        spans: Spans | None = None,
    ) -> None:
        self._source = source
        self._name = name
        self._spans = spans or Spans()
        self._size = size
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self._finished = 0
        self._busy_s = self._room_s = 0.0
        self.taker_waited_s = 0.0
        """Seconds that whoever takes the items has waited for them."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def get(self, *, timeout_s: float) -> T:
        """The next item.

        Raises:
            StopIteration: there are no more, or this was closed.
            TimeoutError: none came in time.
            Exception: whatever ended `source`, after the items before it.
        """
        with self._changed:
            began = time.perf_counter()
            with self._spans.of(f"wait for {self._name}"):
                came = self._changed.wait_for(
                    lambda: self._items or self._ended or self._closed, timeout=timeout_s
                )
            self.taker_waited_s += time.perf_counter() - began
            if not came:
                raise TimeoutError
            if self._items and not self._closed:
                self._changed.notify_all()
                return self._items.popleft()
            if self._error is not None and not self._closed:
                raise self._error
            raise StopIteration

    @property
    def num_ready(self) -> int:
        return len(self._items)

    def stats(self, *, wait_for_input_s: float) -> StageStats:
        """Of the stage that `source` is.

        Args:
            wait_for_input_s: of its time, what it waited for others.
        """
        return StageStats(
            name=self._name,
            batches=self._finished,
            ready=len(self._items),
            work_s=max(0.0, self._busy_s - wait_for_input_s),
            wait_for_input_s=wait_for_input_s,
            wait_for_room_s=self._room_s,
        )

    def close(self, *, timeout_s: float) -> bool:
        """Stop and forget what is ready; whether the thread ended in time. Harmless twice."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            began = time.perf_counter()
            for item in self._source:
                made = time.perf_counter()
                self._busy_s += made - began
                with self._changed:
                    # Without a deadline: the step may pause for hours, and close() ends the wait.
                    with self._spans.of(f"{self._name} waits for room"):
                        self._changed.wait_for(
                            lambda: len(self._items) < self._size or self._closed
                        )
                    if self._closed:
                        return
                    self._items.append(item)
                    self._finished += 1
                    self._changed.notify_all()
                del item  # the taker's alone, while the next one is made
                began = time.perf_counter()
                self._room_s += began - made
        except BaseException as err:  # every error belongs to the taker, who is in another thread
            # What they held would be held as long as the error is; in a cycle, if they hold it too.
            traceback.clear_frames(err.__traceback__)
            self._error = err
        finally:
            self._source.close()  # here, so that what it holds is gone when this thread has ended
            with self._changed:
                self._ended = True
                self._changed.notify_all()
