"""The stream from a real S3 server behind a faulty proxy: the same batches, or an end in time."""

import io
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image

from demo.local_s3 import LocalS3
from pipelines.config import DataConfig
from pipelines.errors import StalledError
from pipelines.streaming_loader import open_loader
from shards import ShardSet
from shards.errors import ChangedError, NotFoundError, StoreError, UnreachableError
from shards.store import open_store
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.made_sets import Made, make_set

pytestmark = pytest.mark.timeout(120)
BATCH, STEPS = 12, 10
TAR = r"\.tar"


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    """Of some 20 kB, so that blocks are long enough to break in the middle."""
    found = []
    for number in range(8):
        noise = np.random.default_rng(number).integers(0, 256, (90, 120, 3), dtype=np.uint8)
        written = io.BytesIO()
        Image.fromarray(noise).save(written, "JPEG", quality=95)
        found.append(written.getvalue())
    return found


@pytest.fixture
def url(s3: LocalS3, jpegs: list[bytes], request: pytest.FixtureRequest) -> str:
    name = "".join(c for c in request.node.name if c.isalnum())[-40:].lower()
    made = f"{s3.make_bucket('s' + name)}/set"
    make_set(
        made,
        [
            [
                Made(uri=f"r/{s}-{n}", data=jpegs[(s + n) % 8], width=120, height=90)
                for n in range(60)
            ]
            for s in range(4)
        ],
    )
    return made


@pytest.fixture
def proxy(s3: LocalS3, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with FaultyProxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


def served(
    url: str,
    proxy: FaultyProxy,
    faults: Sequence[Fault] = (),
    *,
    wait_timeout_s: float = 90,
    buffer_bytes: int = 2**30,
) -> tuple[list[int], list[float], Any]:
    """Sample ids, sums of pixels, and statistics."""
    config = DataConfig(
        shards=(url,),
        global_batch_size=BATCH,
        block_samples=16,
        view_size=24,
        num_threads=1,
        wait_timeout_s=wait_timeout_s,
        buffer_bytes=buffer_bytes,
    )
    proxy.faults = []
    loader = open_loader(config, seed=3, rank=0, world_size=1, device_index=None)
    proxy.faults = list(faults)
    try:
        batches = [next(loader) for _ in range(STEPS)]
        assert not any(batch.replaced for batch in batches)
        return (
            np.concatenate([batch.sample_ids for batch in batches]).tolist(),
            [float(batch.view_q.double().sum()) for batch in batches],
            loader.stats().stream,
        )
    finally:
        loader.close()


@pytest.mark.parametrize(
    "fault",
    [
        Fault("reset", path=TAR, times=2, per_path=True),
        Fault("status", path=TAR, status=503, times=8),
        Fault("status", path=TAR, status=500, times=3),
        Fault("whole", path=TAR, times=2),
        Fault("shift", path=TAR, times=2),
        Fault("truncate", path=TAR, times=2, per_path=True),
        Fault("drip", path=TAR, times=1, drip_s=0.0001),
        Fault("status", path="index", status=503, times=4),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.status if fault.kind == 'status' else ''}",
)
@pytest.mark.parametrize("buffer_bytes", [2**30, 100_000], ids=["blocks", "one by one"])
def test_batches_are_exactly_those_without_faults(
    url: str, proxy: FaultyProxy, fault: Fault, buffer_bytes: int
) -> None:
    ids, pixels, _ = served(url, proxy)

    again, others, stats = served(url, proxy, [fault], buffer_bytes=buffer_bytes)

    assert again == ids
    assert others == pixels
    assert proxy.struck(fault) > 0
    assert fault.kind == "drip" or stats.retries > 0 or "index" in fault.path


def test_a_long_body_that_breaks_is_gone_on_with_at_the_byte(
    s3: LocalS3, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
    data = np.random.default_rng(0).integers(0, 256, 8 * 2**20, dtype=np.uint8).tobytes()
    bucket = s3.make_bucket("resumed")
    open_store(bucket).put("shard.tar", data)
    store = open_store(bucket)
    etag = store.head("shard.tar").etag
    # Not a reset, which may take bytes along that have come already.
    proxy.faults = [Fault("truncate", path=TAR, method="GET", times=1)]
    before = len(proxy.requests)

    (found,) = store.read_ranges("shard.tar", [1000], [7_000_000])

    assert bytes(found) == data[1000:7_000_000]
    first, second = [one for one in proxy.requests[before:] if one.method == "GET"]
    assert first.headers["range"] == "bytes=1000-6999999"
    start, stop = second.headers["range"].removeprefix("bytes=").split("-")
    assert 3_000_000 < int(start) <= 3_500_500
    assert int(stop) == 6_999_999
    assert second.headers["if-match"].strip('"') == etag
    assert store.stats().resumes == 1


def test_an_object_that_changes_while_a_body_is_resumed_is_an_error(
    s3: LocalS3, proxy: FaultyProxy
) -> None:
    data = bytes(8 * 2**20)
    store = open_store(s3.make_bucket("changed-meanwhile"))
    store.put("shard.tar", data)
    breaks = Fault("truncate", path=TAR, method="GET", times=1)
    changes = Fault("etag", path=TAR, method="GET")
    proxy.faults = [breaks, changes]

    with pytest.raises(ChangedError, match=r"shard\.tar: changed"):
        store.read_ranges("shard.tar", [0], [len(data)])


def test_a_silent_store_ends_the_run_in_time_with_its_name(url: str, proxy: FaultyProxy) -> None:
    began = time.monotonic()

    with pytest.raises((StalledError, UnreachableError), match=r"shards?/.*\.tar|\.tar"):
        served(url, proxy, [Fault("stall", path=TAR)], wait_timeout_s=6)

    assert time.monotonic() - began < 40


@pytest.mark.parametrize("status", [403, 503])
def test_a_store_that_refuses_for_good_ends_the_run_in_time_with_its_name(
    url: str, proxy: FaultyProxy, status: int
) -> None:
    began = time.monotonic()

    with pytest.raises(StoreError, match=r"\.tar"):
        served(url, proxy, [Fault("status", path=TAR, status=status)], wait_timeout_s=6)

    assert time.monotonic() - began < 40


def test_a_shard_that_is_cut_short_or_gone_is_named(url: str, proxy: FaultyProxy) -> None:
    shard_set = ShardSet.open(url)
    store, name = shard_set.store, shard_set.names[2]
    whole = bytes(store.read(name))

    store.put(name, whole[: len(whole) // 2])
    with pytest.raises(ChangedError, match=rf"{name} was replaced since it was indexed"):
        served(url, proxy)
    store.delete([name])
    with pytest.raises(NotFoundError, match=name):
        served(url, proxy)
