"""Random needs, bounds and stores: what the stream gives is what a plain reading gives."""

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.quarantine import Quarantine
from pipelines.stream import EncodedBatch, Need, Source, Stream
from shards import ShardSet
from shards.errors import UnreachableError
from shards.tombstones import DEAD
from tests.support.made_sets import Made, make_set
from tests.support.shard_sets import FaultyStore, picture

SIZES = (1, 40, 3, 1, 17, 64, 1, 2, 33, 5)
DEAD_SHARD = 4
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Shards of 1 to 64 samples of 1 to 7 kB; one shard's are all dead, some of another's."""
    jpeg = picture(0)
    width, height = Image.open(io.BytesIO(jpeg)).size
    rng = np.random.default_rng(0)
    shard_set = make_set(
        str(tmp_path_factory.mktemp("uneven")),
        [
            [
                Made(
                    uri=f"r/{s}-{n}",
                    data=jpeg + bytes([s, n]) + bytes(int(rng.integers(0, 6000))),
                    width=width,
                    height=height,
                )
                for n in range(size)
            ]
            for s, size in enumerate(SIZES)
        ],
    )
    dead = [(DEAD_SHARD, n) for n in range(SIZES[DEAD_SHARD])] + [(5, n) for n in (0, 7, 8, 63)]
    rows = [{"shard": s, "position": n, "reason": "takedown", "detail": ""} for s, n in dead]
    return shard_set.bury(pa.Table.from_pylist(rows, schema=DEAD))


def random_needs(shard_set: ShardSet, rng: np.random.Generator) -> tuple[list[Need], int]:
    """Some batches, and their lanes; each lane walks through pieces of shards at its own pace."""
    lanes = int(rng.integers(1, 13))
    alive = np.flatnonzero(shard_set.samples)
    walks: list[list[tuple[int, int]]] = []
    for _ in range(lanes):
        walk: list[tuple[int, int]] = []
        for shard in rng.choice(alive, size=rng.integers(1, 8)).tolist():
            first, last = np.sort(rng.integers(0, shard_set.samples[shard], size=2)).tolist()
            walk += [(shard, member) for member in range(first, last + 1)]
        walks.append(walk[::-1])
    needs, position = [], 0
    while any(walks):
        rows = []
        for _ in range(rng.integers(1, 20)):
            left = [lane for lane, walk in enumerate(walks) if walk]
            if left:
                lane = int(rng.choice(left))
                rows.append((lane, *walks[lane].pop()))
        in_lane, shards, members = np.array(rows, dtype=np.int64).T
        needs.append(
            Need(
                positions=position + np.arange(len(rows)),
                lanes=in_lane,
                sources=np.zeros(len(rows), dtype=np.int64),
                shards=shards,
                members=members,
            )
        )
        position += len(rows)
    return needs, lanes


def open_randomly(
    shard_set: ShardSet, needs: Iterator[Need], lanes: int, rng: np.random.Generator
) -> Stream:
    return Stream(
        {0: Source(shard_set=shard_set, first_id=1000)},
        needs,
        num_lanes=lanes,
        block=int(rng.choice([1, 2, 5, 8, 16, 100])),
        seed=0,
        prefetch_batches=int(rng.integers(1, 5)),
        buffer_bytes=int(rng.choice([0, 5_000, 50_000, 200_000, 2**30])),
        max_pixels=10**6,
        wait_timeout_s=20,
        quarantine=Quarantine(max_bad_frac=0.0, world_size=1),
        on_bad="replace",
    )


def plainly(shard_set: ShardSet, need: Need) -> list[tuple[int, int, bytes]]:
    """Position, sample id and bytes of what a batch wants."""
    found = []
    for position, shard, member in zip(
        need.positions.tolist(), need.shards.tolist(), need.members.tolist(), strict=True
    ):
        index = shard_set.index(shard)
        tar = Path(shard_set.url, shard_set.names[shard]).read_bytes()
        start = int(index.offset[member])
        sample_id = 1000 + int(shard_set.first_ordinal[shard] + index.position[member])
        found.append((position, sample_id, tar[start : start + int(index.length[member])]))
    return found


def given(batch: EncodedBatch) -> list[tuple[int, int, bytes]]:
    data = [one.tobytes() for one in batch.data]
    return list(zip(batch.positions.tolist(), batch.sample_ids.tolist(), data, strict=True))


def held_by(batches: list[EncodedBatch]) -> int:
    bases = {id(one.base): one.base for batch in batches for one in batch.data}
    return sum(base.nbytes for base in bases.values() if base is not None)


def assert_closes(stream: Stream) -> None:
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 5
    assert stream.stats().held_bytes == 0


@pytest.fixture
def slow(uneven: ShardSet) -> tuple[ShardSet, FaultyStore]:
    """The set, opened anew, over a store whose answers come in any order."""
    shard_set = ShardSet.open(uneven.url)
    store = FaultyStore(shard_set.store)
    store.longest_wait_s = 0.003
    shard_set.store = store
    return shard_set, store


@pytest.mark.parametrize("seed", range(30))
def test_every_batch_is_what_a_plain_reading_gives_and_nothing_stays_held(
    uneven: ShardSet, slow: tuple[ShardSet, FaultyStore], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    needs, lanes = random_needs(uneven, rng)
    stream = open_randomly(slow[0], iter(needs), lanes, rng)
    kept: list[EncodedBatch] = []
    for need, batch in zip(needs, stream, strict=True):
        assert given(batch) == plainly(uneven, need)
        kept = [one for one in [*kept, batch] if rng.random() < 0.6]
        del batch

    assert stream.stats().live_blocks == 0
    stream.close()  # a thread that has just read something may not have let go of it yet
    assert stream.stats().held_bytes == held_by(kept)
    kept.clear()
    assert_closes(stream)


@pytest.mark.parametrize("seed", range(30))
def test_a_stream_that_is_closed_or_fails_on_the_way_holds_nothing_afterwards(
    uneven: ShardSet, slow: tuple[ShardSet, FaultyStore], seed: int
) -> None:
    rng = np.random.default_rng(1000 + seed)
    needs, lanes = random_needs(uneven, rng)
    shard_set, store = slow
    if seed % 2:
        store.refuse_after = int(rng.integers(0, 30))
    store.flip_first_answers = seed % 5 == 0
    stream = open_randomly(shard_set, iter(needs), lanes, rng)
    try:
        for _, need in zip(range(rng.integers(0, len(needs))), needs, strict=False):
            assert given(next(stream)) == plainly(uneven, need)
    except UnreachableError:
        assert store.refuse_after is not None

    assert_closes(stream)


class Gate(dict[int, Source]):
    """Sources that the stream's own thread waits for."""

    def __init__(self, sources: dict[int, Source]) -> None:
        super().__init__(sources)
        self.reached, self.opened = threading.Event(), threading.Event()

    def __getitem__(self, number: int) -> Source:
        if threading.current_thread().name == "stream":
            self.reached.set()
            assert self.opened.wait(20)
        return super().__getitem__(number)


def test_a_read_that_is_asked_for_while_the_stream_is_closed_holds_nothing_up(
    uneven: ShardSet,
) -> None:
    sources = Gate({0: Source(shard_set=uneven, first_id=0)})
    needs, lanes = random_needs(uneven, np.random.default_rng(0))
    stream = Stream(
        sources,
        iter(needs),
        num_lanes=lanes,
        block=8,
        seed=0,
        prefetch_batches=1,
        buffer_bytes=2**20,
        max_pixels=10**6,
        wait_timeout_s=20,
        quarantine=Quarantine(max_bad_frac=0.0, world_size=1),
        on_bad="replace",
    )
    assert sources.reached.wait(20)
    closing = threading.Thread(target=stream.close)
    closing.start()
    while not stream._pool._stopped:
        time.sleep(0.01)

    sources.opened.set()
    closing.join(5)

    assert not closing.is_alive()
    assert stream.stats().held_bytes == 0
