"""Blocks through the store: bounded, checked, on time; encoded samples in the order asked for."""

import dataclasses
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipelines.ahead import Ahead
from pipelines.errors import BadDataError, StalledError
from pipelines.quarantine import BadSample, Quarantine, candidates, damage
from shards import ShardIndex, ShardSet
from shards.errors import StoreError

T = TypeVar("T")
logger = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]
_READ_THREADS = 8
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
    num_replaced: int
    """How many of the N are substitutes."""
    shards: NDArray[np.int64]
    members: NDArray[np.int64]
    """Position in the shard of what was asked for, which a substitute is not."""
    tries: NDArray[np.int64]
    """Substitutes tried for each sample so far."""

    def __len__(self) -> int:
        return len(self.positions)

    def only(self, place: int) -> "EncodedBatch":
        """A batch of one of the samples."""
        here = slice(place, place + 1)
        return EncodedBatch(
            data=self.data[here],
            sample_ids=self.sample_ids[here],
            positions=self.positions[here],
            sizes=self.sizes[here],
            orientations=self.orientations[here],
            num_replaced=int(np.count_nonzero(self.tries[here])),
            shards=self.shards[here],
            members=self.members[here],
            tries=self.tries[here],
        )


class Stream:
    """The batches that `needs` asks for, read ahead by threads.

    A block, `block` consecutive samples of a shard, is one range request. It is read when a lane
    enters it and dropped when the last lane has left it. When another block would exceed
    `buffer_bytes`, its samples are read one by one instead: that costs requests, never order.
    The bound counts blocks that lanes are in or will be in for the batches read ahead; a block
    dropped lives on until the batches made of it are used up.
    """

    def __init__(
        self,
        shard_set: ShardSet,
        needs: Iterator[Need],
        *,
        block: int,
        seed: int,
        prefetch_batches: int,
        buffer_bytes: int,
        wait_timeout_s: float,
        quarantine: Quarantine,
        on_bad: Literal["replace", "drop"],
    ) -> None:
        """Args:
        seed: of the substitutes.
        on_bad: put another sample of the block in a bad one's place, or leave the place out.
        """
        self._set = shard_set
        self._needs = needs
        self._block = block
        self._seed = seed
        self._prefetch = max(1, prefetch_batches)
        self._buffer_bytes = buffer_bytes
        self._timeout_s = wait_timeout_s
        self._quarantine = quarantine
        self._on_bad = on_bad
        self._lane_block: dict[int, _Key] = {}
        self._holders: Counter[_Key] = Counter()
        self._live: dict[_Key, _Reading] = {}
        self._held_bytes = 0
        self._last_shards: set[int] = set()
        self._told_of_bound = False
        self._running: set[Future[Any]] = set()
        self._waiting_for = "nothing"
        self._lock = threading.Lock()
        self._read_bytes = 0
        self._read_requests = 0
        self._closed = False
        self._pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="block-read")
        self._ahead = Ahead(self._batches(), size=self._prefetch, name="stream")

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
            raise StalledError(
                f"no batch from {self._set.url} for {self._timeout_s:g} s: {self.describe()}"
            ) from None

    def describe(self) -> str:
        """The state of the stages, for the message of a stall."""
        return (
            f"{self._ahead.num_ready} batches ready, {len(self._live)} blocks "
            f"({self._held_bytes / 2**20:.1f} MiB) held, {self._read_requests} requests answered, "
            f"waiting for {self._waiting_for}"
        )

    @property
    def read_bytes(self) -> int:
        return self._read_bytes

    @property
    def read_requests(self) -> int:
        return self._read_requests

    @property
    def held_bytes(self) -> int:
        return self._held_bytes

    def repair(self, batch: EncodedBatch, faults: Mapping[int, str]) -> EncodedBatch:
        """The batch again, without the samples that turned out bad when they were decoded.

        Args:
            batch: as this stream gave it, or as this method did.
            faults: reason by place in the batch.
        """
        found = _Samples.of(batch)
        for place, reason in faults.items():
            self._replace(found, place, reason, near=None)
        return found.batch()

    def close(self) -> None:
        """Stop the threads and let the blocks go; harmless twice."""
        self._closed = True
        self._pool.shutdown(wait=False, cancel_futures=True)
        joined = self._ahead.close(timeout_s=_CLOSE_S)
        _, late = wait(list(self._running), timeout=_CLOSE_S)
        if late or not joined:
            logger.warning("%s: %d reads did not end in time", self._set.url, len(late))
        else:
            self._pool.shutdown(wait=True)
        self._live.clear()

    # Everything below runs in the stream's thread, except reads (pool) and repair (its caller's).

    def _batches(self) -> Generator[EncodedBatch, None, None]:
        planned: deque[_Planned] = deque()
        for need in self._needs:
            planned.append(self._plan(need))
            if len(planned) > self._prefetch:
                yield self._assemble(planned.popleft())
            if self._closed:
                return
        while planned:
            yield self._assemble(planned.popleft())

    def _plan(self, need: Need) -> "_Planned":
        """Start the reads of one batch; say which blocks may go after it."""
        self._load_indexes(need.shards)
        readings: list[_Reading] = []
        left: list[_Key] = []
        entries = zip(need.lanes.tolist(), need.shards.tolist(), need.members.tolist(), strict=True)
        for lane, shard, member in entries:
            key = (shard, member // self._block)
            before = self._lane_block.get(lane)
            if key != before:
                if before is not None:
                    left.append(before)
                self._lane_block[lane] = key
                self._holders[key] += 1
                self._admit(key)
            readings.append(self._live.get(key) or self._read(shard, member, member + 1))
        return _Planned(need=need, readings=readings, left=left)

    def _admit(self, key: "_Key") -> None:
        """Start to read a block, if it is not live already and the bound has room for it."""
        if key in self._live:
            return
        shard, number = key
        first = number * self._block
        stop = min(first + self._block, int(self._set.samples[shard]))
        size = _span(self._set.index(shard), first, stop)[1]
        if self._held_bytes + size <= self._buffer_bytes:
            self._held_bytes += size
            self._live[key] = self._read(shard, first, stop)
        elif not self._told_of_bound:
            self._told_of_bound = True
            logger.warning(
                "the blocks that are needed at once exceed data.buffer_bytes %d: some samples are "
                "read one by one, a request each; raise data.buffer_bytes or lower "
                "data.block_samples",
                self._buffer_bytes,
            )

    def _release(self, left: list["_Key"]) -> None:
        for key in left:
            self._holders[key] -= 1
            if self._holders[key] == 0:
                del self._holders[key]
                gone = self._live.pop(key, None)
                if gone is not None:
                    self._held_bytes -= gone.size

    def _load_indexes(self, shards: NDArray[np.int64]) -> None:
        """Bring a batch's indexes in side by side: one by one they would cost a round trip each."""
        wanted = set(np.unique(shards).tolist())
        pending = [self._submit(self._set.index, one) for one in wanted - self._last_shards]
        self._last_shards = wanted
        for one in pending:
            self._wait_for(one, f"an index of {self._set.url}")

    def _read(self, shard: int, first: int, stop: int) -> "_Reading":
        start, size = _span(self._set.index(shard), first, stop)
        future = self._submit(self._fetch, shard, start, start + size)
        return _Reading(shard=shard, start=start, size=size, future=future)

    def _submit(self, read: Callable[..., T], *where: int) -> "Future[T]":
        future = self._pool.submit(read, *where)
        self._running.add(future)
        future.add_done_callback(self._running.discard)
        return future

    def _fetch(self, shard: int, start: int, end: int) -> Bytes:
        (found,) = self._set.tars.read_ranges(self._set.names[shard], [start], [end])
        with self._lock:
            self._read_bytes += end - start
            self._read_requests += 1
        return np.frombuffer(found, dtype=np.uint8)

    def _assemble(self, planned: "_Planned") -> EncodedBatch:
        need = planned.need
        self._quarantine.seen(len(need.positions))
        found = _Samples.wanted(need)
        for place, reading in enumerate(planned.readings):
            self._wait_for(reading.future, self._set.tars.uri(self._set.names[reading.shard]))
            member = int(need.members[place])
            fault = self._take(found, place, member, near=reading)
            if fault is not None:
                self._replace(found, place, fault, near=reading)
        self._waiting_for = "nothing"
        self._release(planned.left)
        return found.batch()

    def _take(
        self, found: "_Samples", place: int, member: int, *, near: "_Reading | None"
    ) -> str | None:
        """Put a sample in its place, and say what is wrong with it."""
        shard = int(found.shards[place])
        index = self._set.index(shard)
        offset, length = int(index.offset[member]), int(index.length[member])
        data = near.cut(offset, length) if near is not None else None
        if data is None:
            data = self._fetch(shard, offset, offset + length)
        checksum = int(index.checksum[member])
        if xxhash.xxh3_64_intdigest(data.data) != checksum:
            data = self._fetch(shard, offset, offset + length)  # once more: it may pass
        if xxhash.xxh3_64_intdigest(data.data) != checksum:
            return "its bytes are not those of the index (checksum)"
        width, height = int(index.width[member]), int(index.height[member])
        orientation = int(index.orientation[member])
        found.data[place] = data
        found.sample_ids[place] = self._set.first_ordinal[shard] + index.position[member]
        found.sizes[place] = width, height
        found.orientations[place] = orientation
        return damage(data, width=width, height=height, orientation=orientation)

    def _replace(
        self, found: "_Samples", place: int, reason: str, *, near: "_Reading | None"
    ) -> None:
        """Write a bad sample down, and fill its place with the next substitute that is sound."""
        shard, member = int(found.shards[place]), int(found.members[place])
        position = int(found.positions[place])
        first_time = found.tries[place] == 0
        if first_time:
            self._quarantine.add(self._bad_sample(shard, member, position, reason))
        if self._on_bad == "drop":
            found.data[place] = None
            return
        order = candidates(
            position,
            member,
            num_samples=int(self._set.samples[shard]),
            block=self._block,
            seed=self._seed,
        )
        for number, substitute in enumerate(order):
            if number < found.tries[place]:
                continue
            found.tries[place] = number + 1
            if self._take(found, place, substitute, near=near) is None:
                return
        raise BadDataError(
            f"{self._set.tars.uri(self._set.names[shard])}: no sound sample left to take the "
            f"place of sample {member} ({reason}); run 'moco-scale verify' on the shard set"
        )

    def _bad_sample(self, shard: int, member: int, position: int, reason: str) -> BadSample:
        return BadSample(
            shard=self._set.tars.uri(self._set.names[shard]),
            key=self._sample_key(shard, member),
            sample_id=int(self._set.first_ordinal[shard] + self._set.index(shard).position[member]),
            position=position,
            reason=reason,
        )

    def _sample_key(self, shard: int, member: int) -> str | None:
        """The member's name before its first dot, from the tar header in front of its data."""
        offset = int(self._set.index(shard).offset[member])
        try:
            header = self._fetch(shard, offset - _TAR_HEADER_BYTES, offset).tobytes()
            name = header[:100].split(b"\0")[0].decode("ascii")
        except (StoreError, UnicodeDecodeError):
            return None  # it is only for people, and what is wrong is reported already
        return name.rpartition("/")[2].partition(".")[0] or None

    def _wait_for(self, future: "Future[Any]", what: str) -> None:
        """Until a read is done, the deadline has passed, or the stream is closed.

        Raises:
            StalledError, StoreError
        """
        self._waiting_for = what
        deadline = time.perf_counter() + self._timeout_s
        while not future.done() and not self._closed:
            wait([future], timeout=min(_WAKE_S, self._timeout_s))
            if time.perf_counter() > deadline and not future.done():
                raise StalledError(
                    f"{what} gave nothing for {self._timeout_s:g} s: {self.describe()}"
                )
        if self._closed:
            raise _Closed  # for nobody to see: it ends the thread
        future.result()


class _Closed(Exception):
    """The stream was closed while it waited."""


_Key = tuple[int, int]
"""Shard, and number of a block in it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Reading:
    """Bytes [start, start + size) of a shard, on their way or here."""

    shard: int
    start: int
    size: int
    future: "Future[Bytes]"

    def cut(self, offset: int, length: int) -> Bytes | None:
        """A view of some of the bytes; None if they are not all here."""
        begin = offset - self.start
        if begin < 0 or begin + length > self.size:
            return None
        return self.future.result()[begin : begin + length]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    """A batch whose reads are under way."""

    need: Need
    readings: list[_Reading]
    left: list[_Key]
    """Blocks that a lane has left once this batch is made."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Samples:
    """A batch in the making."""

    data: list[Bytes | None]
    """None: the place is left out."""
    sample_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    sizes: NDArray[np.int32]
    orientations: NDArray[np.uint8]
    shards: NDArray[np.int64]
    members: NDArray[np.int64]
    tries: NDArray[np.int64]

    @classmethod
    def wanted(cls, need: Need) -> "_Samples":
        count = len(need.positions)
        return cls(
            data=[None] * count,
            sample_ids=np.zeros(count, dtype=np.int64),
            positions=need.positions,
            sizes=np.zeros((count, 2), dtype=np.int32),
            orientations=np.zeros(count, dtype=np.uint8),
            shards=need.shards,
            members=need.members,
            tries=np.zeros(count, dtype=np.int64),
        )

    @classmethod
    def of(cls, batch: EncodedBatch) -> "_Samples":
        names = [field.name for field in dataclasses.fields(cls)]
        copied = {name: getattr(batch, name).copy() for name in names if name != "data"}
        return cls(data=list(batch.data), **copied)

    def batch(self) -> EncodedBatch:
        kept = [place for place, data in enumerate(self.data) if data is not None]
        tries = self.tries[kept]
        return EncodedBatch(
            data=tuple(data for data in self.data if data is not None),
            sample_ids=self.sample_ids[kept],
            positions=self.positions[kept],
            sizes=self.sizes[kept],
            orientations=self.orientations[kept],
            num_replaced=int(np.count_nonzero(tries)),
            shards=self.shards[kept],
            members=self.members[kept],
            tries=tries,
        )


def _span(index: ShardIndex, first: int, stop: int) -> tuple[int, int]:
    """First byte, and number of bytes, from sample `first` to the end of sample `stop` - 1."""
    start = int(index.offset[first])
    return start, int(index.offset[stop - 1]) + int(index.length[stop - 1]) - start
