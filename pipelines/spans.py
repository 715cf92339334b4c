"""What happened when, and in which thread: named spans of time, kept while someone records."""

import threading
import time
from collections import deque
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import NamedTuple

READ = "read"
"""A block's range request, retries included; in one of the threads that read."""
CHECK = "check"
"""Its samples cut out, each checksum compared, each header looked at; in the same thread."""
PLAN = "plan"
"""Which samples a batch takes, and its reads begun; in the stream's thread."""
ASSEMBLE = "assemble"
"""An encoded batch put together of the blocks that are here; in the stream's thread."""
FEED = "feed"
"""Views drawn, and a batch given to DALI; in the thread that makes views."""
MAKE = "make"
"""A batch of views, by the threads below or by DALI; in the thread that makes views."""
DECODE = "decode"
"""A sample's image, on the CPU path; in one of the decoding threads."""
AUGMENT = "augment"
"""Its two views drawn; in the same thread."""
TRANSFER = "transfer"
"""A batch of views on its way to the device, as far as the host waits for it."""
STREAM, VIEWS = "stream", "views"
"""The two stages that hand batches over. What takes a stage's batches has a span "wait for NAME"
for each, the stage itself one "NAME waits for room", and the stream one "wait for read"."""

_NOTHING: AbstractContextManager[None] = nullcontext()


class Span(NamedTuple):
    """Something that a thread did, or waited for."""

    name: str
    thread: str
    start_s: float
    """Of `time.perf_counter`, as is the end."""
    end_s: float
    cpu_s: float
    """CPU-seconds of that thread in it."""
    samples: int
    """Samples that it was about; 0 where that says nothing."""
    size_bytes: int
    """Bytes that it read, or turned into something else."""

    @property
    def seconds(self) -> float:
        return self.end_s - self.start_s


class Spans:
    """Takes spans from any thread; keeps none, and looks at no clock, unless it is recording."""

    def __init__(self) -> None:
        self.recording = False
        self._kept: deque[Span] = deque()

    def of(
        self, name: str, *, samples: int = 0, size_bytes: int = 0
    ) -> AbstractContextManager[None]:
        """Keep what lies inside as one span, if this is recording when it begins."""
        if not self.recording:
            return _NOTHING
        return _Open(self._kept, name, samples, size_bytes)

    def keep(self, span: Span) -> None:
        """Keep one whose times were found otherwise, recording or not."""
        self._kept.append(span)

    def take(self) -> list[Span]:
        """What was kept since the last call, in the order of its ends."""
        taken = []
        while self._kept:
            taken.append(self._kept.popleft())
        return taken


class _Open:
    """A span that has begun."""

    __slots__ = ("_cpu_s", "_kept", "_name", "_samples", "_size_bytes", "_start_s")

    def __init__(self, kept: deque[Span], name: str, samples: int, size_bytes: int) -> None:
        self._kept = kept
        self._name = name
        self._samples = samples
        self._size_bytes = size_bytes

    def __enter__(self) -> None:
        self._cpu_s = time.thread_time()
        self._start_s = time.perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        end_s = time.perf_counter()
        self._kept.append(
            Span(
                self._name,
                threading.current_thread().name,
                self._start_s,
                end_s,
                time.thread_time() - self._cpu_s,
                self._samples,
                self._size_bytes,
            )
        )
