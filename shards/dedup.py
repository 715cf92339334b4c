"""Samples that a set has more than once: the same bytes, or nearly the same picture.

What is found becomes tombstones; no tar is rewritten. Nothing here needs memory for every sample:
rows go to files in a scratch folder, parted by their hash, and each part is looked at alone.
"""

import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from heapq import nlargest
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from shards.errors import ShardError
from shards.hamming import KEPT, keep_first
from shards.manifest import ShardSet
from shards.objects import shown
from shards.tombstones import DEAD, SHARDS_PER_PART, DeadReason

MOST_DISTANCE = 16
_CONTENT = np.dtype([("low", "<u8"), ("high", "<u8"), ("size", "<i8"), ("id", "<i8")])
_HASH = np.dtype([("hash", "<u8"), ("rank", "<u8")])
_PAIR = np.dtype([("dead", "<i8"), ("kept", "<i8"), ("bits", "u1")])
_ROWS_PER_PART = 1 << 21
_MOST_PARTS = 256  # files that are open at once
_AT_ONCE = 1 << 20
_MOST_THREADS = 8  # of those that compare, 0.4 GB each
# A rank holds the pixels above the sample id, in 28 and 36 bits. Pillow opens nothing that large.
_ID_BITS, _MOST_PIXELS = 36, (1 << 28) - 1
_SHOWN_GROUPS, _SHOWN_MEMBERS = 10, 5
Rows = NDArray[Any]
_NONE = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupProgress:
    """How far a deduplication is."""

    stage: str
    done: int
    total: int
    """Of the stage, in a unit of its own; may grow."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NearGroup:
    """An image that is kept, and those that are left out for it."""

    kept: str
    size: int
    """Images, with the one that is kept."""
    dead: tuple[tuple[str, int], ...]
    """uri and distance of the first few of them, by sample id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupReport:
    """What a search for near-duplicates came to."""

    url: str
    version: int
    """Of the set; the one before if nothing was buried."""
    distance: int
    dry_run: bool
    images: int
    """Live samples with a perceptual hash."""
    without_hash: int
    """Live samples without one; they took no part."""
    groups: int
    """Of two images or more."""
    buried: int
    """Samples tombstoned; on a dry run, those that would be."""
    group_sizes: dict[str, int]
    """Groups by their number of images: "2 or 3", "4 to 7", "8 to 15", ..."""
    largest: tuple[NearGroup, ...]
    seconds: float

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value, in the order to show them."""
        yield "shard set", f"{shown(self.url)}, version {self.version}"
        yield "images compared", f"{self.images:,}, at most {self.distance} of 64 bits apart"
        if self.without_hash:
            yield "without a hash", f"{self.without_hash:,}, left as they are"
        yield "groups", f"{self.groups:,}"
        yield "would be buried" if self.dry_run else "buried", f"{self.buried:,}"
        if self.groups:
            yield "groups by size", ", ".join(f"{k}: {n:,}" for k, n in self.group_sizes.items())
        for group in self.largest:
            yield f"{group.size:,} images", f"kept {shown(group.kept)}"
            for uri, bits in group.dead:
                yield "", f"{bits} bits away {shown(uri)}"


def bury_duplicates(shard_set: ShardSet, *, scratch: Path) -> ShardSet:
    """Tombstone every sample whose object has the bytes of another, with a lower sample id.

    Args:
        scratch: a folder for temporary files, 60 bytes a sample.

    Raises:
        PlanError: another command changed the set meanwhile.
    """
    return shard_set.bury(find_duplicates(shard_set, scratch=scratch))


def find_duplicates(
    shard_set: ShardSet, *, scratch: Path, without: NDArray[np.int64] = _NONE
) -> Iterator[pa.Table]:
    """Live samples whose object has the bytes of another, as tables for `ShardSet.bury`.

    The same bytes are the same content key and size; the lowest sample id of each is kept.
    """
    with tempfile.TemporaryDirectory(prefix="moco-scale-", dir=scratch) as folder:
        pairs = _same_content(shard_set, Path(folder), without)
        yield from _named(
            shard_set,
            _by_shards(shard_set, pairs, "kept", Path(folder)),
            Path(folder),
            reason=DeadReason.DUPLICATE,
            detail=lambda uris, _bits: pc.binary_join_element_wise("same bytes as ", uris, ""),
        )


def dedup(
    url: str,
    *,
    distance: int,
    dry_run: bool,
    scratch: Path,
    progress: Callable[[DedupProgress], None] | None = None,
) -> DedupReport:
    """Tombstone live samples whose picture is nearly that of one that is kept.

    Two are near if their perceptual hashes differ in at most `distance` of 64 bits. Images are
    taken by size, the one with most pixels first, of equal ones the lower sample id first; each is
    kept unless it is near one that is kept already, and its tombstone names the first such. So
    every image left out is near one that is kept (no chain joins pictures that are unlike), no two
    that are kept are near, and running it again finds nothing. All near pairs are found.

    Args:
        scratch: a folder for temporary files: some 150 bytes a sample.

    Raises:
        ShardError: a distance out of range, or a set without perceptual hashes.
        PlanError: another command changed the set meanwhile; nothing was buried.
    """
    if not 0 <= distance <= MOST_DISTANCE:
        raise ShardError(
            f"distance must be from 0 to {MOST_DISTANCE} bits, not {distance}: beyond that many of "
            "64, unlike pictures meet, and nearly all pairs would have to be compared"
        )
    started = time.monotonic()
    shard_set = ShardSet.open(url)
    with tempfile.TemporaryDirectory(prefix="moco-scale-", dir=scratch) as name:
        folder = Path(name)
        parts, images = _hash_parts(shard_set, folder, progress)
        if shard_set.num_samples and not images:
            raise ShardError(
                f"{url}: no sample has a perceptual hash; the set was packed before there were "
                "any, or adopted: pack it again to compare pictures"
            )
        pairs = _by_shards(
            shard_set,
            _near_pairs(parts, folder, distance=distance, progress=progress),
            "kept",
            folder,
        )
        groups = _Groups()
        for path in pairs:
            groups.add(np.fromfile(path, dtype=_PAIR))
        after = shard_set
        if not dry_run:
            after = shard_set.bury(
                _named(
                    shard_set,
                    pairs,
                    folder,
                    reason=DeadReason.NEAR_DUPLICATE,
                    detail=lambda uris, bits: pc.binary_join_element_wise(
                        bits.cast(pa.string()), uris, " bits from "
                    ),
                )
            )
        largest = groups.largest(shard_set)
    return DedupReport(
        url=after.url,
        version=after.version,
        distance=distance,
        dry_run=dry_run,
        images=images,
        without_hash=shard_set.num_samples - images,
        groups=groups.num_groups,
        buried=groups.num_dead,
        group_sizes=groups.histogram(),
        largest=largest,
        seconds=time.monotonic() - started,
    )


def _same_content(shard_set: ShardSet, folder: Path, without: NDArray[np.int64]) -> Iterator[Rows]:
    """Pairs with equal content key and size, a part of the content keys at a time."""
    num_parts = _num_parts(shard_set.num_samples)
    spread = _spread(
        _contents(shard_set, without),
        lambda rows: rows["low"] % np.uint64(num_parts),
        _files(folder, "content", num_parts),
    )
    for path in spread:
        rows = np.fromfile(path, dtype=_CONTENT)
        path.unlink()
        rows = rows[np.lexsort((rows["id"], rows["size"], rows["high"], rows["low"]))]
        same = np.zeros(len(rows), dtype=bool)
        same[1:] = True
        for name in ("low", "high", "size"):
            same[1:] &= rows[name][1:] == rows[name][:-1]
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))
        yield _pairs(rows["id"][same], rows["id"][first[same]], np.zeros(int(same.sum())))


def _contents(shard_set: ShardSet, without: NDArray[np.int64]) -> Iterator[Rows]:
    for table in shard_set.tables(["content", "source_size"]):
        counts = pc.is_valid(table.column("content")).to_numpy()
        counts &= ~np.isin(table.column("sample_id").to_numpy(), without)
        known = table.filter(pa.array(counts)).combine_chunks()
        if not len(known):
            continue
        rows = np.empty(len(known), dtype=_CONTENT)
        (keys,) = known.column("content").chunks
        words = np.frombuffer(keys.buffers()[1], dtype="<u8").reshape(-1, 2)[keys.offset :]
        rows["low"], rows["high"] = words[: len(keys)].T
        rows["size"] = known.column("source_size").fill_null(-1).to_numpy()
        rows["id"] = known.column("sample_id").to_numpy()
        yield rows


@dataclass(frozen=True, kw_only=True, slots=True)
class _HashPart:
    """The hashes in one range of values."""

    distinct: int
    """How many; their place is behind those of the parts before."""
    copies: Path
    """Hash and rank of each image whose hash another has, with a lower rank."""


def _hash_parts(
    shard_set: ShardSet, folder: Path, progress: Callable[[DedupProgress], None] | None
) -> tuple[list[_HashPart], int]:
    """Sort the hashes into files: distinct ones with their lowest rank, and the copies.

    Returns the parts, and the number of images.
    """
    num_parts = _num_parts(shard_set.num_samples)

    def part_of(rows: Rows) -> NDArray[np.int64]:
        # By value, so that the parts one behind another are in order.
        return ((rows["hash"] >> np.uint64(32)) * np.uint64(num_parts) >> np.uint64(32)).astype(
            np.int64
        )

    images = 0
    firsts = _files(folder, "hashes", num_parts)
    copies = _files(folder, "copies", num_parts)
    for rows in _batched(_hashes(shard_set, progress)):
        images += len(rows)
        first, more = _first_of_each_hash(rows)  # here too: a hash that half the set has is met
        _append(first, part_of(first), firsts)
        _append(more, part_of(more), copies)
    parts = []
    with (folder / "distinct").open("wb") as hashes, (folder / "ranks").open("wb") as ranks:
        for path, copies_path in zip(firsts, copies, strict=True):
            first, more = _first_of_each_hash(np.fromfile(path, dtype=_HASH))
            path.unlink()
            first["hash"].tofile(hashes)
            first["rank"].tofile(ranks)
            _append(more, np.zeros(len(more), dtype=np.int64), [copies_path])
            parts.append(_HashPart(distinct=len(first), copies=copies_path))
    return parts, images


def _hashes(
    shard_set: ShardSet, progress: Callable[[DedupProgress], None] | None
) -> Iterator[Rows]:
    for number, table in enumerate(shard_set.tables(["phash", "width", "height"])):
        known = table.filter(pc.is_valid(table.column("phash")))
        rows = np.empty(len(known), dtype=_HASH)
        rows["hash"] = known.column("phash").to_numpy()
        width, height = (known.column(name).to_numpy() for name in ("width", "height"))
        pixels = np.minimum(width.astype(np.int64) * height, _MOST_PIXELS)
        ids = known.column("sample_id").to_numpy()
        assert not len(ids) or ids[-1] < 1 << _ID_BITS, "the width of an id in a rank"
        rows["rank"] = (_MOST_PIXELS - pixels) << _ID_BITS | ids
        if progress is not None:
            progress(DedupProgress(stage="reading", done=number + 1, total=len(shard_set.names)))
        yield rows


def _first_of_each_hash(rows: Rows) -> tuple[Rows, Rows]:
    """By hash, the row with the lowest rank of each; and the others."""
    rows = rows[np.lexsort((rows["rank"], rows["hash"]))]
    is_first = np.ones(len(rows), dtype=bool)
    is_first[1:] = rows["hash"][1:] != rows["hash"][:-1]
    return rows[is_first], rows[~is_first]


def _near_pairs(
    parts: Sequence[_HashPart],
    folder: Path,
    *,
    distance: int,
    progress: Callable[[DedupProgress], None] | None,
) -> Iterator[Rows]:
    """Every image that is left out, with the one that is kept for it."""
    if not sum(part.distinct for part in parts):
        return
    hashes = np.memmap(folder / "distinct", dtype=np.uint64, mode="r")
    ranks = np.memmap(folder / "ranks", dtype=np.uint64, mode="r")

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(DedupProgress(stage="comparing", done=done, total=total))

    first, bits = keep_first(
        hashes,
        ranks,
        distance=distance,
        scratch=folder,
        threads=min(os.cpu_count() or 1, _MOST_THREADS),
        progress=tell,
    )
    start = 0
    for part in parts:
        stop = start + part.distinct
        for low in range(start, stop, _AT_ONCE):
            here = slice(low, min(low + _AT_ONCE, stop))
            is_dead = first[here] != KEPT
            yield _pairs(_id(ranks[here][is_dead]), _id(first[here][is_dead]), bits[here][is_dead])
        for copies in _read(part.copies, _HASH):
            # A copy comes after the first of its hash: it falls with it, or to it.
            at = start + np.searchsorted(hashes[start:stop], copies["hash"])
            is_kept = first[at] == KEPT
            yield _pairs(
                _id(copies["rank"]),
                _id(np.where(is_kept, ranks[at], first[at])),
                np.where(is_kept, 0, bits[at]),
            )
        start = stop


def _id(ranks: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (ranks & np.uint64((1 << _ID_BITS) - 1)).astype(np.int64)


def _pairs(dead: Rows, kept: Rows, bits: Rows) -> Rows:
    rows = np.empty(len(dead), dtype=_PAIR)
    rows["dead"], rows["kept"], rows["bits"] = dead, kept, bits
    return rows


class _Groups:
    """Counts of the groups, and which are the largest; a group's pairs come all at once."""

    def __init__(self) -> None:
        self.num_groups = self.num_dead = 0
        self._sizes: Counter[int] = Counter()
        self._largest: list[tuple[int, int, list[tuple[int, int]]]] = []

    def add(self, pairs: Rows) -> None:
        pairs = pairs[np.lexsort((pairs["dead"], pairs["kept"]))]
        kept, starts, counts = np.unique(pairs["kept"], return_index=True, return_counts=True)
        self.num_groups += len(kept)
        self.num_dead += len(pairs)
        self._sizes.update((counts + 1).tolist())
        for at in np.argsort(-counts, kind="stable")[:_SHOWN_GROUPS].tolist():
            few = pairs[starts[at] : starts[at] + min(int(counts[at]), _SHOWN_MEMBERS)]
            members = list(zip(few["dead"].tolist(), few["bits"].tolist(), strict=True))
            self._largest.append((int(counts[at]) + 1, -int(kept[at]), members))
        self._largest = nlargest(_SHOWN_GROUPS, self._largest)

    def histogram(self) -> dict[str, int]:
        """Groups by size, the classes doubling."""
        found: Counter[int] = Counter()
        for size, number in self._sizes.items():
            found[size.bit_length()] += number
        names = {2: "2 or 3"}
        return {names.get(b, f"{1 << b - 1} to {(1 << b) - 1}"): found[b] for b in sorted(found)}

    def largest(self, shard_set: ShardSet) -> tuple[NearGroup, ...]:
        """The largest groups with names, which are looked up here."""
        ids = {-kept for _, kept, _ in self._largest}
        ids |= {dead for _, _, members in self._largest for dead, _ in members}
        wanted = np.array(sorted(ids), dtype=np.int64)
        uris: dict[int, str] = {}
        for table in shard_set.tables(["uri"], shards=_shards_of(shard_set, wanted)):
            found = table.filter(pc.is_in(table.column("sample_id"), pa.array(wanted)))
            uris.update(zip(found["sample_id"].to_pylist(), found["uri"].to_pylist(), strict=True))
        return tuple(
            NearGroup(
                kept=uris[-kept],
                size=size,
                dead=tuple((uris[dead], bits) for dead, bits in members),
            )
            for size, kept, members in self._largest
        )


