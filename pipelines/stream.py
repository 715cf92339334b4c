"""Blocks through the store: bounded, checked, on time; encoded samples in the order asked for."""

import logging
import queue
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.ahead import Ahead
from pipelines.blocks import Block, BlockReader, Bytes, Source
from pipelines.errors import BadDataError, StalledError
from pipelines.quarantine import BadSample, Quarantine, candidates
from pipelines.spans import ASSEMBLE, PLAN, READ, STREAM, Spans
from pipelines.stats import StageStats, StreamStats
from shards.errors import StoreError

__all__ = ["EncodedBatch", "Need", "Source", "Stream"]

A = TypeVar("A")
T = TypeVar("T")
logger = logging.getLogger(__name__)

READ_THREADS = 16
_PLANNED_AHEAD, _PLANNED_AT_MOST = 8, 32
"""Batches whose blocks are on their way before the first of them is needed; and how many they may
be while the first is not here and threads are idle."""
_CLOSE_S = 10.0
_WAKE_S = 0.2  # how soon a waiting stage notices that it was closed
_TAR_HEADER_BYTES = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Which samples a batch wants; N entries each."""

    positions: NDArray[np.int64]
    """Global positions since the start of the run."""
    lanes: NDArray[np.int64]
    """A lane takes a block's samples one after another and holds the block until it leaves it."""
    sources: NDArray[np.int64]
    """Numbers of the stream's sources."""
    shards: NDArray[np.int64]
    members: NDArray[np.int64]
    """Position in the shard."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Encoded images and what is known of them, in the order of their positions."""

    data: tuple[Bytes, ...]
    """N encoded images: views into the blocks that were read, not copies."""
    sample_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    sizes: NDArray[np.int32]
    """N x 2: width and height of the upright image, in pixels."""
    orientations: NDArray[np.uint8]
    """N EXIF orientations, 1 to 8."""
    sources: NDArray[np.int64]
    shards: NDArray[np.int64]
    members: NDArray[np.int64]
    """Position in the shard of what was asked for, which a substitute is not."""
    tries: NDArray[np.int64]
    """Substitutes tried for each sample so far."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def num_replaced(self) -> int:
        """How many of the N are substitutes."""
        return int(np.count_nonzero(self.tries))

    def only(self, place: int) -> "EncodedBatch":
        """A batch of one of the samples."""
        here = slice(place, place + 1)
        return EncodedBatch(
            data=self.data[here],
            sample_ids=self.sample_ids[here],
            positions=self.positions[here],
            sizes=self.sizes[here],
            orientations=self.orientations[here],
            sources=self.sources[here],
            shards=self.shards[here],
            members=self.members[here],
            tries=self.tries[here],
        )


class Stream:
    """The batches that `needs` asks for, read ahead by threads.

    A block, `block` consecutive samples of a shard, is one range request. It is read when a lane
    enters it and dropped when the last lane has left it. Where the blocks of all lanes exceed
    `buffer_bytes`, those that do not fit are read a sample at a time: that costs requests, never
    order. Bytes count from the moment they are asked for until the last batch that is made of them
    is gone.
    """

    def __init__(
        self,
        sources: Mapping[int, Source],
        needs: Iterator[Need],
        *,
        num_lanes: int,
        block: int,
        seed: int,
        prefetch_batches: int,
        buffer_bytes: int,
        max_pixels: int,
        wait_timeout_s: float,
        quarantine: Quarantine,
        on_bad: Literal["replace", "drop"],
        read_threads: int = READ_THREADS,
        spans: Spans | None = None,
    ) -> None:
        """Args:
        sources: may get more entries while the stream runs, each before a need that names it.
        num_lanes: how many there will be in all of the needs together.
        seed: of the substitutes.
        max_pixels: larger images are bad.
        on_bad: put another sample of the block in a bad one's place, or leave the place out.
        read_threads: reads that may be under way at once.
        """
        self._sources = sources
        self._needs = needs
        self._num_lanes = num_lanes
        self._block = block
        self._seed = seed
        self._buffer_bytes = buffer_bytes
        self._room_for_blocks: int | None = None
        self._sample_bytes = 0.0
        self._timeout_s = wait_timeout_s
        self._quarantine = quarantine
        self._on_bad = on_bad
        self._read_threads = read_threads
        self._spans = spans = spans or Spans()
        self._reader = BlockReader(
            sources, max_pixels=max_pixels, buffer_bytes=buffer_bytes, spans=self._spans
        )
        self._lane_key = np.zeros(0, dtype=np.int64)
        self._holders: Counter[int] = Counter()
        self._live: dict[int, _Reading | None] = {}
        self._alone: Counter[int] = Counter()  # of a block without room: samples read by now
        self._known_bad: dict[tuple[int, int, int], str] = {}
        self._used_bytes = self._used_samples = self._single_reads = self._index_reads = 0
        self._waited_s = 0.0
        self._running: dict[Future[Any], tuple[str, float]] = {}
        self._closed = False
        self._pool = _Readers(read_threads)
        self._ahead = Ahead(
            self._batches(), size=max(1, prefetch_batches), name=STREAM, spans=spans
        )

    def __iter__(self) -> Iterator[EncodedBatch]:
        return self

    def __next__(self) -> EncodedBatch:
        """The next batch.

        Raises:
            StalledError: none came before the deadline.
            StoreError: the store failed for good; never treated as a bad sample.
            BadDataError: too many samples are bad.
        """
        try:
            return self._ahead.get(timeout_s=self._timeout_s)
        except TimeoutError:
            raise StalledError(f"no batch for {self._timeout_s:g} s: {self.describe()}") from None

    def describe(self) -> str:
        """The state of the stages, for the message of a stall."""
        reads = sorted(self._running.values(), key=lambda one: one[1])
        oldest = "none"
        if reads:
            where, began = reads[0]
            oldest = f"the oldest for {time.perf_counter() - began:.1f} s: {where}"
        return (
            f"{self._ahead.num_ready} batches ready, {len(self._live)} blocks live, "
            f"{self._reader.held_bytes / 2**20:.1f} MiB held, {self._reader.read_requests} reads "
            f"answered, {len(reads)} under way ({oldest})"
        )

    def stats(self) -> StreamStats:
        sources = list(self._sources.values())  # in one go: the stream's thread may add one
        stores = {id(one.shard_set.tars): one.shard_set.tars for one in sources}
        said = [store.stats() for store in stores.values()]
        return StreamStats(
            read_bytes=self._reader.read_bytes,
            used_bytes=self._used_bytes,
            read_requests=self._reader.read_requests,
            used_samples=self._used_samples,
            single_reads=self._single_reads,
            index_reads=self._index_reads,
            retries=sum(one.retries for one in said),
            resumes=sum(one.resumes for one in said),
            held_bytes=self._reader.held_bytes,
            peak_held_bytes=self._reader.peak_held_bytes,
            live_blocks=len(self._live),
        )

    def stage_stats(self) -> StageStats:
        return self._ahead.stats(wait_for_input_s=self._waited_s)

    @property
    def taker_waited_s(self) -> float:
        """Seconds that whoever takes the batches has waited for them."""
        return self._ahead.taker_waited_s

    def repair(self, batch: EncodedBatch, faults: Mapping[int, str]) -> EncodedBatch:
        """The batch again, without the samples that turned out bad when they were decoded.

        Args:
            batch: as this stream gave it, or as this method did.
            faults: reason by place in the batch.
        """
        making = _Making.of(batch)
        for place, reason in faults.items():
            self._replace(making, place, reason, near=None)
        return making.batch()

    def close(self) -> None:
        """Stop the threads and let the blocks go; harmless twice."""
        self._closed = True
        self._pool.stop()
        joined = self._ahead.close(timeout_s=_CLOSE_S)
        _, late = wait(list(self._running), timeout=_CLOSE_S)
        if late or not joined or not self._pool.join(timeout_s=_CLOSE_S):
            logger.warning("%d reads did not end in time: %s", len(late), self.describe())
        self._live.clear()

    # Everything below runs in the stream's thread, except reads (pool) and repair (its caller's).

    def _batches(self) -> Generator[EncodedBatch, None, None]:
        planned: deque[_Planned] = deque()
        for need in self._needs:
            if self._closed:
                return
            # One number for source, shard and number of the block in it.
            keys = need.sources << 48 | need.shards << 24 | need.members // self._block
            changes = self._changes(need, keys)
            if self._room_for_blocks is None:
                self._load_indexes(need, changes)
                self._room_for_blocks = self._divide_room(need)
            if len(changes):
                self._load_indexes(need, changes)
            while planned and (self._is_enough(planned) or not self._has_room(keys, changes)):
                yield self._assemble(planned.popleft())
            with self._spans.of(PLAN, samples=len(need.positions)):
                planned.append(self._plan(need, keys, changes, planned))
        while planned and not self._closed:
            yield self._assemble(planned.popleft())
        self._live.clear()

    def _is_enough(self, planned: "Sequence[_Planned]") -> bool:
        """Whether to make the first of the batches before another one is planned."""
        if not _PLANNED_AHEAD <= len(planned) < _PLANNED_AT_MOST:
            return len(planned) >= _PLANNED_AHEAD
        # What is here already, from a local disk, gains nothing by more that waits beside it.
        return len(self._running) >= self._read_threads or all(
            reading.future.done() for reading in planned[0].readings
        )

    def _changes(self, need: Need, keys: NDArray[np.int64]) -> NDArray[np.intp]:
        """Places at which a lane is in another block than before."""
        most = int(need.lanes.max()) + 1
        if most > len(self._lane_key):
            more = np.full(most - len(self._lane_key), -1, dtype=np.int64)
            self._lane_key = np.concatenate([self._lane_key, more])
        return np.flatnonzero(self._lane_key[need.lanes] != keys)

    def _has_room(self, keys: NDArray[np.int64], changes: NDArray[np.intp]) -> bool:
        """Whether what this batch still needs fits beside what is there."""
        if self._room_for_blocks != self._buffer_bytes:  # most samples come one by one
            incoming = int(len(keys) * self._sample_bytes)
        else:
            new = set(keys[changes].tolist()) - self._live.keys()
            incoming = sum(map(self._block_size, new))
        return self._reader.held_bytes + incoming <= self._buffer_bytes

    def _plan(
        self,
        need: Need,
        keys: NDArray[np.int64],
        changes: NDArray[np.intp],
        planned: "deque[_Planned]",
    ) -> "_Planned":
        """Start the reads of one batch; say of the batches before it which blocks may go then."""
        left: list[int] = []
        for place in changes.tolist():
            lane, key = int(need.lanes[place]), int(keys[place])
            before = int(self._lane_key[lane])
            if before == key:  # its lane came here twice in this batch
                continue
            if before >= 0:
                left.append(before)
            self._holders[key] += 1
            self._lane_key[lane] = key
        named = keys.tolist()
        here = set(named)  # a lane may walk through several blocks in one batch
        if planned:
            # The batch before was the last that needs what was left now.
            planned[-1].left.extend(left)
            left = []
        else:
            self._release([key for key in left if key not in here])
            left = [key for key in left if key in here]
        wanted = keys[changes].tolist()
        if self._alone and self._fits(int(self._block * self._sample_bytes)):
            # When an epoch begins all lanes change blocks at once, and the old ones are in use for
            # some batches still: what had no room then has it soon.
            wanted += [key for key in self._alone if key in here and self._is_half_left(key)]
        for key in wanted:
            if self._live.get(key) is None:
                self._live[key] = self._admit(key)
                if self._live[key] is not None:
                    self._alone.pop(key, None)
        readings = [self._live[key] or self._read_one(need, n, key) for n, key in enumerate(named)]
        return _Planned(need=need, readings=readings, left=left)

    def _divide_room(self, need: Need) -> int:
        """How many bytes the lanes' blocks may take; says so if they are not to have room."""
        sets = [self._sources[int(n)].shard_set for n in np.unique(need.sources)]
        sample_bytes = sum(s.total_bytes for s in sets) / max(1, sum(s.num_samples for s in sets))
        self._sample_bytes = sample_bytes
        lanes = max(self._num_lanes, len(np.unique(need.lanes)))
        # Where they just fit, fewer batches are planned ahead (a sample on its way keeps its whole
        # block), and what has no room then is read one by one for a while.
        wanted = lanes * sample_bytes * (self._block + 1)
        if wanted <= self._buffer_bytes:
            return self._buffer_bytes
        # Samples that are read one by one need room, too.
        room = max(0, int(self._buffer_bytes - _PLANNED_AHEAD * len(need.lanes) * sample_bytes))
        alone = max(0.0, 1 - room / (lanes * sample_bytes * self._block))
        if alone:
            logger.warning(
                "the blocks that are needed at once (%d lanes x %d samples, some %.0f MiB) exceed "
                "data.buffer_bytes %d: at least %.0f %% of the samples are read one by one, a "
                "request each; raise data.buffer_bytes or lower data.block_samples",
                lanes, self._block, wanted / 2**20, self._buffer_bytes, 100 * alone,
            )  # fmt: skip
        return room

    def _is_half_left(self, key: int) -> bool:
        """Whether a block of which samples were read alone is worth being read as a whole."""
        _, _, first, stop = self._samples_of(key)
        return 2 * self._alone[key] < stop - first

    def _block_size(self, key: int) -> int:
        return self._reader.size(*self._samples_of(key))

    def _samples_of(self, key: int) -> tuple[int, int, int, int]:
        """Source, shard, first sample and last + 1 of a block."""
        source, shard, first = key >> 48, key >> 24 & 0xFFFFFF, (key & 0xFFFFFF) * self._block
        samples = int(self._sources[source].shard_set.samples[shard])
        return source, shard, first, min(first + self._block, samples)

    def _admit(self, key: int) -> "_Reading | None":
        """Start to read a block; None if there is no room for it."""
        if not self._fits(self._block_size(key)):
            return None
        return self._read(*self._samples_of(key))

    def _fits(self, size: int) -> bool:
        """Whether there is room for a block of so many bytes."""
        assert self._room_for_blocks is not None
        return (
            self._reader.held_bytes + size <= self._buffer_bytes
            and self._reader.held_block_bytes + size <= self._room_for_blocks
        )

    def _read_one(self, need: Need, place: int, key: int) -> "_Reading":
        self._single_reads += 1
        self._alone[key] += 1
        member = int(need.members[place])
        return self._read(int(need.sources[place]), int(need.shards[place]), member, member + 1)

    def _release(self, left: list[int]) -> None:
        for key in left:
            self._holders[key] -= 1
            if self._holders[key] == 0:
                del self._holders[key]
                self._live.pop(key, None)
                self._alone.pop(key, None)

    def _load_indexes(self, need: Need, changes: NDArray[np.intp]) -> None:
        """Bring a batch's indexes in side by side: one by one they would cost a round trip each.

        They stay while a lane is in their shard.
        """
        wanted = set(
            zip(need.sources[changes].tolist(), need.shards[changes].tolist(), strict=True)
        )
        indexes, pending = self._reader.indexes, {}
        for source, shard in wanted - indexes.keys():
            self._index_reads += 1
            shard_set = self._sources[source].shard_set
            where = f"an index of {shard_set.url}"
            pending[source, shard] = self._submit(where, shard_set.index, shard)
        if not pending:
            return
        lanes = (key >> 24 for key in np.unique(self._lane_key).tolist() if key >= 0)
        used = wanted.union((one >> 24, one & 0xFFFFFF) for one in lanes)
        for left in indexes.keys() - used:
            del indexes[left]
        for one, future in pending.items():
            indexes[one] = self._wait_for(future)

    def _read(self, source: int, shard: int, first: int, stop: int) -> "_Reading":
        held = self._reader.hold(source, shard, first, stop)
        future = self._submit(self._reader.uri(source, shard), self._reader.read, held)

        def let_go_if_not_begun(done: "Future[Block]") -> None:
            if done.cancelled():
                self._reader.let_go(held)

        future.add_done_callback(let_go_if_not_begun)
        return _Reading(future=future)

    def _submit(self, where: str, read: Callable[[A], T], argument: A) -> "Future[T]":
        future = self._pool.submit(read, argument)
        self._running[future] = (where, time.perf_counter())
        future.add_done_callback(lambda done: self._running.pop(done, None))
        return future

    def _assemble(self, planned: "_Planned") -> EncodedBatch:
        need = planned.need
        self._quarantine.seen(len(need.positions))
        with self._spans.of(f"wait for {READ}"):
            for reading in planned.readings:
                if reading.block is None:
                    reading.block = self._wait_for(reading.future)
        with self._spans.of(ASSEMBLE, samples=len(need.positions)):
            return self._assembled(planned)

    def _assembled(self, planned: "_Planned") -> EncodedBatch:
        need = planned.need
        data, facts, bad = [], [], []
        for place, (reading, member) in enumerate(
            zip(planned.readings, need.members.tolist(), strict=True)
        ):
            block = reading.block
            assert block is not None, "it has been waited for"
            at = member - block.first
            data.append(block.data[at])
            facts.append(block.facts[at])
            if block.faults and member in block.faults:
                bad.append((place, block))
        making = _Making(need=need, data=data, facts=facts, tries=np.zeros(len(data), np.int64))
        for place, block in bad:
            self._replace(making, place, block.faults[int(need.members[place])], near=block)
        self._release(planned.left)
        batch = making.batch()
        self._used_samples += len(batch)
        self._used_bytes += sum(map(len, batch.data))
        return batch

    def _replace(self, making: "_Making", place: int, reason: str, *, near: Block | None) -> None:
        """Write a bad sample down, and fill its place with the next substitute that is sound."""
        need = making.need
        source, shard, member, position = (
            int(column[place])
            for column in (need.sources, need.shards, need.members, need.positions)
        )
        shard_set = self._sources[source].shard_set
        if not making.tries[place]:
            self._quarantine.add(self._bad_sample(source, shard, member, position, reason))
        if self._on_bad == "drop":
            making.data[place] = None
            return
        order = candidates(
            position,
            shard,
            member,
            shard_samples=shard_set.samples,
            block=self._block,
            seed=self._seed,
        )
        for number, (other_shard, other) in enumerate(order):
            if number < making.tries[place]:
                continue
            making.tries[place] = number + 1
            if (source, other_shard, other) in self._known_bad:
                continue
            block = near if other_shard == shard else None
            if block is None or not 0 <= other - block.first < len(block.data):
                block = self._reader.read(self._reader.hold(source, other_shard, other, other + 1))
            for bad, fault in block.faults.items():
                self._known_bad[source, other_shard, bad] = fault
            if other not in block.faults:
                at = other - block.first
                making.data[place], making.facts[place] = block.data[at], block.facts[at]
                return
        raise BadDataError(
            f"{self._reader.uri(source, shard)}: no sound sample is left to take the place of "
            f"sample {member} ({reason}); run 'moco-scale verify' on the shard set"
        )

    def _bad_sample(
        self, source: int, shard: int, member: int, position: int, reason: str
    ) -> BadSample:
        one = self._sources[source]
        index = self._reader.index(source, shard)
        ordinal = int(one.shard_set.first_ordinal[shard] + index.position[member])
        return BadSample(
            shard=self._reader.uri(source, shard),
            key=self._sample_key(source, shard, int(index.offset[member])),
            sample_id=one.first_id + ordinal,
            position=position,
            reason=reason,
        )

    def _sample_key(self, source: int, shard: int, offset: int) -> str | None:
        """The member's name before its first dot, from the tar header in front of its data."""
        try:
            header = self._reader.fetch(source, shard, offset - _TAR_HEADER_BYTES, offset)
            name = header[:100].tobytes().split(b"\0")[0].decode("ascii")
        except (StoreError, UnicodeDecodeError):
            return None  # it is only for people, and what is wrong is reported already
        return name.rpartition("/")[2].partition(".")[0] or None

    def _wait_for(self, future: "Future[T]") -> T:
        """What a read gives; until it is done, the deadline has passed, or the stream is closed.

        Raises:
            StalledError, StoreError
        """
        began = time.perf_counter()
        where = self._running.get(future, ("a block", began))[0]
        while not future.done() and not self._closed:
            wait([future], timeout=min(_WAKE_S, self._timeout_s))
            if time.perf_counter() > began + self._timeout_s and not future.done():
                raise StalledError(
                    f"{where} gave nothing for {self._timeout_s:g} s: {self.describe()}"
                )
        self._waited_s += time.perf_counter() - began
        if self._closed:
            raise _Closed  # for nobody to see: it ends the thread
        return future.result()


