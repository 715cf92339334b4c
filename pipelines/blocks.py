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
from shards import ShardSet
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
        self, sources: Mapping[int, Source], *, max_pixels: int, buffer_bytes: int
    ) -> None:
        self._sources = sources
        self._max_pixels = max_pixels
        self._slabs = Slabs()
        self._buffer_bytes = buffer_bytes
        self._freed: deque[tuple[int, bool]] = deque()
        self._lock = threading.Lock()
        self._held = [0, 0]  # bytes of samples read alone, and of blocks
        self.read_bytes = 0
        self.read_requests = 0
        self.peak_held_bytes = 0

    def uri(self, source: int, shard: int) -> str:
        """The shard's address, for messages."""
        shard_set = self._sources[source].shard_set
        return shard_set.tars.uri(shard_set.names[shard])

    def span(self, source: int, shard: int, first: int, stop: int) -> tuple[int, int]:
        """First byte, and number of bytes, of samples [first, stop) of a shard."""
        index = self._sources[source].shard_set.index(shard)
        start = int(index.offset[first])
        return start, int(index.offset[stop - 1]) + int(index.length[stop - 1]) - start

    def hold(self, source: int, shard: int, first: int, stop: int) -> int:
        """Count the bytes of samples [first, stop) before they are read; how many they are."""
        size = self.span(source, shard, first, stop)[1]
        with self._lock:
            self._subtract_what_was_freed()
            self._held[stop - first > 1] += size
            self.peak_held_bytes = max(self.peak_held_bytes, sum(self._held))
        return size

    def let_go(self, size: int, *, is_block: bool) -> None:
        """Count bytes that will not be read after all. Takes no lock.

        Args:
            is_block: they are of more than one sample.
        """
        self._freed.append((size, is_block))

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

    def read(self, source: int, shard: int, first: int, stop: int) -> Block:
        """Samples [first, stop) of a shard.

        Their bytes must have been counted by `hold`; they are let go when the last view of them is
        gone, or when this raises.

        Raises:
            StoreError: the store failed for good, or the shard was replaced; never a bad sample.
        """
        one = self._sources[source]
        index = one.shard_set.index(shard)
        start, size = self.span(source, shard, first, stop)
        slab = self._slabs.take(size, most_bytes=self._room_for_slabs())
        try:
            found = self._fetch(source, shard, start, start + size, lambda _: slab.data[:size])
        except BaseException:
            self._let_go_of(slab, size, stop - first > 1)
            raise
        buffer = np.frombuffer(found, dtype=np.uint8)
        if not np.may_share_memory(buffer, slab):  # a store that reads into memory of its own
            self._slabs.give_back(slab)
            slab = buffer[:0]
        # The views of the samples hold `buffer`, and that holds the slab. (A slice of the slab
        # itself would not do: numpy lets views of a view hold the first owner alone.)
        weakref.finalize(buffer, self._let_go_of, slab, size, stop - first > 1).atexit = False
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
            wrong = self._read_again(source, shard, first, wrong, data, checksums)
            is_all = len(wrong) == len(data) > 1
            if is_all:
                self._check_size(source, shard)
            faults = dict.fromkeys(
                (first + n for n in wrong), _OVERWRITTEN if is_all else _CHECKSUM
            )
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
        """Whether a shard that is not what was indexed is so as a whole.

        Raises:
            ChangedError: it has another size.
        """
        shard_set = self._sources[source].shard_set
        found, known = shard_set.tars.head(shard_set.names[shard]).size, shard_set.tar_bytes[shard]
        if found not in (-1, known):  # -1: the store does not know
            raise ChangedError(
                f"{self.uri(source, shard)} was replaced since it was indexed: {found:,} bytes, "
                f"the manifest says {known:,}; run 'moco-scale verify' on the shard set"
            )

    def _let_go_of(self, slab: NDArray[np.uint8], size: int, is_block: bool) -> None:
        self._freed.append((size, is_block))
        self._slabs.give_back(slab)

    def _room_for_slabs(self) -> int:
        """What the bound leaves to slabs that wait; when it is full, a little beside it."""
        return max(self._buffer_bytes // _SLABS_PART, self._buffer_bytes - self.held_bytes)

    def _read_again(
        self,
        source: int,
        shard: int,
        first: int,
        wrong: list[int],
        data: list[Bytes],
        checksums: list[int],
    ) -> list[int]:
        """Once more, because it may pass: puts right what is right now, returns what is not."""
        start, size = self.span(source, shard, first + wrong[0], first + wrong[-1] + 1)
        index = self._sources[source].shard_set.index(shard)
        buffer = self.fetch(source, shard, start, start + size)
        still = []
        for n in wrong:
            begin = int(index.offset[first + n]) - start
            again = buffer[begin : begin + int(index.length[first + n])]
            if xxhash.xxh3_64_intdigest(again.data) == checksums[n]:
                data[n] = again
            else:
                still.append(n)
        return still


_CHECKSUM = "its bytes are not those of the index (checksum)"
_OVERWRITTEN = "no byte around it is what the index says (checksum): the shard was overwritten"
