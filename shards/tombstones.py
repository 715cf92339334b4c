"""Samples that are no longer served: which, and why. No tar is rewritten for it.

A part, tombstones/v000002-00000-1a2b3c4d.parquet, lists every dead position of up to a thousand
shards; the manifest says which part a shard's are in. Parts never change: a later version writes
its own, with the earlier positions too, for the shards it touches. The suffix is the part's
content, so that of two commands that make the same version none overwrites the other's.
"""

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from shards.index import parquet_table
from shards.objects import Bytes
from shards.store import Store

FOLDER = "tombstones"
SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("position", pa.int32()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
"""shard: path of its tar, as in the manifest. position: in the shard as it was packed."""
DEAD = SCHEMA.set(0, pa.field("shard", pa.int32()))
"""What is to be buried: shard is the shard's number."""
SHARDS_PER_PART = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class MergedPart:
    """A part that was written, and what it says of its shards."""

    part: str
    """Its path."""
    shards: list[int]
    num_dead: list[int]
    """Dead positions of each of the shards."""
    added: dict[str, int]
    """How many more there are now of each reason; fewer where a take-down took a sample over."""


class DeadReason(StrEnum):
    """Why a packed sample is no longer served."""

    DUPLICATE = "duplicate"
    """The same bytes as a sample that is kept."""
    NEAR_DUPLICATE = "near_duplicate"
    """Nearly the same picture as a sample that is kept, by `dedup`."""
    SUPERSEDED = "superseded"
    """Its object has changed, and was packed again by a later generation."""
    TAKEDOWN = "takedown"
    """A person asked for it."""


def read_part(data: Bytes) -> dict[str, NDArray[np.int64]]:
    """Dead positions by shard name, ascending."""
    table = parquet_table(data, columns=["shard", "position"])
    names = table.column("shard").combine_chunks().dictionary_encode()
    positions = table.column("position").to_numpy().astype(np.int64)
    ends = np.append(np.flatnonzero(np.diff(names.indices.to_numpy())) + 1, len(table))
    starts = np.concatenate([[0], ends[:-1]])
    return {
        names[int(start)].as_py(): positions[start:end]
        for start, end in zip(starts, ends, strict=True)
        if end > start
    }


def merge_parts(
    store: Store,
    names: Sequence[str],
    parts: Sequence[str | None],
    dead: Iterable[pa.Table],
    *,
    version: int,
) -> Iterator[MergedPart]:
    """Write new parts for the shards where `dead` changes anything, and say what is in each.

    Args:
        names: of all shards.
        parts: the part that each shard's tombstones are in today.
        dead: tables with the schema DEAD, rows in any order; all rows of a shard are in one table.
            A position that is dead already keeps its first reason, but a take-down replaces any
            other: it alone has bytes erased whatever their share.
        version: of the manifest that will name the new parts.
    """
    number, seen = 0, -1
    for table in dead:
        rows = table.select(DEAD.names).cast(DEAD).sort_by("shard")
        numbers = rows.column("shard").to_numpy()
        touched = np.unique(numbers)
        for first in range(0, len(touched), SHARDS_PER_PART):
            shards = touched[first : first + SHARDS_PER_PART]
            assert shards[0] > seen, "the tables follow the order of the shards"
            seen = int(shards[-1])
            low, high = np.searchsorted(numbers, [shards[0], seen + 1])
            where = {names[n]: parts[n] for n in shards.tolist()}
            known = _rows_of(store, dict(zip(where, shards.tolist(), strict=True)), where)
            merged = _one_of_each(pa.concat_tables([known, rows.slice(low, high - low)]))
            changed = _changed(merged, known)
            if not len(changed):
                continue
            merged, known = (_only(one, changed) for one in (merged, known))
            of_row = np.searchsorted(changed, merged.column("shard").to_numpy())
            named = pa.array([names[n] for n in changed.tolist()], pa.string()).take(
                pa.array(of_row)
            )
            data = _parquet(merged.set_column(0, "shard", named).cast(SCHEMA))
            path = (
                f"{FOLDER}/v{version:06}-{number:05}-{xxhash.xxh3_64_hexdigest(data)[:8]}.parquet"
            )
            store.put(path, data)
            number += 1
            added = _reasons(merged)
            added.subtract(_reasons(known))
            yield MergedPart(
                part=path,
                shards=changed.tolist(),
                num_dead=np.bincount(of_row, minlength=len(changed)).tolist(),
                added={reason: count for reason, count in added.items() if count},
            )


def dead_rows(store: Store, names: Sequence[str], parts: Sequence[str | None]) -> pa.Table:
    """What is dead in some shards, with the schema DEAD; shard counts along `names`.

    Args:
        names: of the shards; at most a few thousand, since it is all held in memory.
        parts: the part that each one's tombstones are in.
    """
    shards = {name: number for number, name in enumerate(names)}
    return _rows_of(store, shards, dict(zip(names, parts, strict=True)))


def _rows_of(store: Store, shards: dict[str, int], parts: dict[str, str | None]) -> pa.Table:
    """What is dead in these shards already, by number; sorted by shard and position."""
    tables = [DEAD.empty_table()]
    for path in sorted({part for part in parts.values() if part is not None}):
        table = parquet_table(store.read(path))
        # An older part goes on listing what it did of a shard that has moved to a newer one.
        mine = pa.array([name for name in shards if parts[name] == path], pa.string())
        rows = table.filter(pc.is_in(table.column("shard"), mine))
        which = pc.index_in(rows.column("shard"), mine)
        numbers = pa.array([shards[name] for name in mine.to_pylist()], pa.int32()).take(which)
        tables.append(rows.set_column(0, DEAD.field("shard"), numbers))
    return pa.concat_tables(tables).sort_by([("shard", "ascending"), ("position", "ascending")])


def _one_of_each(rows: pa.Table) -> pa.Table:
    """Sorted by shard and position; of equal ones a take-down, else the first."""
    shard, position = rows.column("shard").to_numpy(), rows.column("position").to_numpy()
    is_weak = pc.not_equal(rows.column("reason"), DeadReason.TAKEDOWN.value).to_numpy()
    order = np.lexsort((is_weak, position, shard))
    shard, position = shard[order], position[order]
    is_new = np.append(True, (np.diff(shard) != 0) | (np.diff(position) != 0))[: len(rows)]
    return rows.take(pa.array(order[is_new]))


def _changed(merged: pa.Table, known: pa.Table) -> NDArray[np.int32]:
    """Shards with a position more, or another reason, than before."""
    before = known.append_column("was", pa.repeat(True, len(known)))
    joined = merged.join(before, keys=["shard", "position", "reason"], use_threads=False)
    new = joined.filter(pc.is_null(joined.column("was"))).column("shard")
    return np.unique(new.to_numpy())


def _only(rows: pa.Table, shards: NDArray[np.int32]) -> pa.Table:
    return rows.filter(pc.is_in(rows.column("shard"), pa.array(shards, pa.int32())))


def _reasons(rows: pa.Table) -> Counter[str]:
    counts = pc.value_counts(rows.column("reason")).to_pylist()
    return Counter({count["values"]: count["counts"] for count in counts})


def _parquet(table: pa.Table) -> bytes:
    written = io.BytesIO()
    pq.write_table(table, written, compression="zstd")
    return written.getvalue()
