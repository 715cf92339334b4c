"""Which 64-bit hashes are near another that is kept: exact, by sorting, in bounded memory.

Hashes that differ in at most D bits agree on at least B - D of B blocks of bits. So for each choice
of B - D blocks the hashes are sorted with those blocks in front, and only those that agree on them
are compared. (Manku, Jain, Das Sarma: Detecting Near-Duplicates for Web Crawling, 2007.) No pair is
missed, whatever the hashes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import combinations, count, islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Places = NDArray[np.int64]
T = TypeVar("T")

KEPT = np.uint64(2**64 - 1)
"""In place of a rank: no kept hash is near, so this one is kept."""
_ROWS = 1 << 24
"""Hashes sorted at once by a thread."""
_CACHED = 1 << 14  # of what is compared over and over: stays in a core's own cache
_SMALL_BUCKET = 64
_TILE_ROWS, _TILE_COLUMNS = 64, 2048
_AT_ONCE = 1 << 20
_EXPANDED = 1 << 18
_MOST_PAIRS = 1 << 24  # near ones at a time: 1.5 GB with what becomes of them
_FEW = 4096  # so few are compared at any density
_MOST_TABLES, _MOST_BLOCKS = 1000, 20
# Measured, in ns a hash: to sort it in one more table, to compare it with one more.
_SORT_NS, _COMPARE_NS = 13.0, 1.0


def keep_first(
    hashes: Words,
    ranks: Words,
    *,
    distance: int,
    scratch: Path,
    threads: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Words, NDArray[np.uint8]]:
    """Keep hashes in the order of their ranks, each unless it is near one that is kept already.

    Args:
        hashes: N, ascending and distinct; may lie in a file.
        ranks: N distinct ones, below KEPT.
        distance: bits in which near hashes differ at most.
        scratch: a folder for files, of 50 N bytes, or some times as much where hashes lie dense.
        threads: each takes some 0.4 GB.
        progress: told how many hashes were sorted, and how many will be, as far as is known.

    Returns:
        For each hash the rank of the first kept one that it is near, or KEPT if it is kept itself;
        and the distance to that one. Both lie in files in `scratch`.
    """
    files = _Files(scratch)
    first = files.array(len(hashes), np.uint64)
    first[:] = KEPT
    away = files.array(len(hashes), np.uint8)
    if distance and len(hashes) > 1:
        with ThreadPoolExecutor(threads) as pool:
            search = _Search(distance, files, pool, threads, progress)
            _solve(_Rows(hashes, ranks, files.numbers(len(hashes))), first, away, search)
    return first, away


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some of the hashes, ascending; ranks and places in the whole beside them."""

    hashes: Words
    ranks: Words
    places: Places

    def __len__(self) -> int:
        return len(self.hashes)


class _TooDense(Exception):
    """More pairs than are worth comparing, or than memory holds."""


