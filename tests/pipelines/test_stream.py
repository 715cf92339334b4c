import io
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import BadDataError, StalledError
from pipelines.order import Order
from pipelines.quarantine import Quarantine
from pipelines.stream import EncodedBatch, Need, Source, Stream
from shards import ShardSet
from shards.errors import ChangedError, NotFoundError, UnreachableError
from tests.support.made_sets import Made, make_set
from tests.support.shard_sets import FaultyStore, flip_a_byte, overwrite, picture, stored

BATCH = 10
BLOCK = 8


def needs(
    shard_set: ShardSet, *, batches: int, rank: int = 0, world_size: int = 1
) -> Iterator[Need]:
    order = Order(shard_set.samples, seed=4, lanes=BATCH, block=BLOCK)
    share = BATCH // world_size
    for batch in range(batches):
        start = batch * BATCH + rank * share
        places = np.arange(start, start + share)
        shards, members = order.samples(0, start, start + share)
        yield Need(
            positions=places,
            lanes=places % BATCH,
            sources=np.zeros(share, dtype=np.int64),
            shards=shards,
            members=members,
        )


def open_stream(
    shard_set: ShardSet,
    *,
    batches: int = 6,
    rank: int = 0,
    world_size: int = 1,
    buffer_bytes: int = 1 << 30,
    wait_timeout_s: float = 20.0,
    on_bad: Literal["replace", "drop"] = "replace",
    quarantine: Quarantine | None = None,
) -> Stream:
    return Stream(
        {0: Source(shard_set=shard_set, first_id=0)},
        needs(shard_set, batches=batches, rank=rank, world_size=world_size),
        num_lanes=BATCH // world_size,
        block=BLOCK,
        seed=4,
        prefetch_batches=2,
        buffer_bytes=buffer_bytes,
        max_pixels=10**6,
        wait_timeout_s=wait_timeout_s,
        quarantine=quarantine or Quarantine(max_bad_frac=0.5, world_size=1),
        on_bad=on_bad,
    )


def read_all(stream: Stream) -> list[EncodedBatch]:
    try:
        return list(stream)
    finally:
        stream.close()


def ids(batches: list[EncodedBatch]) -> list[int]:
    return np.concatenate([batch.sample_ids for batch in batches]).tolist()


def contents(batches: list[EncodedBatch]) -> list[bytes]:
    return [one.tobytes() for batch in batches for one in batch.data]


def wanted_ids(shard_set: ShardSet, batches: int) -> list[int]:
    found = list(needs(shard_set, batches=batches))
    return np.concatenate([shard_set.first_ordinal[n.shards] + n.members for n in found]).tolist()


@pytest.fixture
def faulty(own_shard_set: ShardSet) -> FaultyStore:
    store = FaultyStore(own_shard_set.store)
    own_shard_set.store = store
    return store


def test_it_gives_the_bytes_of_each_sample_in_order(shard_set: ShardSet) -> None:
    batches = read_all(open_stream(shard_set, batches=15))

    assert ids(batches) == wanted_ids(shard_set, 15)
    assert contents(batches) == [stored(shard_set, i) for i in ids(batches)]
    assert np.concatenate([b.positions for b in batches]).tolist() == list(range(150))
    table = shard_set.table(["width", "height"])
    sizes = np.stack([table.column("width").to_numpy(), table.column("height").to_numpy()], axis=1)
    assert np.array_equal(np.concatenate([b.sizes for b in batches]), sizes[ids(batches)])


def test_a_block_is_one_request(own_shard_set: ShardSet, faulty: FaultyStore) -> None:
    read_all(open_stream(own_shard_set))

    assert len(faulty.requests) == len(set(faulty.requests))
    assert len(faulty.requests) == 3 * 3  # 20 samples in blocks of 8, three shards


def test_samples_are_views_into_their_block(shard_set: ShardSet) -> None:
    batches = read_all(open_stream(shard_set, batches=15))

    bases = {id(one.base) for batch in batches for one in batch.data}
    assert all(one.base is not None for batch in batches for one in batch.data)
    assert len(bases) < 40


