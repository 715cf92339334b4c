"""The phases of a training step: their spans, on the host and on an accelerator, and their seconds.

The thread that trains records them through `Ranks.spans`: a span `step` from border to border, in
it the phases below, and in those, or between them, what torch.distributed is called for.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch

from pipelines.spans import TRANSFER, Span, Spans

STEP = "step"
DATA_WAIT = "data_wait"
FORWARD = "forward"
"""Of both encoders, and the loss; inside it BN_SHUFFLE."""
BN_SHUFFLE = "bn_shuffle"
BACKWARD = "backward"
ALL_REDUCE = "all_reduce"
"""Gradients into one buffer, and back; inside it the collective."""
OPTIMIZER = "optimizer"
KEY_UPDATE = "key_update"
ENQUEUE = "enqueue"
MEASURE = "measure"
"""A row of metrics."""
CHECKPOINT = "checkpoint"
"""What saving holds the step up."""
COLLECTIVE = "collective"
"""Before the names of spans in which other ranks are waited for and exchanged with. Those who come
last wait least in them."""
COLLECTIVES, OTHER = "collectives", "other"

PHASES = (
    DATA_WAIT, TRANSFER, FORWARD, BN_SHUFFLE, BACKWARD, ALL_REDUCE, OPTIMIZER, KEY_UPDATE, ENQUEUE,
    MEASURE, CHECKPOINT, COLLECTIVES, OTHER,
)  # fmt: skip
"""By which the seconds of a step are told; each second counts in one of them."""
NOT_OWN = (COLLECTIVES, MEASURE, CHECKPOINT)
"""Phases in which a rank waits for others, or does what rank 0 alone does now and then."""


def seconds_by_phase(spans: Sequence[Span], *, thread: str) -> list[dict[str, float]]:
    """The seconds of each step, by phase, as the spans of one thread show them.

    A second counts in the innermost phase that it lies in, but in COLLECTIVES if it lies in a
    collective; so they add up to the step's.

    Args:
        thread: the one that trains, or `DeviceSpans.thread` for the same steps on the device.
    """
    # A span before those inside it, which begin and end within it.
    own = sorted(
        (one for one in spans if one.thread == thread), key=lambda one: (one.start_s, -one.end_s)
    )
    found: list[dict[str, float]] = []
    open_: list[tuple[float, str]] = []  # end and phase, the innermost last
    for one in own:
        while open_ and open_[-1][0] <= one.start_s:
            open_.pop()
        if one.name == STEP:
            found.append(dict.fromkeys(PHASES, 0.0))
            open_, phase = [], OTHER
        elif not open_:  # between steps
            continue
        else:
            around = open_[-1][1]
            phase = around if around == COLLECTIVES else _phase(one.name, around)
            found[-1][around] -= one.seconds
        found[-1][phase] += one.seconds
        open_.append((one.end_s, phase))
    return found


def _phase(name: str, around: str) -> str:
    if name.startswith(COLLECTIVE):
        return COLLECTIVES
    return name if name in PHASES else around


class DeviceSpans(Spans):
    """Spans of which those of one thread are taken on its accelerator, too.

    The host only queues work, so each of that thread's spans is enclosed by two CUDA events on the
    current stream. They are read when the recording has ended: reading one sooner would wait for
    the device. What the device did not have to do between the two events, it waited there: for the
    host, that is for data, or, in a collective, for other ranks.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.thread = str(device)
        """Name under which the spans on the device are kept."""
        self._device = device
        self._of_thread: threading.Thread | None = None
        self._marked: list[_Marked] = []

    def of(
        self, name: str, *, samples: int = 0, size_bytes: int = 0
    ) -> AbstractContextManager[None]:
        around = super().of(name, samples=samples, size_bytes=size_bytes)
        if not self.recording or threading.current_thread() is not self._of_thread:
            return around
        return self._on_both(around, name)

    def begin_on_device(self) -> Callable[[], None]:
        """Take the calling thread's spans on the device, too, from now on.

        Waits for the device, here and in what it returns.

        Returns:
            What ends it, and keeps the spans on the device.
        """
        self._of_thread = threading.current_thread()
        torch.cuda.synchronize(self._device)
        reference = self._mark()
        reference.synchronize()  # nothing else is queued, so it has passed now
        reference_s = time.perf_counter()

        def end() -> None:
            self._of_thread = None
            torch.cuda.synchronize(self._device)
            marked, self._marked = self._marked, []
            for name, before, after in marked:
                start_s, end_s = (
                    reference_s + reference.elapsed_time(event) / 1000 for event in (before, after)
                )
                self.keep(Span(name, self.thread, start_s, end_s, 0.0, 0, 0))

        return end

    @contextmanager
    def _on_both(self, around: AbstractContextManager[None], name: str) -> Iterator[None]:
        with around:
            before = self._mark()
            try:
                yield
            finally:
                self._marked.append(_Marked(name, before, self._mark()))

    def _mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
        event.record(torch.cuda.current_stream(self._device))
        return event


class _Marked(NamedTuple):
    """A span on the device, whose times are not known yet."""

    name: str
    before: torch.cuda.Event
    after: torch.cuda.Event
