"""Spans as a trace that Perfetto (ui.perfetto.dev) and chrome://tracing open.

JSON of the Trace Event Format
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU), gzipped. One
process a rank, one track a thread, counters of what a sampler saw. Times are microseconds.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from moco_scale.profiles import Moment
from pipelines.spans import Span


def trace_bytes(
    spans: Sequence[Span],
    moments: Sequence[Moment],
    *,
    rank: int,
    host: str,
    first_thread: str,
    zero_s: float,
    sampled_from_s: float,
) -> bytes:
    """The file of one rank.

    Args:
        first_thread: shown above the others: the one that trains.
        zero_s: the time of `perf_counter` that is 0 in the trace; where it is the same moment on
            all ranks, their traces line up.
        sampled_from_s: the time of `perf_counter` that the seconds of `moments` begin at.
    """
    events = [_about(rank, "process_name", name=f"rank {rank} ({host})")]
    events.append(_about(rank, "process_sort_index", sort_index=rank))
    for number, (thread, own) in enumerate(_tracks(spans, first_thread), start=1):
        events.append(_about(rank, "thread_name", tid=number, name=thread))
        events.append(_about(rank, "thread_sort_index", tid=number, sort_index=number))
        events += [_complete(one, rank=rank, track=number, zero_s=zero_s) for one in own]
    for one in moments:
        time_us = _ns(sampled_from_s + one.second - zero_s) / 1000
        events += [
            {"name": name, "ph": "C", "pid": rank, "tid": 0, "ts": time_us, "args": values}
            for name, values in _counters(one)
        ]
    written = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})
    return gzip.compress(written.encode(), compresslevel=3, mtime=0)


def _about(rank: int, kind: str, *, tid: int = 0, **values: str | int) -> dict[str, Any]:
    return {"name": kind, "ph": "M", "pid": rank, "tid": tid, "ts": 0, "args": values}


def _complete(span: Span, *, rank: int, track: int, zero_s: float) -> dict[str, Any]:
    # Both ends are rounded alike, so that what lies inside another span still does.
    start_ns, end_ns = _ns(span.start_s - zero_s), _ns(span.end_s - zero_s)
    event: dict[str, Any] = {
        "name": span.name,
        "ph": "X",
        "pid": rank,
        "tid": track,
        "ts": start_ns / 1000,
        "dur": (end_ns - start_ns) / 1000,
        "args": {"cpu_ms": round(1000 * span.cpu_s, 3)},
    }
    if span.samples:
        event["args"]["samples"] = span.samples
    if span.size_bytes:
        event["args"]["bytes"] = span.size_bytes
    return event


def _counters(moment: Moment) -> Iterator[tuple[str, dict[str, float]]]:
    yield "batches ready", {"stream": moment.stream_ready, "views": moment.views_ready}
    yield "held MB", {"encoded": moment.held_bytes / 1e6}
    yield "CPU %", {"of the rank's cores": 100 * moment.cpu_frac}
    if moment.gpu_frac is not None:
        yield "GPU %", {"busy": 100 * moment.gpu_frac}
    if moment.received_bytes_per_s is not None:
        yield "received MB/s", {"network": moment.received_bytes_per_s / 1e6}


def _tracks(spans: Sequence[Span], first_thread: str) -> list[tuple[str, list[Span]]]:
    """Spans by track, in each of which they lie inside each other or apart.

    That is a thread, or several tracks for threads of one name, as two pools may have.
    """
    by_thread: dict[str, list[Span]] = defaultdict(list)
    for one in sorted(spans, key=lambda one: (one.start_s, -one.end_s)):
        by_thread[one.thread].append(one)
    tracks = []
    for thread in sorted(by_thread, key=lambda name: (name != first_thread, name)):
        lanes: list[tuple[list[Span], list[float]]] = []  # spans, and ends of those still open
        for one in by_thread[thread]:
            for _, ends in lanes:
                while ends and ends[-1] <= one.start_s:
                    ends.pop()
            lane = next((lane for lane in lanes if not lane[1] or one.end_s <= lane[1][-1]), None)
            if lane is None:
                lane = ([], [])
                lanes.append(lane)
            lane[0].append(one)
            lane[1].append(one.end_s)
        tracks += [
            (thread if not number else f"{thread} ({number + 1})", own)
            for number, (own, _) in enumerate(lanes)
        ]
    return tracks


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
