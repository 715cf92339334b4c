"""Traces: what the Trace Event Format asks of each event, and spans that lie inside each other."""

import gzip
import json
from collections import defaultdict
from typing import Any

import pytest

from moco_scale.profiles import Moment
from moco_scale.trace import trace_bytes
from pipelines.spans import Span

pytestmark = pytest.mark.timeout(240)
MOMENT = Moment(
    second=0.5,
    cpu_frac=0.25,
    gpu_frac=None,
    received_bytes_per_s=2e6,
    held_bytes=3_000_000,
    stream_ready=1,
    views_ready=2,
)


def events_of(trace: bytes) -> list[dict[str, Any]]:
    """The events of a file that has all that the format asks for.

    Complete events of a track lie inside each other or apart: Perfetto drops those that do not.
    """
    loaded = json.loads(gzip.decompress(trace))
    assert isinstance(loaded, dict)
    events: list[dict[str, Any]] = loaded["traceEvents"]
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    named = set()
    for event in events:
        assert isinstance(event["name"], str)
        assert {type(event[key]) for key in ("pid", "tid")} == {int}
        if event["ph"] == "M":
            assert event["name"] in (
                "process_name", "process_sort_index", "thread_name", "thread_sort_index",
            )  # fmt: skip
            (key,) = event["args"]
            assert key == ("name" if event["name"].endswith("_name") else "sort_index")
            if event["name"] == "thread_name":
                named.add((event["pid"], event["tid"]))
        elif event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(value, int | float) for value in event["args"].values())
            assert isinstance(event["ts"], int | float)
        else:
            assert event["ph"] == "X"
            assert event["dur"] >= 0
            start = round(1000 * event["ts"])
            tracks[event["pid"], event["tid"]].append((start, start + round(1000 * event["dur"])))
    assert tracks.keys() <= named
    for spans in tracks.values():
        ends: list[float] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while ends and ends[-1] <= start:
                ends.pop()
            assert not ends or end <= ends[-1]
            ends.append(end)
    return events


def trace_of(spans: list[Span], moments: list[Moment]) -> list[dict[str, Any]]:
    return events_of(
        trace_bytes(
            spans,
            moments,
            rank=3,
            host="node",
            first_thread="main",
            zero_s=100.0,
            sampled_from_s=101.0,
        )
    )


def test_a_span_is_a_complete_event_on_the_track_of_its_thread() -> None:
    events = trace_of(
        [
            Span("read", "a", 100.5, 101.0, 0.25, 4, 400),
            Span("forward", "main", 100.1, 100.2, 0.1, 0, 0),
        ],
        [],
    )

    assert [
        (event["name"], event["tid"], event["args"]) for event in events if event["ph"] == "M"
    ] == [
        ("process_name", 0, {"name": "rank 3 (node)"}),
        ("process_sort_index", 0, {"sort_index": 3}),
        ("thread_name", 1, {"name": "main"}),
        ("thread_sort_index", 1, {"sort_index": 1}),
        ("thread_name", 2, {"name": "a"}),
        ("thread_sort_index", 2, {"sort_index": 2}),
    ]
    forward, read = (event for event in events if event["ph"] == "X")
    assert (forward["tid"], forward["ts"], forward["dur"]) == (1, 100_000, 100_000)
    assert (read["tid"], read["ts"], read["dur"]) == (2, 500_000, 500_000)
    assert read["args"] == {"cpu_ms": 250.0, "samples": 4, "bytes": 400}


def test_what_a_sampler_saw_is_counters() -> None:
    events = trace_of([], [MOMENT])

    counters = {event["name"]: event for event in events if event["ph"] == "C"}
    assert counters["batches ready"]["args"] == {"stream": 1, "views": 2}
    assert counters["batches ready"]["ts"] == 1_500_000
    assert counters["held MB"]["args"] == {"encoded": 3.0}
    assert "GPU %" not in counters


def test_threads_of_one_name_have_a_track_each() -> None:
    both = [
        Span("one", "views_0", 101.0, 103.0, 0, 0, 0),
        Span("two", "views_0", 102, 104, 0, 0, 0),
    ]
    inside = Span("inside", "views_0", 102.5, 103.0, 0, 0, 0)

    events = trace_of([*both, inside], [])

    assert [event["args"]["name"] for event in events if event["name"] == "thread_name"] == [
        "views_0", "views_0 (2)",
    ]  # fmt: skip
    assert {event["name"]: event["tid"] for event in events if event["ph"] == "X"} == {
        "one": 1, "two": 2, "inside": 1,
    }  # fmt: skip