def _named(
    shard_set: ShardSet,
    by_kept: Sequence[Path],
    folder: Path,
    *,
    reason: DeadReason,
    detail: Callable[[pa.ChunkedArray, pa.ChunkedArray], pa.ChunkedArray],
) -> Iterator[pa.Table]:
    """Tombstones of pairs that lie in files by the shard of the kept one.

    The kept ones' names are looked up, each index being read once; with them the rows go to files
    by the shard of the dead one.

    Args:
        detail: from the uri of the kept one, and the bits between the two.
    """
    schema = pa.schema([("dead", pa.int64()), ("bits", pa.uint8()), ("uri", pa.string())])
    by_dead = _files(folder, "named", _num_groups(shard_set))
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(path), schema)) for path in by_dead]
        for path in by_kept:
            pairs = np.sort(np.fromfile(path, dtype=_PAIR), order=["dead"])
            if not len(pairs):
                continue
            kept = np.unique(pairs["kept"])
            tables = shard_set.tables(["uri"], shards=_shards_of(shard_set, kept))
            names = [
                table.column("uri").filter(pc.is_in(table.column("sample_id"), pa.array(kept)))
                for table in tables
            ]
            uris = pa.chunked_array([chunk for name in names for chunk in name.chunks])
            which = np.searchsorted(kept, pairs["kept"])
            rows = pa.table(
                [pa.array(pairs["dead"]), pa.array(pairs["bits"]), uris.take(pa.array(which))],
                schema=schema,
            )
            of_group = _shard_of(shard_set, pairs["dead"]) // SHARDS_PER_PART
            edges = np.searchsorted(of_group, np.arange(len(writers) + 1))
            for writer, (low, high) in zip(writers, pairwise(edges.tolist()), strict=True):
                if high > low:
                    writer.write_table(rows.slice(low, high - low))
    for path in by_dead:
        with pa.ipc.open_stream(str(path)) as reader:
            rows = reader.read_all()
        dead = rows.column("dead").to_numpy()
        shards = _shard_of(shard_set, dead)
        yield pa.table(
            [
                pa.array(shards, pa.int32()),
                pa.array(dead - shard_set.first_ordinal[shards], pa.int32()),
                pa.repeat(reason.value, len(rows)),
                detail(rows.column("uri"), rows.column("bits")),
            ],
            schema=DEAD,
        )


