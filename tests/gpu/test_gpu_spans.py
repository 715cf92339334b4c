"""Spans on a GPU: what the device did, on the host's clock, although the host only queued it."""

import threading
import time

import pytest
import torch

from moco_scale.phases import STEP, DeviceSpans, seconds_by_phase

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(60),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def test_the_device_is_timed_where_the_host_does_not_wait_for_it() -> None:
    device = torch.device("cuda", 0)
    spans, main = DeviceSpans(device), threading.current_thread().name
    matrix = torch.randn(4096, 4096, device=device)
    matrix @ matrix  # loads the library

    end = spans.begin_on_device()
    spans.recording = True
    began_s = time.perf_counter()
    with spans.of(STEP):
        with spans.of("data_wait"):  # the device is idle meanwhile
            time.sleep(0.05)
        with spans.of("forward"):
            for _ in range(100):
                matrix = matrix @ matrix / 64
    queued_s = time.perf_counter() - began_s
    spans.recording = False
    end()
    all_s = time.perf_counter() - began_s

    taken = spans.take()
    assert sorted((one.name, one.thread) for one in taken) == sorted(
        (name, thread) for name in (STEP, "data_wait", "forward") for thread in (main, "cuda:0")
    )
    (on_device,) = seconds_by_phase(taken, thread=spans.thread)
    (on_host,) = seconds_by_phase(taken, thread=main)
    assert on_device["data_wait"] >= 0.049
    assert on_device["forward"] > on_host["forward"]
    assert queued_s < sum(on_device.values()) <= all_s + 0.001
    for one in taken:
        assert began_s - 0.001 <= one.start_s <= one.end_s <= began_s + all_s + 0.001


def test_other_threads_are_not_timed_on_the_device() -> None:
    spans = DeviceSpans(torch.device("cuda", 0))

    def make() -> None:
        with spans.of("make"):
            pass

    end = spans.begin_on_device()
    spans.recording = True
    thread = threading.Thread(target=make, name="views")
    thread.start()
    thread.join()
    end()

    assert [(one.name, one.thread) for one in spans.take()] == [("make", "views")]
