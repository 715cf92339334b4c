"""A shard set as its readers see it: which shards there are, and what is in them.

manifest.parquet is the newest version of the list of shards, or a little older: each version is
written under manifests/ first, where it never changes, and counts from then on. A running reader
stays with the one it opened.
"""

import contextlib
import io
import json
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from shards.backoff import DEADLINE_S
from shards.errors import (
    AccessError,
    AlreadyExistsError,
    FormatError,
    NotFoundError,
    PlanError,
    StoreError,
)
from shards.index import SCHEMA as INDEX_SCHEMA
from shards.index import ShardIndex, live_rows, parquet_table, read_index
from shards.objects import Bytes
from shards.store import Store, open_store
from shards.tombstones import merge_parts, read_part

MANIFEST = "manifest.parquet"
VERSIONS = "manifests"
REJECTIONS = "rejections"
SHARD_LIST = "shards.txt"
FORMAT_VERSION = "1"
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("index", pa.string()),
        ("generation", pa.int32()),
        ("slots", pa.int64()),
        ("samples", pa.int64()),
        ("live", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
        ("tombstones", pa.string()),
    ]
)
"""See `ShardRecord` for the meaning of each column."""
REJECTION_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
_CACHED_ROWS, _CACHED_PARTS = 2**23, 64  # a row of an index takes some 80 bytes
_READ_AHEAD = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One committed shard: a row of the manifest."""

    name: str
    """Path of the tar below the set's root."""
    index: str
    """Path of its index."""
    generation: int
    """Which packing made it: 0 is the first, each `pack --add` is another."""
    slots: int
    """Sample ids that belong to it: its samples when it was packed."""
    samples: int
    """In the tar, and rows of the index."""
    live: int
    """Samples that are served: not tombstoned."""
    bytes: int
    sha256: str
    tombstones: str | None
    """Path of the part that lists its dead positions; None if it has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What is in a shard set, for people."""

    url: str
    set_id: str
    source: str
    version: int
    num_samples: int
    """Live ones."""
    num_shards: int
    total_bytes: int
    dead: dict[str, int]
    """Tombstoned samples that are still in a tar, by reason."""
    erased: dict[str, int]
    """Tombstoned samples that a compaction has erased, by reason."""
    formats: dict[str, int]
    actions: dict[str, int]
    rejected: dict[str, int]
    sides: tuple[int, int, int]
    """Shorter side in pixels: smallest, median, largest."""
    side_counts: dict[str, int]
    """Images by shorter side in pixels: "below 64", "64 to 127", ..., "2048 and more"."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value, in the order to show them."""
        yield "shard set", self.url
        yield "id", f"{self.set_id[:12]}, version {self.version}"
        yield "packed from", self.source
        yield "samples", f"{self.num_samples:,}"
        yield "shards", f"{self.num_shards:,}"
        yield "size", f"{self.total_bytes / 2**20:,.1f} MiB"
        yield "formats", _counts(self.formats)
        yield "stored as", _counts(self.actions)
        low, middle, high = self.sides
        yield "shorter side", f"{low} to {high} px, median {middle}"
        yield "by shorter side", _counts(self.side_counts, ordered=False)
        yield "rejected", _counts(self.rejected) or "nothing"
        if self.dead:
            yield "tombstoned", _counts(self.dead)
        if self.erased:
            yield "erased", _counts(self.erased)