def _by_shards(shard_set: ShardSet, pairs: Iterable[Rows], column: str, folder: Path) -> list[Path]:
    """Pairs in files by the shard of one of the two, a thousand shards a file."""
    return _spread(
        pairs,
        lambda rows: _shard_of(shard_set, rows[column]) // SHARDS_PER_PART,
        _files(folder, "pairs", _num_groups(shard_set)),
    )


def _num_groups(shard_set: ShardSet) -> int:
    return -(-len(shard_set.names) // SHARDS_PER_PART)


def _shard_of(shard_set: ShardSet, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.searchsorted(shard_set.first_ordinal, ids, side="right") - 1


def _shards_of(shard_set: ShardSet, ids: NDArray[np.int64]) -> list[int]:
    """The shards that hold these samples, ascending."""
    return [int(shard) for shard in np.unique(_shard_of(shard_set, ids))]


def _num_parts(num_samples: int) -> int:
    return min(_MOST_PARTS, max(1, -(-num_samples // _ROWS_PER_PART)))


def _files(folder: Path, name: str, number: int) -> list[Path]:
    """New, empty files."""
    paths = [folder / f"{name}-{n:05}" for n in range(number)]
    for path in paths:
        path.touch(exist_ok=False)
    return paths


def _spread(
    rows: Iterable[Rows], part_of: Callable[[Rows], NDArray[Any]], paths: list[Path]
) -> list[Path]:
    """Write each row to the file that `part_of` says; return the files."""
    for batch in _batched(rows):
        _append(batch, part_of(batch), paths)
    return paths


def _batched(rows: Iterable[Rows]) -> Iterator[Rows]:
    """The same rows in larger arrays."""
    held: list[Rows] = []
    for some in rows:
        held.append(some)
        if sum(map(len, held)) >= _AT_ONCE:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def _append(rows: Rows, part: NDArray[Any], paths: Sequence[Path]) -> None:
    order = np.argsort(part, kind="stable")
    rows, part = rows[order], part[order]
    edges = np.searchsorted(part, np.arange(len(paths) + 1, dtype=part.dtype))
    for path, (low, high) in zip(paths, pairwise(edges.tolist()), strict=True):
        if high > low:
            with path.open("ab") as file:
                rows[low:high].tofile(file)


def _read(path: Path, dtype: np.dtype[Any]) -> Iterator[Rows]:
    """The rows of a file, some at a time."""
    with path.open("rb") as file:
        while len(rows := np.fromfile(file, dtype=dtype, count=_AT_ONCE)):
            yield rows
