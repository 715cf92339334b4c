"""The forecast beside the stream itself: sleeping ranks, a store with latency."""

import io
import random
import threading
import time
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moco_scale.forecast import IN_FLIGHT, STEP, TAIL, Inputs, Rates, Reading, Run, forecast
from pipelines.ahead import Ahead
from pipelines.order import Order
from pipelines.quarantine import Quarantine
from pipelines.stream import EncodedBatch, Need, Source, Stream
from shards import ShardSet
from tests.support.made_sets import Made, make_set
from tests.support.shard_sets import picture

pytestmark = pytest.mark.slow

RANKS, BATCH, BLOCK, STEP_S = 4, 16, 8, 0.03
SAMPLES, SHARD_SAMPLES = 26_000, 500
STEPS, WARM_UP = 400, 100
DEADLINE_S = 60.0


class _SlowStore:
    """A store whose reads of tars take a while, one in a hundred longer."""

    def __init__(self, inner: Any, *, latency_s: float, late_s: float, seed: int) -> None:
        self._inner = inner
        self._latency_s = latency_s
        self._late_s = late_s
        self._draw = random.Random(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read_ranges(self, path: str, *arguments: Any, **more: Any) -> Any:
        if path.endswith(".tar"):
            time.sleep(self._late_s if self._draw.random() < 0.01 else self._latency_s)
        return self._inner.read_ranges(path, *arguments, **more)


@pytest.fixture(scope="module")
def pictures() -> list[bytes]:
    return [picture(number) for number in range(8)]


@pytest.fixture(scope="module")
def url(pictures: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = [Image.open(io.BytesIO(data)).size for data in pictures]
    made = [
        Made(uri=f"{number}", data=data, width=width, height=height)
        for number, (data, (width, height)) in enumerate(zip(pictures, sizes, strict=True))
    ]
    shard = [made[number % len(made)] for number in range(SHARD_SAMPLES)]
    folder = str(tmp_path_factory.mktemp("made") / "set")
    make_set(folder, [shard] * (SAMPLES // SHARD_SAMPLES))
    return folder


def _needs(shard_set: ShardSet, rank: int) -> Iterator[Need]:
    lanes = RANKS * BATCH
    order = Order(shard_set.samples, seed=4, lanes=lanes, block=BLOCK)
    for step in range(STEPS):
        start = step * lanes + rank * BATCH
        shards, members = order.samples(0, start, start + BATCH)
        positions = np.arange(start, start + BATCH)
        yield Need(
            positions=positions,
            lanes=positions % lanes,
            sources=np.zeros(BATCH, dtype=np.int64),
            shards=shards,
            members=members,
        )


def _step_s(url: str, *, latency_s: float, late_s: float) -> float:
    """Mean seconds of a step of all ranks, each a thread."""
    together, times, errors = threading.Barrier(RANKS), [], []

    def same(batches: Stream) -> Generator[EncodedBatch, None, None]:
        yield from batches  # stands for the stage that decodes

    def train(rank: int) -> None:
        shard_set = ShardSet.open(url)
        slow = _SlowStore(shard_set.store, latency_s=latency_s, late_s=late_s, seed=rank)
        shard_set.store = slow  # type: ignore[assignment]
        stream = Stream(
            {0: Source(shard_set=shard_set, first_id=0)},
            _needs(shard_set, rank),
            num_lanes=BATCH,
            block=BLOCK,
            seed=4,
            prefetch_batches=2,
            buffer_bytes=1 << 30,
            max_pixels=10**6,
            wait_timeout_s=DEADLINE_S,
            quarantine=Quarantine(max_bad_frac=0.5, world_size=1),
            on_bad="replace",
        )
        views = Ahead(same(stream), size=2, name="views")
        try:
            for _ in range(STEPS):
                views.get(timeout_s=DEADLINE_S)
                together.wait(DEADLINE_S)
                if rank == 0:
                    times.append(time.perf_counter())
                time.sleep(STEP_S)
        except Exception as err:
            errors.append(err)
            together.abort()
        finally:
            stream.close()
            views.close(timeout_s=DEADLINE_S)

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(4 * DEADLINE_S)
    assert not errors, errors
    return (times[-1] - times[WARM_UP]) / (STEPS - 1 - WARM_UP)


@pytest.mark.parametrize(
    ("latency_s", "late_s", "bound_by"),
    [(0.01, 0.01, STEP), (0.15, 0.15, STEP), (0.4, 0.4, IN_FLIGHT), (0.02, 0.8, TAIL)],
)
def test_the_stream_waits_as_forecast(
    latency_s: float, late_s: float, bound_by: str, url: str, pictures: list[bytes]
) -> None:
    predicted = forecast(
        Inputs(
            run=Run(images=SAMPLES, epochs=1, gpus=RANKS, global_batch_size=RANKS * BATCH),
            rates=Rates(
                step_pairs_per_s=BATCH / STEP_S,
                image_bytes=sum(map(len, pictures)) / len(pictures),
                get_latency_s=0.99 * latency_s + 0.01 * late_s,
                get_latency_p99_s=late_s,
            ),
            reading=Reading(block_samples=BLOCK),
        )
    ).asked

    step_s = _step_s(url, latency_s=latency_s, late_s=late_s)

    predicted_s = RANKS * BATCH / predicted.samples_per_s
    print(f"forecast {1e3 * predicted_s:.1f} ms, measured {1e3 * step_s:.1f} ms a step")
    assert predicted.bound_by == bound_by
    assert step_s == pytest.approx(predicted_s, rel=0.2)