class ShardSet:
    """Shards, their indexes and what was left out; opened from a URL, read lazily.

    Only live samples are served. A sample's id is the number of slots in all shards before its own,
    plus its position when it was packed; nothing that happens to the set later changes it.
    """

    def __init__(self, store: Store, shards: pa.Table) -> None:
        self.store = store
        self.url = store.url
        self.names: list[str] = shards.column("name").to_pylist()
        self.samples: NDArray[np.int64] = shards.column("live").to_numpy()
        """Live samples of each shard."""
        self.slots: NDArray[np.int64] = shards.column("slots").to_numpy()
        self.first_ordinal: NDArray[np.int64] = np.cumsum(self.slots) - self.slots
        self.num_samples = int(self.samples.sum())
        self.tar_bytes: NDArray[np.int64] = shards.column("bytes").to_numpy()
        self.total_bytes = int(self.tar_bytes.sum())
        raw: Mapping[bytes, bytes] = shards.schema.metadata or {}
        self.metadata = {k.decode(): v.decode() for k, v in raw.items() if k != b"ARROW:schema"}
        self.version = int(self.metadata["version"])
        self._table = shards
        self.deadline_s = DEADLINE_S
        """How long a request of it that fails in passing is tried again."""
        self._index_paths: list[str] = shards.column("index").to_pylist()
        self._tombstones: list[str | None] = shards.column("tombstones").to_pylist()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._parts: OrderedDict[str, dict[str, NDArray[np.int64]]] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, url: str, *, version: int | None = None, deadline_s: float = DEADLINE_S
    ) -> "ShardSet":
        """Read the manifest: the newest version, or an earlier one.

        Args:
            deadline_s: how long a request that fails in passing is tried again, now and later.

        Raises:
            FormatError: there is no shard set at the address, or it is of another format version.
        """
        return cls._within(open_store(url, deadline_s=deadline_s), version, deadline_s)

    def at(self, version: int | None) -> "ShardSet":
        """Another version of this set, or its newest, over the same connections.

        Raises:
            FormatError: there is no such version.
        """
        other = self._within(self.store, version, self.deadline_s)
        if other.metadata.get("tars") == self.metadata.get("tars"):
            other._elsewhere = self._elsewhere
        return other

    @classmethod
    def _within(cls, store: Store, version: int | None, deadline_s: float) -> "ShardSet":
        path = MANIFEST if version is None else version_path(version)
        try:
            shards = _read_manifest(store.read(path), where=store.uri(path))
            found = cls(store, shards if version is not None else _newest(store, shards))
            found.deadline_s = deadline_s
            return found
        except NotFoundError as err:
            if version is not None:
                raise FormatError(
                    f"{store.url} has no version {version}; open the newest one"
                ) from err
            todo = "run 'moco-scale pack SOURCE SHARD_SET' first (or again, if it was interrupted)"
            if _has_tars(store):
                todo = "to use tars that another tool wrote, run 'moco-scale index' on them first"
            raise FormatError(f"no shard set at {store.url}: it has no {MANIFEST}; {todo}") from err

    @classmethod
    def draft(
        cls,
        store: Store,
        records: Sequence[ShardRecord],
        metadata: Mapping[str, str],
        *,
        version: int,
    ) -> "ShardSet":
        """A set that nobody else can see yet: what `publish` makes version + 1 of."""
        return cls(store, _manifest(records, metadata, version=version))

    @cached_property
    def set_id(self) -> str:
        """Hex digest over the shards of the first generation: whatever is added or buried later.

        The same content has the same id wherever it lies, and after a compaction.
        """
        if "set_id" in self.metadata:
            return self.metadata["set_id"]
        digest = xxhash.xxh3_128()
        for record in self.records():
            if record.generation == 0:
                known: tuple[object, ...] = (record.name, record.slots)
                if "adopted" in self.metadata:  # the name of a packed tar says what is in it
                    known = (*known, record.sha256)
                digest.update(repr(known).encode())
        return digest.hexdigest()

    @cached_property
    def _elsewhere(self) -> Store | None:
        if "tars" not in self.metadata:
            return None
        return open_store(self.metadata["tars"], deadline_s=self.deadline_s)

    @property
    def tars(self) -> Store:
        """Where the tars are: another place only if they were adopted to stay there."""
        return self._elsewhere or self.store

    def records(self) -> list[ShardRecord]:
        """The rows of the manifest."""
        return [ShardRecord(**row) for row in self._table.select(SCHEMA.names).to_pylist()]

    def index(self, shard: int) -> ShardIndex:
        """A shard's index, live samples only; the last few million rows are kept."""
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        where = self.store.uri(self._index_paths[shard])
        found = read_index(self._index_bytes(shard), where=where, dead=self.dead(shard))
        if len(found.offset) != self.samples[shard]:
            raise FormatError(
                f"{where}: {len(found.offset)} live rows, but the manifest says "
                f"{self.samples[shard]}; run 'moco-scale verify'"
            )
        with self._lock:
            self._indexes[shard] = found
            rows = sum(len(index.offset) for index in self._indexes.values())
            while rows > _CACHED_ROWS and len(self._indexes) > 1:
                rows -= len(self._indexes.popitem(last=False)[1].offset)
        return found

    def _index_bytes(self, shard: int) -> Bytes:
        path = self._index_paths[shard]
        try:
            return self.store.read(path)
        except NotFoundError as err:
            raise FormatError(
                f"{self.store.uri(path)}: gone; a compaction may have erased it: open the set's "
                "newest version"
            ) from err

    def dead(self, shard: int) -> NDArray[np.int64]:
        """Positions of a shard's tombstoned samples, ascending."""
        path = self._tombstones[shard]
        if path is None:
            return np.zeros(0, dtype=np.int64)
        with self._lock:
            part = self._parts.get(path)
        if part is None:
            part = read_part(self.store.read(path))
            with self._lock:
                self._parts[path] = part
                while len(self._parts) > _CACHED_PARTS:
                    self._parts.popitem(last=False)
        return part[self.names[shard]]

    def tables(
        self,
        columns: Sequence[str] | None = None,
        *,
        shards: Sequence[int] | None = None,
        with_dead: bool = False,
    ) -> Iterator[pa.Table]:
        """The live rows of each index, in order, with the column sample_id; some are read ahead.

        Args:
            columns: of the index; None for those of the format. The user's own are left out where a
                shard has them not.
            shards: numbers of the shards wanted; None for all.
            with_dead: also the rows of samples that are tombstoned and not erased yet.
        """
        wanted = list(columns) if columns is not None else INDEX_SCHEMA.names

        def read(shard: int) -> pa.Table:
            rows = live_rows(
                self._index_bytes(shard),
                where=self.store.uri(self._index_paths[shard]),
                columns=wanted,
                dead=None if with_dead else self.dead(shard),
            )
            ids = rows.column("position").to_numpy() + self.first_ordinal[shard]
            return rows.drop_columns("position").append_column("sample_id", pa.array(ids))

        with ThreadPoolExecutor(_READ_AHEAD) as pool:
            rest = iter(shards if shards is not None else range(len(self.names)))
            ahead = [pool.submit(read, shard) for shard in islice(rest, 2 * _READ_AHEAD)]
            while ahead:
                yield ahead.pop(0).result()
                ahead += [pool.submit(read, shard) for shard in islice(rest, 1)]

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All live rows of all indexes in the order of their sample_id. Held in memory."""
        return pa.concat_tables(self.tables(columns), promote_options="default")

    @cached_property
    def generations(self) -> list[dict[str, Any]]:
        """Of each packing: generation, sources, listed, packed, already, rejected by reason."""
        found: list[dict[str, Any]] = json.loads(self.metadata["generations"])
        return found

    def rejections(self, generation: int | None = None) -> pa.Table:
        """uri, size in bytes, etag, reason and detail of what a packing left out; None: of all."""
        numbers = [entry["generation"] for entry in self.generations]
        wanted = numbers if generation is None else [generation]
        parts = [REJECTION_SCHEMA.empty_table()]
        for number in wanted:
            with contextlib.suppress(NotFoundError):  # adopted sets may have none
                parts.append(parquet_table(self.store.read(rejections_path(number))))
        return pa.concat_tables(parts)

    def describe(self) -> Description:
        """Counts and sizes for people; reads every index."""
        formats: Counter[str] = Counter()
        actions: Counter[str] = Counter()
        of_each = [np.zeros(0, dtype=np.int32)]
        for table in self.tables(columns=["format", "action", "width", "height"]):
            formats.update(table.column("format").to_pylist())
            actions.update(table.column("action").to_pylist())
            of_each.append(
                np.minimum(table.column("width").to_numpy(), table.column("height").to_numpy())
            )
        sides = np.concatenate(of_each)
        known = sides if len(sides) else np.zeros(1, dtype=np.int32)
        return Description(
            url=self.url,
            set_id=self.set_id,
            source=", ".join(json.loads(self.metadata["sources"])) or "not known",
            version=self.version,
            num_samples=self.num_samples,
            num_shards=len(self.names),
            total_bytes=self.total_bytes,
            dead=json.loads(self.metadata["dead"]),
            erased=json.loads(self.metadata.get("erased", "{}")),
            formats=dict(formats),
            actions=dict(actions),
            rejected=json.loads(self.metadata["rejected"]),
            sides=(int(known.min()), int(np.median(known)), int(known.max())),
            side_counts=_by_side(sides),
        )

    def renew(self) -> None:
        """Write what a run that was killed left old: shards.txt and manifest.parquet."""
        found = _read_manifest(self.store.read(MANIFEST), where=self.store.uri(MANIFEST))
        if _version(found) < self.version:
            _show_newest(self.store, self._table)

    def bury(self, dead: pa.Table | Iterable[pa.Table]) -> "ShardSet":
        """Tombstone samples, in a new version of the set; return it.

        Args:
            dead: shard int32 (number), position int32 (see `ShardIndex`), reason (`DeadReason`),
                detail; more than memory holds as tables in the order of the shards, each shard in
                one. What is dead already stays as it is, except that a take-down replaces another
                reason; nothing new makes no new version.

        Raises:
            PlanError: another command made a version meanwhile; nothing was buried.
        """
        return self._next(dead, always=False)

    def publish(self, dead: pa.Table | Iterable[pa.Table]) -> "ShardSet":
        """Make this draft, with its first dead samples, the next version; see `bury`."""
        return self._next(dead, always=True)

    def _next(self, dead: pa.Table | Iterable[pa.Table], *, always: bool) -> "ShardSet":
        records, reasons = self.records(), Counter(json.loads(self.metadata["dead"]))
        version = self.version + 1
        tables = [dead] if isinstance(dead, pa.Table) else dead
        is_same = True
        for merged in merge_parts(
            self.store, self.names, self._tombstones, tables, version=version
        ):
            is_same = False
            reasons.update(merged.added)
            for shard, num_dead in zip(merged.shards, merged.num_dead, strict=True):
                one = records[shard]
                assert num_dead <= one.samples, "a position that the shard has not"
                live = one.samples - num_dead
                records[shard] = replace(one, live=live, tombstones=merged.part)
        if is_same and not always:
            return self
        counts = {reason: count for reason, count in sorted(reasons.items()) if count}
        publish(self.store, records, self.metadata | {"dead": json.dumps(counts)}, version=version)
        return self.at(None)


def _has_tars(store: Store) -> bool:
    """Whether tars lie at this level and nothing of a packing does."""
    try:
        names = [
            path for page in store.list(delimiter=True) for path in page.column("path").to_pylist()
        ]
    except StoreError:
        return False  # it is for the message only
    return any(name.endswith(".tar") for name in names) and not any(
        name.endswith("/") for name in names
    )


def publish(
    store: Store, records: Sequence[ShardRecord], metadata: Mapping[str, str], *, version: int
) -> None:
    """Make a version of a set visible: the last writes of a command that makes or changes one.

    Args:
        metadata: see shards/README.md; version and format_version are added here.
        version: one more than the version that the records were made from.

    Raises:
        PlanError: another command published this version first, with other content.
    """
    written = io.BytesIO()
    pq.write_table(_manifest(records, metadata, version=version), written, compression="zstd")
    data: Bytes = written.getvalue()
    is_ours = True
    try:
        store.put(version_path(version), data, create_only=True)
    except AlreadyExistsError:
        found = store.read(version_path(version))
        # Equal: by a retry, or by a run that was killed right here.
        is_ours, data = bytes(found) == data, found
    # Whoever made it: it is whole, and everything that it names was written before. But it may be
    # old by now, and the newest version is not to be hidden by it.
    shards = _read_manifest(data, where=store.uri(version_path(version)))
    _show_newest(store, _newest(store, shards))
    if not is_ours:
        raise PlanError(
            f"{store.url}: another command made version {version} meanwhile; "
            "run this command again to go on from there"
        )


def _show_newest(store: Store, newest: pa.Table) -> None:
    names = newest.column("name").to_pylist()
    store.put(SHARD_LIST, "".join(f"{name}\n" for name in names).encode())
    store.put(MANIFEST, store.read(version_path(_version(newest))))


def _newest(store: Store, shards: pa.Table) -> pa.Table:
    """The last version behind this one: a run that was killed may have left manifest.parquet old,
    and one that was slow may have written it after a faster one did.
    """
    while True:
        path = version_path(_version(shards) + 1)
        try:
            shards = _read_manifest(store.read(path), where=store.uri(path))
        except (NotFoundError, AccessError):  # without the right to list, S3 says 403 for a 404
            return shards


def _version(shards: pa.Table) -> int:
    return int(shards.schema.metadata[b"version"])


def version_path(version: int) -> str:
    """Where a set keeps one version of its manifest."""
    return f"{VERSIONS}/v{version:06}.parquet"


def rejections_path(generation: int) -> str:
    """Where a set keeps what one generation left out."""
    return f"{REJECTIONS}/g{generation:04}.parquet"


def _manifest(
    records: Sequence[ShardRecord], metadata: Mapping[str, str], *, version: int
) -> pa.Table:
    columns = {name: [getattr(record, name) for record in records] for name in SCHEMA.names}
    known = {**metadata, "format_version": FORMAT_VERSION, "version": str(version)}
    return pa.table(columns, schema=SCHEMA).replace_schema_metadata(known)


def _read_manifest(data: Bytes, *, where: str) -> pa.Table:
    try:
        shards = parquet_table(data)
        version = (shards.schema.metadata or {})[b"format_version"].decode()
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{where}: format version {version}, not {FORMAT_VERSION}; "
                "use the version of this program that packed it, or pack again"
            )
        return shards.select(SCHEMA.names)
    except (pa.ArrowException, OSError, KeyError) as err:
        raise FormatError(f"{where}: not a readable manifest; pack again") from err


def _counts(counts: Mapping[str, int], *, ordered: bool = True) -> str:
    """As "name count, ...", largest first if ordered."""
    found = (
        sorted(counts.items(), key=lambda item: (-item[1], item[0])) if ordered else counts.items()
    )
    return ", ".join(f"{name} {count:,}" for name, count in found)


def _by_side(sides: NDArray[np.int32]) -> dict[str, int]:
    steps = [0, 64, 128, 256, 512, 1024, 2048]
    names = ["below 64", *(f"{a} to {b - 1}" for a, b in pairwise(steps[1:])), "2048 and more"]
    counts = np.bincount(np.searchsorted(steps, sides, side="right") - 1, minlength=len(steps))
    return {name: int(n) for name, n in zip(names, counts, strict=True) if n}
