"""Erases tombstoned samples for real: tars and indexes without them, in a new version of the set.

What a shard has erased is written beside it, under erased/: so that `pack --add` does not fetch it
again, and `takedown` can say what became of it. Sample ids stay: the index of a rewritten shard has
a column `position`.
"""

import hashlib
import io
import json
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.engine import LocalEngine
from shards.errors import FormatError, ShardError
from shards.index import POSITION, parquet_table, read_table, write_index
from shards.manifest import VERSIONS, ShardRecord, ShardSet, publish
from shards.objects import Bytes, shown
from shards.store import Store, open_store
from shards.tar import BLOCK
from shards.tombstones import DeadReason, dead_rows

ERASED = "erased"
ERASED_SCHEMA = pa.schema(
    [
        ("position", pa.int32()),
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("source_size", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""A row each sample of one shard that was erased, sorted by position (as it was packed)."""
_SHARDS_AT_ONCE = 1000
_READ_AHEAD = 16
_OWN_NAME = re.compile(r"(?:shards|index|erased)/(\d{6})-[0-9a-f]{8}\.(?:tar|parquet)")


@dataclass(frozen=True, kw_only=True, slots=True)
class CompactReport:
    """What a compaction came to."""

    url: str
    version: int
    shards: int
    """Shards that were rewritten."""
    erased: dict[str, int]
    """Samples erased, by reason."""
    erased_bytes: int
    """By which the tars are smaller."""
    still_dead: int
    """Tombstoned samples left in tars that have too few of them."""
    old_files: tuple[str, ...]
    """Tars, indexes and lists that no reader of the newest version needs."""
    old_bytes: int
    deleted: bool
    """Whether the old files were deleted; until they are, what was erased is still in them."""
    seconds: float

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value, in the order to show them."""
        yield "shard set", f"{shown(self.url)}, version {self.version}"
        yield "shards rewritten", f"{self.shards:,}"
        erased = ", ".join(f"{reason} {count:,}" for reason, count in self.erased.items())
        yield "erased", f"{erased or 'nothing'} ({self.erased_bytes / 2**20:,.1f} MiB)"
        if self.still_dead:
            yield "dead, not erased", f"{self.still_dead:,}, in shards with too few of them"
        old = f"{len(self.old_files):,} files, {self.old_bytes / 2**20:,.1f} MiB"
        if self.deleted:
            yield "old files deleted", old
        elif self.old_files:
            yield "old files", old
            for path in self.old_files:
                yield "", shown(path)
            yield (
                "to do",
                "they still hold what was erased; runs that opened an earlier version still read "
                "them. When there are none left, run it again with delete_old",
            )


def compact(
    url: str,
    *,
    min_dead_frac: float,
    workers: int,
    delete_old: bool,
    progress: Callable[[int, int], None] | None = None,
) -> CompactReport:
    """Rewrite the shards that have enough dead samples, or any that was taken down.

    Killed at any moment, it leaves a whole set, and goes on when it is run again. Run one at a
    time on a set. A worker holds one shard.

    Args:
        min_dead_frac: of a tar's samples, from which on it is rewritten: 0 for any, to 1.
        workers: processes; 0 for one a core.
        delete_old: delete what earlier versions of the set, or commands that were killed, have left
            of its shards. Whoever still reads an earlier version will fail.
        progress: told how many shards are done, of how many.

    Raises:
        FormatError: a tar or an index is not what the manifest says; nothing was changed.
        PlanError: another command changed the set meanwhile; nothing was erased.
    """
    if not 0 <= min_dead_frac <= 1:
        raise ShardError(f"min_dead_frac must be from 0 to 1, not {min_dead_frac}")
    started = time.monotonic()
    shard_set = ShardSet.open(url)
    records = shard_set.records()
    chosen = _chosen(shard_set, records, min_dead_frac)
    engine = LocalEngine(workers)
    run: Callable[[tuple[int, ShardRecord]], _Rewritten] = (
        partial(_rewrite_in_worker, url=shard_set.url)
        if engine.workers > 1
        else partial(_rewrite, store=shard_set.store)
    )
    erased: Counter[str] = Counter()
    erased_bytes = 0
    for done, new in enumerate(engine.map(run, [(shard, records[shard]) for shard in chosen])):
        erased_bytes += records[new.shard].bytes - new.record.bytes
        records[new.shard] = new.record
        erased.update(new.erased)
        if progress is not None:
            progress(done + 1, len(chosen))
    version = shard_set.version
    if chosen:
        version += 1
        publish(shard_set.store, records, _metadata(shard_set, erased), version=version)
    old, unnamed = _old_files(shard_set.store, records)
    if delete_old and unnamed:
        # Another compaction may be about to publish what it has written and nobody names yet.
        # It cannot once there is a version that it did not start from.
        version += 1
        metadata = ShardSet.open(url).metadata
        publish(shard_set.store, records, metadata, version=version)
    if delete_old:
        shard_set.store.delete(sorted(old))
    return CompactReport(
        url=shard_set.url,
        version=version,
        shards=len(chosen),
        erased=dict(sorted(erased.items())),
        erased_bytes=erased_bytes,
        still_dead=sum(record.samples - record.live for record in records),
        old_files=tuple(sorted(old)),
        old_bytes=sum(old.values()),
        deleted=delete_old,
        seconds=time.monotonic() - started,
    )


def erased_rows(
    shard_set: ShardSet, among: Sequence[int] | None = None
) -> Iterator[tuple[int, pa.Table]]:
    """Shards that have erased samples, with a table of ERASED_SCHEMA each; among these, or all."""
    records = shard_set.records()
    numbers = range(len(records)) if among is None else among
    shards = [n for n in numbers if records[n].samples < records[n].slots]

    def read(shard: int) -> pa.Table:
        return parquet_table(shard_set.store.read(_erased_path(records[shard].index)))

    with ThreadPoolExecutor(_READ_AHEAD) as pool:
        for first in range(0, len(shards), _SHARDS_AT_ONCE):
            some = shards[first : first + _SHARDS_AT_ONCE]
            yield from zip(some, pool.map(read, some), strict=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Rewritten:
    """A shard without its dead samples."""

    shard: int
    record: ShardRecord
    erased: dict[str, int]
    """Samples by reason."""


def _chosen(shard_set: ShardSet, records: Sequence[ShardRecord], min_dead_frac: float) -> list[int]:
    """Numbers of the shards to rewrite."""
    chosen = []
    for first in range(0, len(records), _SHARDS_AT_ONCE):
        some = records[first : first + _SHARDS_AT_ONCE]
        rows = dead_rows(
            shard_set.store, [one.name for one in some], [one.tombstones for one in some]
        )
        is_taken = pc.equal(rows.column("reason"), DeadReason.TAKEDOWN.value)
        taken = set(rows.filter(is_taken).column("shard").to_pylist())
        for shard, one in enumerate(some):
            num_dead = one.samples - one.live
            if num_dead and (shard in taken or num_dead >= min_dead_frac * one.samples):
                chosen.append(first + shard)
    return chosen


def _metadata(shard_set: ShardSet, erased: Counter[str]) -> dict[str, str]:
    dead = Counter(json.loads(shard_set.metadata["dead"]))
    dead.subtract(erased)
    all_erased = erased + Counter(json.loads(shard_set.metadata.get("erased", "{}")))
    return shard_set.metadata | {
        "dead": json.dumps({reason: n for reason, n in sorted(dead.items()) if n}),
        "erased": json.dumps(dict(sorted(all_erased.items()))),
        "set_id": shard_set.set_id,  # it was made of the names, which change here
    }


def _rewrite_in_worker(item: tuple[int, ShardRecord], *, url: str) -> _Rewritten:
    return _rewrite(item, store=_open_once(url))


@lru_cache(maxsize=1)
def _open_once(url: str) -> Store:
    return open_store(url)


def _rewrite(item: tuple[int, ShardRecord], *, store: Store) -> _Rewritten:
    """Write a shard's tar, index and list of what was erased; a repeat writes the same."""
    shard, record = item
    where = store.uri(record.name)
    tar = store.read(record.name)
    if record.sha256 and hashlib.sha256(tar).hexdigest() != record.sha256:
        raise FormatError(
            f"{where}: not the bytes that the manifest has; run 'moco-scale verify' and pack it "
            "again, before anything is erased"
        )
    index = _with_position(read_table(store.read(record.index), where=store.uri(record.index)))
    dead = dead_rows(store, [record.name], [record.tombstones])
    is_dead = np.isin(index.column(POSITION).to_numpy(), dead.column("position").to_numpy())
    offsets = index.column("offset").to_numpy()
    buffers, moved = _without(tar, dead=offsets[is_dead], live=offsets[~is_dead], where=where)
    live = index.filter(pa.array(~is_dead))
    if len(live) != record.live:
        raise FormatError(
            f"{where}: {len(live)} live samples, but the manifest says {record.live}; "
            "run 'moco-scale verify'"
        )
    live = live.set_column(0, index.schema.field("offset"), pa.array(moved))
    digest = hashlib.sha256()
    for buffer in buffers:
        digest.update(buffer)
    new = replace(
        record,
        name=_renamed(record.name, record, digest.hexdigest()),
        index=_renamed(record.index, record, digest.hexdigest()),
        samples=len(live),
        bytes=sum(len(buffer) for buffer in buffers),
        sha256=digest.hexdigest(),
        tombstones=None,
    )
    gone = index.filter(pa.array(is_dead)).select([POSITION, "uri", "etag", "source_size"])
    known = dead.select(["position", "reason", "detail"])
    gone = gone.join(known, keys=POSITION, use_threads=False).select(ERASED_SCHEMA.names)
    before = [ERASED_SCHEMA.empty_table()]
    if record.samples < record.slots:
        before.append(parquet_table(store.read(_erased_path(record.index))))
    erased = pa.concat_tables([*before, gone.cast(ERASED_SCHEMA)]).sort_by(POSITION)
    written = io.BytesIO()
    pq.write_table(erased, written, compression="zstd")
    store.put(_erased_path(new.index), written.getvalue())
    store.put(new.name, buffers)
    store.put(new.index, write_index(live))
    return _Rewritten(
        shard=shard, record=new, erased=dict(Counter(gone.column("reason").to_pylist()))
    )


def _with_position(index: pa.Table) -> pa.Table:
    if POSITION in index.column_names:
        return index
    return index.append_column(POSITION, pa.array(np.arange(len(index), dtype=np.int32)))


def _without(
    tar: Bytes, *, dead: NDArray[np.int64], live: NDArray[np.int64], where: str
) -> tuple[list[Bytes], NDArray[np.int64]]:
    """A tar without the members whose data is at `dead`, and without what else is of those samples.

    Returns the buffers that joined make it, and where the data at `live` starts in it.
    """
    members = _members(tar, where=where)
    starts = np.array([member.data for member in members], dtype=np.int64)
    if not np.isin(np.concatenate([dead, live]), starts).all():
        raise FormatError(f"{where}: its index points between its members; run 'moco-scale verify'")
    is_dead, is_live = np.isin(starts, dead), np.isin(starts, live)
    keys = {member.key for member, gone in zip(members, is_dead, strict=True) if gone}
    data = memoryview(tar)
    buffers: list[Bytes] = []
    moved = np.zeros(len(members), dtype=np.int64)
    begin = size = 0  # of the bytes that are kept, up to the last one that was dropped
    end = 0
    for number, member in enumerate(members):
        if is_dead[number] or (member.key in keys and not is_live[number]):
            if end > begin:
                buffers.append(data[begin:end])
                size += end - begin
            begin = member.end
        else:
            moved[number] = size + member.data - begin
        end = member.end
    if end > begin:
        buffers.append(data[begin:end])
    buffers.append(bytes(2 * BLOCK))
    order = np.argsort(starts)
    return buffers, moved[order[np.searchsorted(starts, live, sorter=order)]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _TarMember:
    data: int
    """First byte of its data."""
    end: int
    """First byte behind its padding: where the next one's headers start."""
    key: str
    """What the members of one sample share: the name up to the first dot of its last part."""


def _members(tar: Bytes, *, where: str) -> list[_TarMember]:
    try:
        with tarfile.open(fileobj=pa.BufferReader(tar), mode="r:") as file:
            found = [(info.name, info.offset_data, info.size) for info in file]
    except tarfile.TarError as err:
        raise FormatError(f"{where}: not a readable tar ({err})") from err
    members = []
    for name, start, size in found:
        folder, slash, last = name.rpartition("/")
        key = folder + slash + last.partition(".")[0]
        members.append(_TarMember(data=start, end=start + -(-size // BLOCK) * BLOCK, key=key))
    return members


def _renamed(path: str, record: ShardRecord, digest: str) -> str:
    """The path with the start of the new content's digest in place of the old one's."""
    stem, _, ending = path.rpartition(".")
    if record.sha256:
        stem = stem.removesuffix(f"-{record.sha256[:8]}")
    return f"{stem}-{digest[:8]}.{ending}"


def _erased_path(index: str) -> str:
    return f"{ERASED}/{index.removeprefix('index/')}"


def _old_files(store: Store, records: Sequence[ShardRecord]) -> tuple[dict[str, int], bool]:
    """Files of these shards that the records do not name, with their sizes.

    Returns them, and whether there are any that no version names: left by a command that was
    killed, or written by one that is running.
    """
    used = {path for record in records for path in _paths(record)}
    named: set[str] = set()
    for page in store.list(VERSIONS):
        for path in page.column("path").to_pylist():
            table = parquet_table(store.read(path), columns=["name", "index"])
            names, indexes = (table.column(c).to_pylist() for c in ("name", "index"))
            for name, index in zip(names, indexes, strict=True):
                named.update((name, index, _erased_path(index)))
    numbers = {match[1] for path in used if (match := _OWN_NAME.fullmatch(path))}
    old: dict[str, int] = {}
    unnamed = False
    for folder in sorted({path.rpartition("/")[0] for path in used | named}):
        for page in store.list(folder):
            paths, sizes = (page.column(c).to_pylist() for c in ("path", "size"))
            for path, size in zip(paths, sizes, strict=True):
                match = _OWN_NAME.fullmatch(path)
                is_left_over = match is not None and match[1] in numbers
                if path not in used and (path in named or is_left_over):
                    old[path] = size
                    unnamed |= path not in named
    return old, unnamed


def _paths(record: ShardRecord) -> tuple[str, str, str]:
    return record.name, record.index, _erased_path(record.index)