def test_without_room_for_blocks_the_order_stays_and_requests_grow(
    own_shard_set: ShardSet, faulty: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    whole = read_all(open_stream(own_shard_set))
    with_room = len(faulty.requests)

    batch_bytes = max(sum(map(len, contents([batch]))) for batch in whole)
    for bound in (0, 30_000, 60_000):
        faulty.requests.clear()
        stream = open_stream(own_shard_set, buffer_bytes=bound)
        served = []
        for batch in stream:
            served += contents([batch])
        peak = stream.stats().peak_held_bytes
        stream.close()
        assert served == contents(whole)
        assert len(faulty.requests) > with_room
        # Whatever the bound: what is taken, two that are ready and the two in the making.
        assert peak <= max(bound, 5 * batch_bytes)
    assert "raise data.buffer_bytes" in caplog.text


def test_bytes_count_until_the_last_batch_made_of_them_is_gone(shard_set: ShardSet) -> None:
    stream = open_stream(shard_set, batches=15)
    kept = [next(stream) for _ in range(4)]
    deque(stream, maxlen=0)
    stream.close()  # a thread that has just read something may not have let go of it yet
    used_by_kept = {id(one.base): one.base.nbytes for batch in kept for one in batch.data}

    held = stream.stats().held_bytes
    kept.clear()
    let_go = stream.stats().held_bytes

    assert held == sum(used_by_kept.values())
    assert let_go == 0


def test_bytes_of_a_store_that_reads_into_memory_of_its_own_are_let_go(
    own_shard_set: ShardSet, tmp_path: Path
) -> None:
    expected = contents(read_all(open_stream(own_shard_set)))
    shutil.make_archive(str(tmp_path / "packed"), "zip", own_shard_set.url)
    stream = open_stream(ShardSet.open(f"zip://::{tmp_path}/packed.zip"))

    served = []
    for batch in stream:
        served += contents([batch])
        del batch
    stream.close()
    held = stream.stats().held_bytes

    assert served == expected
    assert held == 0


def test_memory_is_used_again_only_when_no_batch_needs_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, size=(160, 200, 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(noise).save(written, "JPEG", quality=95)
    samples = [
        [
            # The bytes behind the image's end make each sample another one.
            Made(uri=f"raw/{s}-{n}", data=written.getvalue() + bytes([s, n]), width=200, height=160)
            for n in range(32)
        ]
        for s in range(40)
    ]
    shard_set = make_set(str(tmp_path), samples)
    stream = open_stream(shard_set, batches=128, buffer_bytes=2**26)

    kept, seen, buffers = [], [], set()
    for batch in stream:
        assert contents([batch]) == [stored(shard_set, i) for i in batch.sample_ids]
        buffers |= {one.base.__array_interface__["data"][0] for one in batch.data}
        seen += ids([batch])
        kept.append(batch)
        if len(kept) > 20:  # some are kept for long, others let go at once
            kept = kept[::2]
            assert contents(kept) == [stored(shard_set, i) for i in ids(kept)]
    stream.close()

    assert sorted(seen) == list(range(1280))
    assert len(buffers) < 140  # of 160 blocks


def test_a_byte_that_was_wrong_once_is_read_again(
    own_shard_set: ShardSet, faulty: FaultyStore
) -> None:
    expected = contents(read_all(open_stream(own_shard_set)))
    faulty.requests.clear()
    faulty.flip_first_answers = True
    quarantine = Quarantine(max_bad_frac=0.5, world_size=1)

    batches = read_all(open_stream(own_shard_set, quarantine=quarantine))

    assert contents(batches) == expected
    assert not quarantine.records()
    assert len(faulty.requests) > 9  # blocks


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_a_damaged_sample_gives_way_to_the_same_one_in_every_world(
    own_shard_set: ShardSet, world_size: int
) -> None:
    bad = wanted_ids(own_shard_set, 6)[27]
    broken = overwrite(own_shard_set, bad, flip_a_byte(stored(own_shard_set, bad)))
    quarantine = Quarantine(max_bad_frac=0.5, world_size=1)

    parts = [
        read_all(open_stream(broken, rank=r, world_size=world_size, quarantine=quarantine))
        for r in range(world_size)
    ]

    served = [i for step in zip(*parts, strict=True) for i in ids(list(step))]
    assert [
        place
        for place, (a, b) in enumerate(zip(served, wanted_ids(broken, 6), strict=True))
        if a != b
    ] == [27]
    assert served[27] == 47  # pinned: the same in every world, and for ever
    assert sum(batch.num_replaced for part in parts for batch in part) == 1
    (record,) = quarantine.records()
    assert (record.sample_id, record.position) == (bad, 27)
    assert "checksum" in record.reason
    assert record.shard.endswith(".tar")
    assert record.key
    assert record.key.isalnum()


def test_an_image_of_another_size_is_replaced(own_shard_set: ShardSet) -> None:
    data = bytearray(stored(own_shard_set, 30))
    place = data.index(b"\xff\xc0") + 5  # the frame header's height and width
    data[place : place + 2] = (999).to_bytes(2, "big")
    broken = overwrite(own_shard_set, 30, bytes(data), fix_checksum=True)
    quarantine = Quarantine(max_bad_frac=0.5, world_size=1)

    batches = read_all(open_stream(broken, quarantine=quarantine))

    assert 30 not in ids(batches)
    assert "999 pixels, but the index says" in quarantine.records()[0].reason


def test_bad_samples_can_be_left_out(own_shard_set: ShardSet) -> None:
    broken = overwrite(own_shard_set, 7, flip_a_byte(stored(own_shard_set, 7)))

    batches = read_all(open_stream(broken, on_bad="drop"))

    assert sorted(ids(batches)) == [i for i in range(60) if i != 7]


def test_repair_moves_on_to_the_next_substitute(shard_set: ShardSet) -> None:
    stream = open_stream(shard_set)
    batch = next(stream)

    once = stream.repair(batch, {3: "looks odd"})
    twice = stream.repair(once, {3: "odd, too"})
    stream.close()

    assert len({int(b.sample_ids[3]) for b in (batch, once, twice)}) == 3
    assert twice.num_replaced == once.num_replaced == 1
    assert twice.data[3].tobytes() == stored(shard_set, int(twice.sample_ids[3]))
    assert np.delete(twice.sample_ids, 3).tolist() == np.delete(batch.sample_ids, 3).tolist()


def test_more_bad_samples_than_the_budget_stop_the_stream(own_shard_set: ShardSet) -> None:
    broken = own_shard_set
    for number in range(0, 60, 2):
        broken = overwrite(broken, number, flip_a_byte(stored(broken, number)))

    with pytest.raises(BadDataError, match=r"more than data\.max_bad_frac 0\.01"):
        read_all(open_stream(broken, quarantine=Quarantine(max_bad_frac=0.01, world_size=1)))


@pytest.mark.parametrize("buffer_bytes", [2**30, 0], ids=["blocks", "one by one"])
def test_a_shard_that_was_replaced_by_one_of_the_same_size_is_one_error(
    tmp_path: Path, buffer_bytes: int
) -> None:
    jpeg = picture(0)
    width, height = Image.open(io.BytesIO(jpeg)).size
    ours, other = (
        make_set(
            str(tmp_path / name.decode()),
            [
                [
                    Made(
                        uri=f"r/{s}-{n}",
                        data=jpeg + name + bytes([s, n]),
                        width=width,
                        height=height,
                    )
                    for n in range(64)
                ]
                for s in range(8)
            ],
        )
        for name in (b"ours_", b"other")
    )
    quarantine = Quarantine(max_bad_frac=1.0, world_size=1)
    stream = open_stream(ours, batches=51, buffer_bytes=buffer_bytes, quarantine=quarantine)
    served = [next(stream), next(stream)]
    for name, another in zip(ours.names, other.names, strict=True):
        path, found = Path(ours.url, name), Path(other.url, another).read_bytes()
        assert len(found) == path.stat().st_size
        (tmp_path / "new").write_bytes(found)
        (tmp_path / "new").replace(path)

    with pytest.raises(ChangedError, match=r"\.tar was replaced or overwritten since .*verify"):
        served += list(stream)
    stream.close()

    assert ids(served) == wanted_ids(ours, len(served))
    assert len(served) < 40
    assert not quarantine.records()


def test_a_sample_that_is_damaged_alone_is_a_bad_sample_also_when_read_alone(
    own_shard_set: ShardSet,
) -> None:
    broken = own_shard_set
    for bad in (0, 7, 33):  # the first of its shard is one of them
        broken = overwrite(broken, bad, flip_a_byte(stored(broken, bad)))
    quarantine = Quarantine(max_bad_frac=1.0, world_size=1)

    served = ids(read_all(open_stream(broken, quarantine=quarantine, buffer_bytes=0)))

    assert len(served) == 60
    assert sorted(record.sample_id for record in quarantine.records()) == [0, 7, 33]


def test_a_set_without_a_sound_sample_is_named(tmp_path: Path) -> None:
    shard_set = make_set(
        str(tmp_path), [[Made(uri=f"r/{s}-{n}") for n in range(20)] for s in range(3)]
    )

    with pytest.raises(BadDataError, match=r"\.tar: no sound sample is left"):
        read_all(open_stream(shard_set, quarantine=Quarantine(max_bad_frac=1.0, world_size=1)))


def test_indexes_that_the_set_forgets_are_read_beside_the_stream_and_once(
    own_shard_set: ShardSet, faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = contents(read_all(open_stream(own_shard_set)))
    shard_set = ShardSet.open(own_shard_set.url)
    shard_set.store = faulty
    faulty.whole_reads.clear()
    monkeypatch.setattr("shards.manifest._CACHED_ROWS", 0)  # it remembers the last one alone

    stream = open_stream(shard_set)
    served = contents(list(stream))
    index_reads = stream.stats().index_reads
    stream.close()

    assert served == expected
    assert all(thread.startswith("block-read") for _, thread in faulty.whole_reads)
    assert len(faulty.whole_reads) == index_reads < 2 * len(shard_set.names)


def test_a_failing_store_is_an_error_and_no_bad_sample(
    own_shard_set: ShardSet, faulty: FaultyStore
) -> None:
    faulty.refuse_after = 4
    quarantine = Quarantine(max_bad_frac=0.5, world_size=1)

    with pytest.raises(UnreachableError, match="no usable answer"):
        read_all(open_stream(own_shard_set, quarantine=quarantine))
    assert not quarantine.records()


def test_a_missing_shard_is_named(own_shard_set: ShardSet) -> None:
    Path(own_shard_set.url, own_shard_set.names[1]).unlink()

    with pytest.raises(NotFoundError, match=own_shard_set.names[1]):
        read_all(open_stream(own_shard_set))


def test_a_silent_store_is_reported_with_the_state_of_the_stages(
    own_shard_set: ShardSet, faulty: FaultyStore
) -> None:
    faulty.hold.clear()
    stream = open_stream(own_shard_set)
    assert faulty.asked.wait(20)
    stream._timeout_s = 0.3

    with pytest.raises(
        StalledError, match=r"0\.3 s.*batches ready.*blocks.*under way .the oldest for .*tar"
    ):
        next(stream)
    faulty.hold.set()
    stream.close()


def test_close_ends_all_threads_at_any_time(own_shard_set: ShardSet, faulty: FaultyStore) -> None:
    before = threading.active_count()
    faulty.hold.clear()
    waiting = open_stream(own_shard_set)
    threading.Timer(0.3, faulty.hold.set).start()

    waiting.close()
    waiting.close()

    started = open_stream(own_shard_set)
    next(started)
    started.close()
    assert threading.active_count() <= before + 1  # the timer's thread may be ending still


def test_lanes_that_all_change_blocks_at_once_get_blocks_as_soon_as_there_is_room(
    tmp_path: Path,
) -> None:
    lanes, block, shards = 16, 32, 32
    written = io.BytesIO()
    Image.new("RGB", (80, 60)).save(written, "JPEG")
    samples = [
        [
            Made(uri=f"r/{s}-{n}", data=written.getvalue() + bytes([s, n]), width=80, height=60)
            for n in range(64)
        ]
        for s in range(shards)
    ]
    shard_set = make_set(str(tmp_path), samples)
    places = np.arange(lanes)
    batches = [  # lane n walks through shard n, and then, with all others, goes to shard n + 16
        Need(
            positions=places + lanes * number,
            lanes=places,
            sources=np.zeros(lanes, dtype=np.int64),
            shards=places + lanes * (number // 64),
            members=np.full(lanes, number % 64),
        )
        for number in range(128)
    ]
    stream = Stream(
        {0: Source(shard_set=shard_set, first_id=0)},
        iter(batches),
        num_lanes=lanes,
        block=block,
        seed=0,
        prefetch_batches=1,
        # For the blocks that lanes are in and what is read ahead, not for twice as many.
        buffer_bytes=int(1.1 * lanes * (block + 13) * shard_set.total_bytes / (64 * shards)),
        max_pixels=10**6,
        wait_timeout_s=20,
        quarantine=Quarantine(max_bad_frac=0.0, world_size=1),
        on_bad="replace",
    )
    deque(stream, maxlen=0)
    stats = stream.stats()
    stream.close()

    whole = lanes * 128 // block
    assert stats.read_requests - stats.single_reads <= whole
    assert stats.single_reads < 3 * 4 * lanes  # three changes, a few batches after each


def test_what_is_left_of_a_short_block_is_not_worth_reading_it_as_a_whole(tmp_path: Path) -> None:
    lanes, samples, changes = 16, 12, 6
    jpeg = picture(0)
    width, height = Image.open(io.BytesIO(jpeg)).size
    shard_set = make_set(
        str(tmp_path),
        [
            [
                Made(uri=f"r/{s}-{n}", data=jpeg + bytes([s, n]), width=width, height=height)
                for n in range(samples)
            ]
            for s in range(lanes * changes)
        ],
    )
    places = np.arange(lanes)
    batches = [  # all lanes go to another shard, which is one block, at the same time
        Need(
            positions=places + lanes * number,
            lanes=places,
            sources=np.zeros(lanes, dtype=np.int64),
            shards=places + lanes * (number // samples),
            members=np.full(lanes, number % samples),
        )
        for number in range(samples * changes)
    ]
    stream = Stream(
        {0: Source(shard_set=shard_set, first_id=0)},
        iter(batches),
        num_lanes=lanes,
        block=64,
        seed=0,
        prefetch_batches=1,
        buffer_bytes=int(1.5 * shard_set.total_bytes / changes),
        max_pixels=10**6,
        wait_timeout_s=20,
        quarantine=Quarantine(max_bad_frac=0.0, world_size=1),
        on_bad="replace",
    )
    deque(stream, maxlen=0)
    stats = stream.stats()
    stream.close()

    assert stats.single_reads > 0
    assert stats.read_amplification < 1.25


def test_a_lane_may_walk_through_several_blocks_in_one_batch(shard_set: ShardSet) -> None:
    def walk() -> Iterator[Need]:
        for shard, samples in enumerate(shard_set.samples.tolist()):
            for first in range(0, samples, 15):  # no multiple of a block
                members = np.arange(first, min(first + 15, samples))
                zeros = np.zeros(len(members), dtype=np.int64)
                yield Need(
                    positions=zeros,
                    lanes=zeros,
                    sources=zeros,
                    shards=zeros + shard,
                    members=members,
                )

    for bound in (0, 20_000, 100_000, 2**30):
        stream = Stream(
            {0: Source(shard_set=shard_set, first_id=0)},
            walk(),
            num_lanes=1,
            block=BLOCK,
            seed=0,
            prefetch_batches=1,
            buffer_bytes=bound,
            max_pixels=10**6,
            wait_timeout_s=20,
            quarantine=Quarantine(max_bad_frac=0.0, world_size=1),
            on_bad="drop",
        )
        assert ids(read_all(stream)) == list(range(150))


@pytest.mark.parametrize("size", [0.5, 1.5])
def test_a_shard_of_another_size_than_was_indexed_is_an_error_that_says_so(
    own_shard_set: ShardSet, size: float
) -> None:
    path = Path(own_shard_set.url, own_shard_set.names[1])
    was = path.stat().st_size
    path.write_bytes(bytes(int(size * was)))

    with pytest.raises(
        ChangedError,
        match=rf"{path.name} was replaced since it was indexed: {int(size * was):,} bytes, the "
        rf"manifest says {was:,}; run 'moco-scale verify'",
    ):
        read_all(open_stream(own_shard_set))


def test_a_process_ends_though_a_read_never_does(own_shard_set: ShardSet) -> None:
    program = f"""
import pipelines.stream as module
from shards import ShardSet
from tests.pipelines.test_stream import open_stream
from tests.support.shard_sets import FaultyStore

module._CLOSE_S = 0.5
shard_set = ShardSet.open({own_shard_set.url!r})
shard_set.store = FaultyStore(shard_set.store)
shard_set.store.hold.clear()
stream = open_stream(shard_set, wait_timeout_s=0.5)
try:
    next(stream)
finally:
    stream.close()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=40, check=False
    )

    assert ended.returncode == 1
    assert "StalledError" in ended.stderr


def test_a_lane_walks_through_blocks_within_a_batch_whatever_the_bound(
    own_shard_set: ShardSet,
) -> None:
    def walk() -> Iterator[Need]:
        for start in range(0, 60, 30):
            numbers = np.arange(start, start + 30)
            nothing = np.zeros(30, dtype=np.int64)
            yield Need(
                positions=numbers,
                lanes=nothing,
                sources=nothing,
                shards=numbers // 20,
                members=numbers % 20,
            )

    for bound in (1, 30_000, 100_000, 2**30):
        stream = Stream(
            {0: Source(shard_set=own_shard_set, first_id=0)},
            walk(),
            num_lanes=1,
            block=BLOCK,
            seed=4,
            prefetch_batches=2,
            buffer_bytes=bound,
            max_pixels=10**6,
            wait_timeout_s=20,
            quarantine=Quarantine(max_bad_frac=0.5, world_size=1),
            on_bad="drop",
        )

        assert ids(read_all(stream)) == list(range(60))
