"""A block of a shard: its bytes by one range request, every sample checked as it comes in."""

import mmap
import threading
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipelines.quarantine import damage
from pipelines.spans import CHECK, READ, Spans
from shards import ShardIndex, ShardSet
from shards.errors import ChangedError
from shards.objects import Allocate, allocated

Bytes = NDArray[np.uint8]
_SMALLEST_SLAB = 2**15
_AT_ONCE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)
_SLABS_PART = 32
"""What part of the bound slabs that wait to be used again may be when it is full."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A version of a shard set, and what is added to its sample ids."""

    shard_set: ShardSet
    first_id: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Samples [first, stop) of a shard whose bytes are counted, so that they may be read."""

    source: int
    shard: int
    first: int
    stop: int
    index: ShardIndex
    start: int
    """First of their bytes in the tar."""
    size: int

    @property
    def is_block(self) -> bool:
        """Whether they are more than one sample."""
        return self.stop - self.first > 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Consecutive samples of a shard."""

    first: int
    """Position in the shard of the first of them."""
    data: list[Bytes]
    """Views of one buffer."""
    facts: list[tuple[int, int, int, int]]
    """Sample id, width and height of the upright image, EXIF orientation."""
    faults: dict[int, str]
    """What is wrong with those that are bad, by position in the shard."""


