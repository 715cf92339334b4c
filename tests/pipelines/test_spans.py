"""Spans: what is kept, of whom, and that nothing is kept unless someone records."""

import threading
import time

import pytest

from pipelines import DataConfig, open_loader
from pipelines.spans import (
    ASSEMBLE,
    AUGMENT,
    CHECK,
    DECODE,
    MAKE,
    PLAN,
    READ,
    STREAM,
    TRANSFER,
    VIEWS,
    Span,
    Spans,
)
from shards import ShardSet

pytestmark = pytest.mark.timeout(240)
BATCH, STEPS = 8, 6


def test_nothing_is_kept_before_the_recording_or_after_it() -> None:
    spans = Spans()

    with spans.of("before"):
        spans.recording = True
    with spans.of("inside", samples=3, size_bytes=7):
        spans.recording = False
    with spans.of("after"):
        pass

    (one,) = spans.take()
    assert (one.name, one.samples, one.size_bytes) == ("inside", 3, 7)
    assert one.thread == threading.current_thread().name
    assert spans.take() == []


def test_a_span_counts_the_cpu_seconds_of_its_own_thread_alone() -> None:
    spans = Spans()
    spans.recording = True
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        with spans.of("asleep"):
            time.sleep(0.2)
    finally:
        stop.set()
        thread.join()

    (one,) = spans.take()
    assert one.seconds >= 0.2
    assert one.cpu_s < 0.1


def test_a_span_that_fails_is_kept() -> None:
    spans = Spans()
    spans.recording = True

    with pytest.raises(ValueError, match="broken"), spans.of("fails"):
        raise ValueError("broken")

    assert [one.name for one in spans.take()] == ["fails"]


def test_every_stage_of_a_loader_says_what_it_did(shard_set: ShardSet) -> None:
    spans = Spans()
    spans.recording = True
    config = DataConfig(
        shards=(shard_set.url,), global_batch_size=BATCH, view_size=32, loader="cpu", num_threads=2
    )
    loader = open_loader(config, seed=1, rank=0, world_size=1, device_index=None, spans=spans)
    try:
        taken = [next(loader) for _ in range(STEPS)]
    finally:
        loader.close()

    found: dict[str, list[Span]] = {}
    for one in spans.take():
        found.setdefault(one.name, []).append(one)
    samples = {name: sum(one.samples for one in ones) for name, ones in found.items()}
    assert len(taken) == STEPS
    for name in (PLAN, ASSEMBLE, MAKE, DECODE, AUGMENT, TRANSFER):
        assert samples[name] >= STEPS * BATCH, name
    assert len(found[READ]) == len(found[CHECK]) > 0
    assert sum(one.size_bytes for one in found[READ]) > 0
    assert len(found[f"wait for {VIEWS}"]) == STEPS
    for name in (f"wait for {READ}", f"wait for {STREAM}", f"{STREAM} waits for room"):
        assert found[name], name
    assert {one.thread for one in found[PLAN]} == {STREAM}
    assert {one.thread for one in found[MAKE]} == {VIEWS}
    assert all(one.thread.startswith("views") for one in found[DECODE])