def _solve(rows: _Rows, first: Words, away: NDArray[np.uint8], search: "_Search") -> None:
    """Decide about all rows. None of them is near a kept hash outside.

    Where thousands of hashes are near one another, their pairs would be millions. Then the first
    half is decided alone; what is near its kept ones goes; and of a dense heap little is left.
    """
    files = search.files
    while True:
        try:
            later, earlier = search.pairs(rows)
        except _TooDense:
            middle = np.partition(rows.ranks, len(rows) // 2)[len(rows) // 2]
            half = files.subset(rows, partial(_is_before, rank=middle))
            rest = files.subset(rows, partial(_is_from, rank=middle))
            _solve(half, first, away, search)
            search.near(files.subset(half, partial(_is_kept, first=first)), rest, first, away)
            rows = files.subset(rest, partial(_is_kept, first=first))
        else:
            _decide(rows, later, earlier, first, away)
            return


def _is_before(rows: _Rows, *, rank: np.uint64) -> NDArray[np.bool_]:
    return rows.ranks < rank


def _is_from(rows: _Rows, *, rank: np.uint64) -> NDArray[np.bool_]:
    return rows.ranks >= rank


def _is_kept(rows: _Rows, *, first: Words) -> NDArray[np.bool_]:
    kept: NDArray[np.bool_] = first[rows.places] == KEPT
    return kept


def _decide(
    rows: _Rows, later: Places, earlier: Places, first: Words, away: NDArray[np.uint8]
) -> None:
    """Walk through the near pairs by rank. What is not in a pair is kept."""
    involved, which = np.unique(np.concatenate([later, earlier]), return_inverse=True)
    by_rank = np.argsort(rows.ranks[involved])
    number = np.empty(len(involved), dtype=np.int64)  # numbers follow the ranks
    number[by_rank] = np.arange(len(involved))
    involved = involved[by_rank]
    late, early = number[which[: len(later)]], number[which[len(later) :]]
    order = np.argsort(late, kind="stable")
    late, early = late[order], early[order]
    is_kept = bytearray(b"\1") * len(involved)
    for one, other in zip(late.tolist(), early.tolist(), strict=True):
        if is_kept[other]:  # final: all pairs in which it is the later one came before
            is_kept[one] = 0
    counts = np.frombuffer(is_kept, dtype=np.uint8)[early] == 1
    late, early = involved[late[counts]], involved[early[counts]]
    bits = np.bitwise_count(rows.hashes[late] ^ rows.hashes[early])
    _note(rows.places[late], rows.ranks[early], bits, first, away)


def _note(
    places: Places,
    ranks: Words,
    bits: NDArray[np.uint8],
    first: Words,
    away: NDArray[np.uint8],
) -> None:
    """Write down near kept hashes where they come before what is known."""
    order = np.lexsort((ranks, places))
    places, ranks, bits = places[order], ranks[order], bits[order]
    is_first = np.append(True, np.diff(places) != 0)[: len(places)]
    is_first[is_first] = ranks[is_first] < first[places[is_first]]
    first[places[is_first]] = ranks[is_first]
    away[places[is_first]] = bits[is_first]


class _Search:
    """Finds near pairs, a table a thread."""

    def __init__(
        self,
        distance: int,
        files: "_Files",
        pool: ThreadPoolExecutor,
        threads: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.files = files
        self._distance = distance
        self._pool = pool
        self._threads = threads
        self._progress = progress
        self._done = self._total = 0

    def pairs(self, rows: _Rows) -> tuple[Places, Places]:
        """Places in `rows` of all near pairs, each with the later rank first; repeats occur.

        Raises:
            _TooDense
        """
        if len(rows) < 2:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        blocks = _Blocks.choose(len(rows), self._distance)
        pairs: list[NDArray[np.uint64]] = []
        most = _most_pairs(len(rows))
        tables = blocks.tables()
        for found in self._each(lambda table: self._pairs_of(rows, table), tables, len(rows)):
            pairs.append(found)
            if sum(map(len, pairs)) > most:
                raise _TooDense
        one, other = np.concatenate(pairs).T
        here, there = np.searchsorted(rows.hashes, one), np.searchsorted(rows.hashes, other)
        is_later = rows.ranks[here] > rows.ranks[there]
        return np.where(is_later, here, there), np.where(is_later, there, here)

    def near(self, kept: _Rows, rest: _Rows, first: Words, away: NDArray[np.uint8]) -> None:
        """Note for each of `rest` the first of `kept` that it is near."""
        if not len(kept) or not len(rest):
            return
        tables = _Blocks.choose(len(kept) + len(rest), self._distance).tables()
        total = len(kept) + len(rest)
        for found in self._each(lambda table: self._near_of(kept, rest, table), tables, total):
            one, other = found.T
            which = np.searchsorted(rest.hashes, other)
            bits = np.bitwise_count(one ^ other)
            ranks = kept.ranks[np.searchsorted(kept.hashes, one)]
            _note(rest.places[which], ranks, bits, first, away)

    def _each(
        self, run: "Callable[[_Table], T]", tables: "Iterator[_Table]", num_rows: int
    ) -> Iterator[T]:
        todo = list(tables)
        self._total += num_rows * len(todo)
        left = iter(todo)
        running: list[Future[T]] = []
        try:
            running += [self._pool.submit(run, one) for one in islice(left, self._threads)]
            while running:
                found = running.pop(0).result()
                running += [self._pool.submit(run, one) for one in islice(left, 1)]
                self._done += num_rows
                if self._progress is not None:
                    self._progress(self._done, self._total)
                yield found
        finally:
            for one in running:
                one.cancel()
            for one in running:
                if not one.cancelled():
                    one.exception()

    def _pairs_of(self, rows: _Rows, table: "_Table") -> NDArray[np.uint64]:
        with _Sorted(rows.hashes, table, self.files) as ordered:
            budget, most, num_found = _budget(len(rows), table), _most_pairs(len(rows)), 0
            found = [np.zeros((0, 2), dtype=np.uint64)]
            for low, high in _borders([ordered], table):
                x = ordered.between(low, high)
                starts, sizes = _buckets(x, table)
                budget -= float((sizes.astype(np.float64) * (sizes - 1)).sum() / 2)
                if budget < 0:
                    raise _TooDense
                for one, other in _compared(x, starts, sizes, self._distance):
                    found.append(table.own_pairs(one, other))
                    num_found += len(found[-1])
                    if num_found > most:
                        raise _TooDense
            return np.concatenate(found)

    def _near_of(self, kept: _Rows, rest: _Rows, table: "_Table") -> NDArray[np.uint64]:
        """Near pairs of a kept hash and one of the rest."""
        found = [np.zeros((0, 2), dtype=np.uint64)]
        with (
            _Sorted(kept.hashes, table, self.files) as these,
            _Sorted(rest.hashes, table, self.files) as those,
        ):
            for low, high in _borders([these, those], table):
                x, y = these.between(low, high), those.between(low, high)
                for one, other in _matched(x, y, table, self._distance):
                    found.append(table.own_pairs(one, other))
        return np.concatenate(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Blocks:
    """The 64 bits, cut in blocks of about equal width."""

    distance: int
    lows: tuple[int, ...]
    """Of each block its lowest bit, descending."""
    widths: tuple[int, ...]
    bits: float
    """That the hashes of a bucket agree on."""

    @classmethod
    def choose(cls, num_hashes: int, distance: int) -> "_Blocks":
        """The number of blocks that costs the least time for hashes that are spread evenly."""
        best: tuple[float, int] = (math.inf, 0)
        for num_blocks in range(distance + 1, _MOST_BLOCKS + 1):
            num_tables = math.comb(num_blocks, distance)
            if num_tables <= _MOST_TABLES:
                bits = 64 * (num_blocks - distance) / num_blocks
                cost = num_tables * (_SORT_NS + _COMPARE_NS * num_hashes / 2**bits)
                best = min(best, (cost, num_blocks))
        num_blocks = best[1]
        edges = [round(64 * n / num_blocks) for n in range(num_blocks + 1)]
        return cls(
            distance=distance,
            lows=tuple(64 - edge for edge in edges[1:]),
            widths=tuple(b - a for a, b in pairwise(edges)),
            bits=64 * (num_blocks - distance) / num_blocks,
        )

    def tables(self) -> "Iterator[_Table]":
        """One for each choice of blocks to agree on."""
        num_blocks = len(self.lows)
        chosen = list(combinations(range(num_blocks), num_blocks - self.distance))
        # By the set of blocks that a pair agrees on: the one table that reports the pair.
        owner = np.full(1 << num_blocks, len(chosen), dtype=np.int16)
        sets = np.arange(1 << num_blocks)
        for number in reversed(range(len(chosen))):
            needed = sum(1 << block for block in chosen[number])
            owner[(sets & needed) == needed] = number
        for number, blocks in enumerate(chosen):
            yield _Table(self, number, blocks, owner)


class _Table:
    """One order of the blocks: those of the key in front."""

    def __init__(
        self, blocks: _Blocks, number: int, key: Sequence[int], owner: NDArray[np.int16]
    ) -> None:
        self.bucket_frac: float = 2.0**-blocks.bits
        self._blocks = blocks
        self._number = number
        self._owner = owner
        rest = [block for block in range(len(blocks.lows)) if block not in key]
        self.shift = np.uint64(64 - sum(blocks.widths[block] for block in key))
        """What remains of a hash without its key, in bits."""
        moves: list[tuple[int, int, int]] = []  # lowest bit here, there, width
        at = 64
        for block in [*key, *rest]:
            low, width = blocks.lows[block], blocks.widths[block]
            at -= width
            if moves and moves[-1][0] == low + width:
                moves[-1] = (low, at, moves[-1][2] + width)
            else:
                moves.append((low, at, width))
        self._moves = moves

    def forward(self, hashes: Words) -> Words:
        """The hashes with their bits in this table's order."""
        return _moved(hashes, self._moves)

    def back(self, hashes: Words) -> Words:
        return _moved(hashes, [(there, here, width) for here, there, width in self._moves])

    def own_pairs(self, one: Words, other: Words) -> NDArray[np.uint64]:
        """M x 2: the pairs that no earlier table has, with their bits in the usual order."""
        one, other = self.back(one), self.back(other)
        differ = one ^ other
        agreed = np.zeros(len(one), dtype=np.int64)
        for block, (low, width) in enumerate(
            zip(self._blocks.lows, self._blocks.widths, strict=True)
        ):
            is_equal = (differ >> np.uint64(low)) & np.uint64((1 << width) - 1) == 0
            agreed |= is_equal.astype(np.int64) << block
        own = self._owner[agreed] == self._number
        return np.stack([one[own], other[own]], axis=1)


def _moved(words: Words, moves: Sequence[tuple[int, int, int]]) -> Words:
    out = np.empty(len(words), dtype=np.uint64)
    for start in range(0, len(words), _CACHED):
        part = words[start : start + _CACHED]
        into = out[start : start + _CACHED]
        into[:] = 0
        for here, there, width in moves:
            bits = part >> np.uint64(here)
            bits &= np.uint64((1 << width) - 1)
            bits <<= np.uint64(there)
            into |= bits
    return out


def _budget(num_rows: int, table: _Table) -> float:
    """Pairs that a table may compare before the hashes count as dense."""
    if num_rows <= _FEW:
        return math.inf
    return num_rows * (32 + 4 * num_rows * table.bucket_frac)


def _most_pairs(num_rows: int) -> float:
    """Near pairs that are held at a time, for so many hashes."""
    return math.inf if num_rows <= _FEW else min(_MOST_PAIRS, max(1 << 21, num_rows // 4))


class _Sorted:
    """Hashes in a table's order, ascending; more than memory holds as sorted runs in a file."""

    def __init__(self, hashes: Words, table: _Table, files: "_Files") -> None:
        self._files = files
        self._kept: Words | None = None
        self.runs: list[Words] = []
        if len(hashes) > _ROWS:
            self._kept = files.array(len(hashes), np.uint64)
        for start in range(0, len(hashes), _ROWS):
            run = table.forward(hashes[start : start + _ROWS])
            run.sort()
            if self._kept is not None:
                self._kept[start : start + len(run)] = run
                run = self._kept[start : start + len(run)]
            self.runs.append(run)

    def __enter__(self) -> "_Sorted":
        return self

    def __exit__(self, *_: object) -> None:
        self.runs = []
        if self._kept is not None:
            self._files.remove(self._kept)

    def between(self, low: int, high: int | None) -> Words:
        """The ones from `low` to before `high`, ascending."""
        parts = []
        for run in self.runs:
            start = np.searchsorted(run, np.uint64(low))
            stop = len(run) if high is None else np.searchsorted(run, np.uint64(high))
            parts.append(run[start:stop])
        if len(parts) == 1:
            return parts[0]
        joined = np.concatenate(parts)
        joined.sort()
        return joined


def _borders(all_sorted: Sequence[_Sorted], table: _Table) -> list[tuple[int, int | None]]:
    """Ranges that each hold about _ROWS / 2 hashes; a bucket is in one of them."""
    runs = [run for one in all_sorted for run in one.runs]
    step = _ROWS // 64
    marks = np.sort(np.concatenate([run[::step] for run in runs]))
    inner = np.unique(marks[32::32] >> table.shift << table.shift).tolist() if runs else []
    edges = [0, *(edge for edge in inner if edge), None]
    return [(edges[n], edges[n + 1]) for n in range(len(edges) - 1)]


def _buckets(x: Words, table: _Table) -> tuple[Places, Places]:
    """Where each run of hashes with the same key starts, and how long it is."""
    if not len(x):
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    is_new = np.empty(len(x), dtype=bool)
    is_new[0] = True
    for start in range(1, len(x), _CACHED):
        stop = min(start + _CACHED, len(x))
        is_new[start:stop] = (x[start:stop] ^ x[start - 1 : stop - 1]) >> table.shift != 0
    starts = np.flatnonzero(is_new)
    return starts, np.diff(starts, append=len(x))


def _compared(
    x: Words, starts: Places, sizes: Places, distance: int
) -> Iterator[tuple[Words, Words]]:
    """Near pairs with the same key, and some others that are near."""
    is_big = sizes > _SMALL_BUCKET
    small = np.where(is_big, 1, sizes)
    differ, bits = np.empty(_CACHED, dtype=np.uint64), np.empty(_CACHED, dtype=np.uint8)
    for start in range(0, len(x), _CACHED):
        stop = min(start + _CACHED, len(x))
        low = np.searchsorted(starts, start, side="right") - 1
        high = np.searchsorted(starts, stop)
        found = []
        for gap in range(1, int(small[low:high].max())):
            size = min(stop, len(x) - gap) - start
            near, away = x[start : start + size], x[start + gap : start + gap + size]
            np.bitwise_xor(near, away, out=differ[:size])
            np.bitwise_count(differ[:size], out=bits[:size])
            hits = np.flatnonzero(bits[:size] <= distance)
            if len(hits):
                found.append((near[hits], away[hits]))
        if found:
            yield np.concatenate([a for a, _ in found]), np.concatenate([b for _, b in found])
    for start, size in zip(starts[is_big].tolist(), sizes[is_big].tolist(), strict=True):
        bucket = x[start : start + size]
        for row in range(0, size, _TILE_ROWS):
            ones = bucket[row : row + _TILE_ROWS]
            for column in range(row, size, _TILE_COLUMNS):
                others = bucket[column : column + _TILE_COLUMNS]
                tile = np.bitwise_count(ones[:, np.newaxis] ^ others[np.newaxis, :])
                i, j = np.nonzero(tile <= distance)
                is_pair = i + row < j + column
                if is_pair.any():
                    yield ones[i[is_pair]], others[j[is_pair]]


def _matched(x: Words, y: Words, table: _Table, distance: int) -> Iterator[tuple[Words, Words]]:
    """Near pairs with the same key, one of `x` and one of `y`."""
    keys = y >> table.shift
    wanted = x >> table.shift
    low = np.searchsorted(keys, wanted)
    counts = np.searchsorted(keys, wanted, side="right") - low
    ends = np.cumsum(counts)
    first = 0
    while first < len(x):
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, done + _EXPANDED, side="right")))
        many = counts[first:last]
        which = np.repeat(np.arange(first, last), many)
        begin = np.repeat(low[first:last] - (ends[first:last] - many - done), many)
        one, other = x[which], y[begin + np.arange(len(begin))]
        near = np.bitwise_count(one ^ other) <= distance
        if near.any():
            yield one[near], other[near]
        first = last


class _Files:
    """Arrays that lie in files, so that the system may take their memory back."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers = count()

    def array(self, length: int, dtype: type[Any]) -> NDArray[Any]:
        if not length:
            return np.zeros(0, dtype=dtype)
        return np.memmap(self._path(), dtype=dtype, mode="w+", shape=(length,))

    def numbers(self, length: int) -> NDArray[np.int64]:
        """0, 1, 2, ..."""
        found = self.array(length, np.int64)
        for start in range(0, length, _AT_ONCE):
            found[start : start + _AT_ONCE] = np.arange(start, min(start + _AT_ONCE, length))
        return found

    def remove(self, array: NDArray[Any]) -> None:
        assert isinstance(array, np.memmap), "what `array` made"
        Path(str(array.filename)).unlink()

    def subset(self, rows: _Rows, wanted: Callable[[_Rows], NDArray[np.bool_]]) -> _Rows:
        """The rows that are wanted, in the same order."""
        paths = [self._path() for _ in range(3)]
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("wb")) for path in paths]
            for start in range(0, len(rows), _AT_ONCE):
                stop = min(start + _AT_ONCE, len(rows))
                part = _Rows(
                    rows.hashes[start:stop],
                    rows.ranks[start:stop],
                    rows.places[start:stop],
                )
                chosen = wanted(part)
                for file, column in zip(files, (part.hashes, part.ranks, part.places), strict=True):
                    column[chosen].tofile(file)
        if not paths[0].stat().st_size:
            return _Rows(np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.int64))
        return _Rows(
            np.memmap(paths[0], dtype=np.uint64, mode="r"),
            np.memmap(paths[1], dtype=np.uint64, mode="r"),
            np.memmap(paths[2], dtype=np.int64, mode="r"),
        )

    def _path(self) -> Path:
        return self._folder / f"array-{next(self._numbers)}"