class Slabs:
    """Memory that is used again: to touch fresh pages costs more than to read into them."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self._free_bytes = 0
        self._given_back: deque[NDArray[np.uint8]] = deque()
        self._lock = threading.Lock()

    def take(self, size: int, *, most_bytes: int) -> NDArray[np.uint8]:
        """A slab of at least so many bytes, and not many more; a small one is never used again.

        Args:
            most_bytes: of slabs that wait to be used again.
        """
        with self._lock:
            self._collect(most_bytes)
            fitting = [
                n for n, slab in enumerate(self._free) if size <= len(slab) <= size + size // 8
            ]
            if fitting:
                slab = self._free.pop(min(fitting, key=lambda n: len(self._free[n])))
                self._free_bytes -= len(slab)
                return slab
        if size < _SMALLEST_SLAB:
            return np.empty(size, dtype=np.uint8)
        # Of few sizes, so that the next block, of nearly the same size, fits. And a mapping of its
        # own: what malloc is given back it keeps, in pieces.
        step = 1 << max(0, size.bit_length() - 6)
        size = -(-size // step) * step
        try:
            return np.frombuffer(mmap.mmap(-1, size, flags=_AT_ONCE), dtype=np.uint8)
        except OSError:  # a process may have so many mappings and no more
            return np.empty(size, dtype=np.uint8)

    def give_back(self, slab: NDArray[np.uint8]) -> None:
        """Nobody reads it any more. Called wherever its last reader goes, so it takes no lock."""
        if len(slab) >= _SMALLEST_SLAB:
            self._given_back.append(slab)

    def _collect(self, most_bytes: int) -> None:
        while self._given_back:
            slab = self._given_back.popleft()
            self._free.append(slab)
            self._free_bytes += len(slab)
        # The longest unused go: what nothing fits into must not fill the room.
        while self._free_bytes > most_bytes:
            self._free_bytes -= len(self._free.pop(0))


class BlockReader:
    """Reads blocks, from any thread, and knows how many bytes of them are still in use."""

    def __init__(
        self,
        sources: Mapping[int, Source],
        *,
        max_pixels: int,
        buffer_bytes: int,
        spans: Spans | None = None,
    ) -> None:
        self._sources = sources
        self._spans = spans or Spans()
        self._max_pixels = max_pixels
        self._slabs = Slabs()
        self._buffer_bytes = buffer_bytes
        self._freed: deque[tuple[int, bool]] = deque()
        self._lock = threading.Lock()
        self._held = [0, 0]  # bytes of samples read alone, and of blocks
        self.indexes: dict[tuple[int, int], ShardIndex] = {}
        """By source and shard: those that are to be at hand, whatever the shard sets forget."""
        self.read_bytes = 0
        self.read_requests = 0
        self.peak_held_bytes = 0

    def uri(self, source: int, shard: int) -> str:
        """The shard's address, for messages."""
        shard_set = self._sources[source].shard_set
        return shard_set.tars.uri(shard_set.names[shard])

    def index(self, source: int, shard: int) -> ShardIndex:
        """A shard's index; one that is not at hand may cost a request."""
        found = self.indexes.get((source, shard))
        return self._sources[source].shard_set.index(shard) if found is None else found

    def size(self, source: int, shard: int, first: int, stop: int) -> int:
        """Bytes of samples [first, stop) of a shard, and of what lies between them."""
        return _span(self.index(source, shard), first, stop)[1]

    def hold(self, source: int, shard: int, first: int, stop: int) -> Held:
        """Count the bytes of samples [first, stop) before they are read."""
        index = self.index(source, shard)
        start, size = _span(index, first, stop)
        held = Held(
            source=source, shard=shard, first=first, stop=stop, index=index, start=start, size=size
        )
        with self._lock:
            self._subtract_what_was_freed()
            self._held[held.is_block] += size
            self.peak_held_bytes = max(self.peak_held_bytes, sum(self._held))
        return held

    def let_go(self, held: Held) -> None:
        """Count bytes that will not be read after all. Takes no lock."""
        self._freed.append((held.size, held.is_block))

    @property
    def held_bytes(self) -> int:
        """Bytes on their way, here, or still used by a batch, whoever has it by now."""
        with self._lock:
            self._subtract_what_was_freed()
            return sum(self._held)

    @property
    def held_block_bytes(self) -> int:
        """Of these, the bytes of blocks of more than one sample."""
        with self._lock:
            self._subtract_what_was_freed()
            return self._held[True]

    def _subtract_what_was_freed(self) -> None:
        # A buffer is freed wherever its last user is, perhaps under this very lock: so what is
        # freed is only noted there, and subtracted here.
        while self._freed:
            size, is_block = self._freed.popleft()
            self._held[is_block] -= size

    def read(self, held: Held) -> Block:
        """Samples of a shard; let go when the last view of them is gone, or when this raises.

        Raises:
            StoreError: the store failed for good, or the shard was replaced; never a bad sample.
        """
        return self.checked(held, self.load(held))

    def load(self, held: Held) -> Bytes:
        """The bytes of samples, as they came; let go when the last view of them is gone.

        Raises:
            StoreError: the store failed for good, or the shard was replaced.
        """
        source, shard = held.source, held.shard
        start, size = held.start, held.size
        slab = self._slabs.take(size, most_bytes=self._room_for_slabs())
        try:
            with self._spans.of(READ, samples=held.stop - held.first, size_bytes=size):
                found = self._fetch(source, shard, start, start + size, lambda _: slab.data[:size])
        except BaseException:
            self._let_go_of(slab, size, held.is_block)
            raise
        buffer = np.frombuffer(found, dtype=np.uint8)
        if not np.may_share_memory(buffer, slab):  # a store that reads into memory of its own
            self._slabs.give_back(slab)
            slab = np.zeros(0, dtype=np.uint8)  # not of `buffer`, which that would keep for ever
        # The views of the samples hold `buffer`, and that holds the slab. (A slice of the slab
        # itself would not do: numpy lets views of a view hold the first owner alone.)
        weakref.finalize(buffer, self._let_go_of, slab, size, held.is_block).atexit = False
        return buffer

    def checked(self, held: Held, buffer: Bytes) -> Block:
        """The samples in what was loaded, and what is wrong with them."""
        with self._spans.of(CHECK, samples=held.stop - held.first, size_bytes=held.size):
            return self._checked(held, buffer)

    def _checked(self, held: Held, buffer: Bytes) -> Block:
        source, shard, first, stop = held.source, held.shard, held.first, held.stop
        index, start = held.index, held.start
        one = self._sources[source]
        offsets = (index.offset[first:stop] - start).tolist()
        ends = (index.end[first:stop] - start).tolist()
        data = [buffer[begin:end] for begin, end in zip(offsets, ends, strict=True)]
        checksums = index.checksum[first:stop].tolist()
        hashed = [xxhash.xxh3_64_intdigest(one.data) for one in data]
        wrong = [
            n for n, (is_, was) in enumerate(zip(hashed, checksums, strict=True)) if is_ != was
        ]
        faults = {}
        if wrong:
            wrong = self._read_again(held, wrong, data, checksums)
            if len(wrong) == len(data):
                self._check_replaced(held)
            faults = dict.fromkeys((first + n for n in wrong), _CHECKSUM)
        widths, heights = index.width[first:stop].tolist(), index.height[first:stop].tolist()
        turned = index.orientation[first:stop].tolist()
        for n, looked_at in enumerate(zip(data, widths, heights, turned, strict=True)):
            fault = damage(*looked_at, max_pixels=self._max_pixels)
            if fault is not None and first + n not in faults:
                faults[first + n] = fault
        ids = (
            index.position[first:stop] + one.shard_set.first_ordinal[shard] + one.first_id
        ).tolist()
        facts = list(zip(ids, widths, heights, turned, strict=True))
        return Block(first=first, data=data, facts=facts, faults=faults)

    def fetch(self, source: int, shard: int, start: int, end: int) -> Bytes:
        """Bytes [start, end) of a shard's tar."""
        return np.frombuffer(self._fetch(source, shard, start, end, allocated), dtype=np.uint8)

    def _fetch(self, source: int, shard: int, start: int, end: int, allocate: Allocate) -> Any:
        shard_set = self._sources[source].shard_set
        try:
            (found,) = shard_set.tars.read_ranges(
                shard_set.names[shard], [start], [end], allocate=allocate
            )
        except ChangedError:
            self._check_size(source, shard)
            raise
        with self._lock:
            self.read_bytes += end - start
            self.read_requests += 1
        return found

    def _check_size(self, source: int, shard: int) -> None:
        """
        Raises:
            ChangedError: the shard has another size than was indexed.
        """
        shard_set = self._sources[source].shard_set
        found, known = shard_set.tars.head(shard_set.names[shard]).size, shard_set.tar_bytes[shard]
        if found not in (-1, known):  # -1: the store does not know
            raise ChangedError(
                f"{self.uri(source, shard)} was replaced since it was indexed: {found:,} bytes, "
                f"the manifest says {known:,}; run 'moco-scale verify' on the shard set"
            )

    def _check_replaced(self, held: Held) -> None:
        """Whether a shard is another one, now that none of the samples read is what it was.

        Raises:
            ChangedError: it is.
        """
        self._check_size(held.source, held.shard)
        if not held.is_block:  # one may be damaged by itself: so are the ends of its shard right?
            ends = {0, len(held.index.offset) - 1} - {held.first}
            if not ends or any(self._is_right(held, end) for end in ends):
                return
        raise ChangedError(
            f"{self.uri(held.source, held.shard)} was replaced or overwritten since it was "
            "indexed: no sample that was read is what the index says (checksum); "
            "run 'moco-scale verify' on the shard set"
        )

    def _is_right(self, held: Held, member: int) -> bool:
        start, end = int(held.index.offset[member]), int(held.index.end[member])
        found = self.fetch(held.source, held.shard, start, end)
        return xxhash.xxh3_64_intdigest(found.data) == int(held.index.checksum[member])

    def _let_go_of(self, slab: NDArray[np.uint8], size: int, is_block: bool) -> None:
        self._freed.append((size, is_block))
        self._slabs.give_back(slab)

    def _room_for_slabs(self) -> int:
        """What the bound leaves to slabs that wait; when it is full, a little beside it."""
        return max(self._buffer_bytes // _SLABS_PART, self._buffer_bytes - self.held_bytes)

    def _read_again(
        self, held: Held, wrong: list[int], data: list[Bytes], checksums: list[int]
    ) -> list[int]:
        """Once more, because it may pass: puts right what is right now, returns what is not."""
        index, first = held.index, held.first
        start, size = _span(index, first + wrong[0], first + wrong[-1] + 1)
        buffer = self.fetch(held.source, held.shard, start, start + size)
        still = []
        for n in wrong:
            begin = int(index.offset[first + n]) - start
            again = buffer[begin : begin + int(index.length[first + n])]
            if xxhash.xxh3_64_intdigest(again.data) == checksums[n]:
                data[n] = again
            else:
                still.append(n)
        return still


def _span(index: ShardIndex, first: int, stop: int) -> tuple[int, int]:
    """First byte, and number of bytes, of samples [first, stop)."""
    start = int(index.offset[first])
    return start, int(index.end[stop - 1]) - start


_CHECKSUM = "its bytes are not those of the index (checksum)"
