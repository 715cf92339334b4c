"""A shard set as its readers see it: which shards there are, and what is in them."""

import io
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from shards.errors import FormatError, NotFoundError
from shards.index import SCHEMA as INDEX_SCHEMA
from shards.index import ShardIndex, parquet_table, read_index, read_table
from shards.store import Store, open_store

MANIFEST = "manifest.parquet"
REJECTIONS = "rejections.parquet"
SHARD_LIST = "shards.txt"
FORMAT_VERSION = "1"
SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("index", pa.string()),
        ("samples", pa.int64()),
        ("bytes", pa.int64()),
        ("sha256", pa.string()),
    ]
)
REJECTION_SCHEMA = pa.schema(
    [("uri", pa.string()), ("size", pa.int64()), ("reason", pa.string()), ("detail", pa.string())]
)
_CACHED_INDEXES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """One committed shard: a row of the manifest."""

    name: str
    """Path of the tar below the set's root."""
    index: str
    """Path of its index."""
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What is in a shard set, for people."""

    url: str
    set_id: str
    source: str
    num_samples: int
    num_shards: int
    total_bytes: int
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
        yield "id", self.set_id[:12]
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


class ShardSet:
    """Shards, their indexes and what was left out; opened from a URL, read lazily."""

    def __init__(self, store: Store, shards: pa.Table) -> None:
        self.store = store
        self.url = store.url
        self.names: list[str] = shards.column("name").to_pylist()
        self.samples: NDArray[np.int64] = shards.column("samples").to_numpy()
        self.first_ordinal: NDArray[np.int64] = np.cumsum(self.samples) - self.samples
        self.num_samples = int(self.samples.sum())
        self.total_bytes = int(shards.column("bytes").to_numpy().sum())
        self.version = 1
        raw: Mapping[bytes, bytes] = shards.schema.metadata or {}
        self.metadata = {k.decode(): v.decode() for k, v in raw.items() if k != b"ARROW:schema"}
        self._index_paths: list[str] = shards.column("index").to_pylist()
        self._sha256: list[str] = shards.column("sha256").to_pylist()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()
        self._lock = threading.Lock()

    @classmethod
    def open(cls, url: str) -> "ShardSet":
        """Read the manifest.

        Raises:
            FormatError: there is no shard set at the address, or it is of another format version.
        """
        store = open_store(url)
        try:
            data = store.read(MANIFEST)
        except NotFoundError as err:
            raise FormatError(
                f"no shard set at {url}: it has no {MANIFEST}; "
                "run 'moco-scale pack SOURCE SHARD_SET' first (or again, if it was interrupted)"
            ) from err
        try:
            shards = parquet_table(data)
            version = (shards.schema.metadata or {})[b"format_version"].decode()
            if version != FORMAT_VERSION:
                raise FormatError(
                    f"{store.uri(MANIFEST)}: format version {version}, not {FORMAT_VERSION}; "
                    "use the version of this program that packed it, or pack again"
                )
            return cls(store, shards.select(SCHEMA.names))
        except (pa.ArrowException, OSError, KeyError) as err:
            raise FormatError(
                f"{store.uri(MANIFEST)}: not a readable manifest; pack again"
            ) from err

    @cached_property
    def set_id(self) -> str:
        """Hex digest over the shard table: the same content has the same id wherever it lies."""
        rows = zip(self.names, self.samples.tolist(), self._sha256, strict=True)
        digest = xxhash.xxh3_128()
        for row in rows:
            digest.update(repr(row).encode())
        return digest.hexdigest()

    def index(self, shard: int) -> ShardIndex:
        """A shard's index; the last few thousand are kept."""
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        path = self._index_paths[shard]
        found = read_index(self.store.read(path), where=self.store.uri(path))
        if len(found.offset) != self.samples[shard]:
            raise FormatError(
                f"{self.store.uri(path)}: {len(found.offset)} rows, but the manifest says "
                f"{self.samples[shard]} samples; pack again"
            )
        with self._lock:
            self._indexes[shard] = found
            while len(self._indexes) > _CACHED_INDEXES:
                self._indexes.popitem(last=False)
        return found

    def table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All indexes joined in ordinal order, plus the column sample_id. Held in memory."""
        wanted = list(columns) if columns is not None else INDEX_SCHEMA.names
        parts = [
            read_table(self.store.read(path), where=self.store.uri(path), columns=wanted)
            for path in self._index_paths
        ]
        joined = pa.concat_tables(parts)
        ids = pa.array(np.arange(self.num_samples, dtype=np.int64))
        return joined.append_column("sample_id", ids)

    def rejections(self) -> pa.Table:
        """uri, size in bytes, reason and detail of every object that was left out."""
        try:
            return parquet_table(self.store.read(REJECTIONS))
        except NotFoundError:
            return REJECTION_SCHEMA.empty_table()  # an adopted set has none

    def describe(self) -> Description:
        """Counts and sizes for people; reads every index."""
        table = self.table(columns=["format", "action", "width", "height"])
        sides = np.minimum(table.column("width").to_numpy(), table.column("height").to_numpy())
        return Description(
            url=self.url,
            set_id=self.set_id,
            source=self.metadata.get("source", "not known"),
            num_samples=self.num_samples,
            num_shards=len(self.names),
            total_bytes=self.total_bytes,
            formats=dict(Counter(table.column("format").to_pylist())),
            actions=dict(Counter(table.column("action").to_pylist())),
            rejected=dict(Counter(self.rejections().column("reason").to_pylist())),
            sides=(int(sides.min()), int(np.median(sides)), int(sides.max())),
            side_counts=_by_side(sides),
        )


def write_manifest(
    store: Store, records: Sequence[ShardRecord], metadata: Mapping[str, str]
) -> None:
    """Make the set visible: the last write of a packing."""
    columns = {name: [getattr(record, name) for record in records] for name in SCHEMA.names}
    known = {"format_version": FORMAT_VERSION, **metadata}
    table = pa.table(columns, schema=SCHEMA).replace_schema_metadata(known)
    written = io.BytesIO()
    pq.write_table(table, written, compression="zstd")
    store.put(SHARD_LIST, "".join(f"{record.name}\n" for record in records).encode())
    store.put(MANIFEST, written.getvalue())


def write_rejections(store: Store, rows: Sequence[tuple[str, int, str, str]]) -> None:
    """uri, size, reason, detail of what was left out, sorted by uri."""
    names = REJECTION_SCHEMA.names
    listed = [dict(zip(names, row, strict=True)) for row in sorted(rows)]
    table = pa.Table.from_pylist(listed, schema=REJECTION_SCHEMA)
    written = io.BytesIO()
    pq.write_table(table, written, compression="zstd")
    store.put(REJECTIONS, written.getvalue())


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