class _Readers:
    """Threads that read.

    Not a ThreadPoolExecutor: the interpreter waits for its threads before it exits, and a read from
    a file system that has gone may never end.
    """

    def __init__(self, count: int) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopped = False
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"block-read-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, read: Callable[[A], T], argument: A) -> "Future[T]":
        future: Future[T] = Future()

        def run() -> None:
            if self._stopped:
                future.cancel()
            if not future.set_running_or_notify_cancel():
                return
            try:
                found = read(argument)
            except BaseException as err:  # whoever waits for the future gets it
                traceback.clear_frames(err.__traceback__)  # bytes that were read, perhaps
                future.set_exception(err)
            else:
                future.set_result(found)

        with self._lock:
            if self._stopped:  # no thread would come to it any more
                future.cancel()
            else:
                self._jobs.put(run)
        return future

    def stop(self) -> None:
        """Begin no further reads; harmless twice."""
        with self._lock:
            if self._stopped:
                return
            self._stopped = True
            for _ in self._threads:
                self._jobs.put(None)

    def join(self, *, timeout_s: float) -> bool:
        """Whether all threads have ended in time."""
        deadline = time.perf_counter() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.perf_counter()))
        return not any(thread.is_alive() for thread in self._threads)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # it holds what it read


class _Closed(Exception):
    """The stream was closed while it waited."""


