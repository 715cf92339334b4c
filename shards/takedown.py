"""Objects that must not be served any more, by their URIs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shards.compact import erased_rows
from shards.errors import SourceError
from shards.manifest import ShardSet
from shards.objects import shown
from shards.tombstones import DEAD, DeadReason, dead_rows

_SHARDS_AT_ONCE = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Absent:
    """A URI that was asked for and had been left out before."""

    uri: str
    reason: str
    detail: str
    """Names, for a duplicate, the object that was kept in its place: that one is served on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TakedownReport:
    """What became of each URI that was asked for."""

    url: str
    version: int
    asked: int
    """Different URIs."""
    buried: int
    """Samples that were served until now."""
    marked: int
    """Samples that were tombstoned for another reason, whose bytes will now be erased too."""
    absent: tuple[Absent, ...]
    """URIs that were not served before, with the reason: were they duplicates, the others are."""
    not_found: tuple[str, ...]
    """URIs that this set does not know."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value, in the order to show them."""
        yield "shard set", f"{shown(self.url)}, version {self.version}"
        yield "asked for", f"{self.asked:,}"
        yield "taken down", f"{self.buried:,}"
        yield "not served before", f"{len(self.absent):,}"
        for one in self.absent:
            yield "", f"{shown(one.uri)}: {one.reason}, {shown(one.detail)}"
        yield "not found", f"{len(self.not_found):,}"
        for uri in self.not_found:
            yield "", shown(uri)
        if self.buried or self.marked:
            yield "to do", "their bytes are still in the tars; 'moco-scale compact' erases them"


def takedown(url: str, uris: Iterable[str]) -> TakedownReport:
    """Tombstone every sample that was made from one of these objects, in whichever generation.

    Args:
        uris: as the index has them: scheme, bucket and key, not percent-encoded, behind a tar's
            address "#" and the member's name.

    Raises:
        PlanError: another command changed the set meanwhile; nothing was buried.
    """
    shard_set = ShardSet.open(url)
    asked = pa.array(sorted(set(uris)), pa.string())
    rows = rows_of_objects(shard_set, asked, reason=DeadReason.TAKEDOWN)
    buried, marked, absent = _sorted_out(shard_set, rows)
    after = shard_set.bury(rows.select(DEAD.names))
    absent += _left_out(shard_set, asked)
    seen = {*rows.column("detail").to_pylist(), *(one.uri for one in absent)}
    return TakedownReport(
        url=after.url,
        version=after.version,
        asked=len(asked),
        buried=buried,
        marked=marked,
        absent=tuple(absent),
        not_found=tuple(uri for uri in asked.to_pylist() if uri not in seen),
    )


def read_uris(path: Path) -> list[str]:
    """A list file: one URI a line, empty lines left out.

    Raises:
        SourceError: it cannot be read, or names nothing.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as err:
        raise SourceError(f"{path}: not a readable list of URIs ({err})") from err
    uris = [line.removesuffix("\r") for line in lines if line.strip()]
    if not uris:
        raise SourceError(f"{path}: names no URI; give one a line")
    return uris


def rows_of_objects(
    shard_set: ShardSet, uris: pa.Array | pa.ChunkedArray, *, reason: DeadReason
) -> pa.Table:
    """The samples made from these objects, dead ones too, as rows to bury; detail is the uri."""
    tables = [DEAD.empty_table()]
    shards = enumerate(shard_set.tables(["uri"], with_dead=True))
    while some := list(islice(shards, _SHARDS_AT_ONCE // 16)):
        numbers = np.repeat([shard for shard, _ in some], [len(table) for _, table in some])
        joined = pa.concat_tables([table for _, table in some]).append_column(
            "shard", pa.array(numbers, pa.int32())
        )
        # One look-up table for many shards: there may be millions of URIs.
        rows = joined.filter(pc.is_in(joined.column("uri"), uris))
        first = shard_set.first_ordinal[rows.column("shard").to_numpy()]
        columns = [
            rows.column("shard"),
            pa.array(rows.column("sample_id").to_numpy() - first, pa.int32()),
            pa.array([reason.value] * len(rows), pa.string()),
            rows.column("uri"),
        ]
        tables.append(pa.table(columns, schema=DEAD))
    return pa.concat_tables(tables)


def _sorted_out(shard_set: ShardSet, rows: pa.Table) -> tuple[int, int, list[Absent]]:
    """How many of these samples are alive, how many dead for another reason; and the dead."""
    records = shard_set.records()
    alive = len(rows)
    marked = 0
    absent = []
    shards = rows.column("shard").unique().to_pylist()
    for first in range(0, len(shards), _SHARDS_AT_ONCE):
        some = shards[first : first + _SHARDS_AT_ONCE]
        known = dead_rows(
            shard_set.store,
            [records[shard].name for shard in some],
            [records[shard].tombstones for shard in some],
        )
        numbers = pa.array(some, pa.int32()).take(known.column("shard"))
        known = known.set_column(0, DEAD.field("shard"), numbers)
        both = rows.join(
            known, keys=["shard", "position"], join_type="inner", right_suffix="_before",
            use_threads=False,
        )  # fmt: skip
        for row in both.sort_by([("shard", "ascending"), ("position", "ascending")]).to_pylist():
            alive -= 1
            marked += row["reason_before"] != DeadReason.TAKEDOWN
            absent.append(
                Absent(uri=row["detail"], reason=row["reason_before"], detail=row["detail_before"])
            )
    return alive, marked, absent


def _left_out(shard_set: ShardSet, asked: pa.Array) -> list[Absent]:
    """Those of the URIs that were rejected when the set was packed, or erased since."""
    absent = []
    for table in chain([shard_set.rejections()], (rows for _, rows in erased_rows(shard_set))):
        found = table.filter(pc.is_in(table.column("uri"), asked))
        absent += [
            Absent(uri=row["uri"], reason=row["reason"], detail=row["detail"] or "")
            for row in found.select(["uri", "reason", "detail"]).to_pylist()
        ]
    return absent