@dataclass(slots=True)
class _Reading:
    """A block, or one sample of one, on its way or here."""

    future: "Future[Block]"
    block: Block | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    """A batch whose reads are under way."""

    need: Need
    readings: Sequence[_Reading]
    left: list[int]
    """Blocks that a lane leaves after this batch; grows while the next one is planned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Making:
    """A batch in the making."""

    need: Need
    data: "list[Bytes | None]"
    """None: the place is left out."""
    facts: list[tuple[int, int, int, int]]
    """See `Block`."""
    tries: NDArray[np.int64]

    @classmethod
    def of(cls, batch: EncodedBatch) -> "_Making":
        columns = (batch.sample_ids, *batch.sizes.T, batch.orientations)
        return cls(
            need=Need(
                positions=batch.positions,
                lanes=np.zeros(len(batch), dtype=np.int64),  # it has its blocks
                sources=batch.sources,
                shards=batch.shards,
                members=batch.members,
            ),
            data=list(batch.data),
            facts=list(zip(*(column.tolist() for column in columns), strict=True)),
            tries=batch.tries.copy(),
        )

    def batch(self) -> EncodedBatch:
        data = [one for one in self.data if one is not None]
        facts = np.array(self.facts, dtype=np.int64).reshape(-1, 4)
        need, tries = self.need, self.tries
        columns = [need.positions, need.sources, need.shards, need.members]
        if len(data) < len(self.data):
            kept = [place for place, one in enumerate(self.data) if one is not None]
            facts, tries = facts[kept], tries[kept]
            columns = [column[kept] for column in columns]
        positions, sources, shards, members = columns
        return EncodedBatch(
            data=tuple(data),
            sample_ids=facts[:, 0],
            positions=positions,
            sizes=facts[:, 1:3].astype(np.int32),
            orientations=facts[:, 3].astype(np.uint8),
            sources=sources,
            shards=shards,
            members=members,
            tries=tries,
        )
