"""The catalog: Parquet files with a row for each object that was listed."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.errors import SourceError
from shards.index import SCHEMA

CATALOG = pa.schema(
    [
        ("root", pa.string()),
        ("path", pa.string()),
        ("member", pa.string()),
        ("start", pa.int64()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("modified", pa.timestamp("us", tz="UTC")),
    ]
)
"""root: what `open_store` opens. path: the object below it. member, start: name and first byte of a
member's data, null unless `path` is a tar. size: bytes, null where unknown. etag: without quotes,
null where a store has none (of a member: its tar's). The user's own columns follow."""

_TAKEN = {*SCHEMA.names, *CATALOG.names, "position"}
_ROWS_PER_GROUP = 65_536
_ROWS_PER_FILE = 64 * _ROWS_PER_GROUP


@dataclass(frozen=True, kw_only=True, slots=True)
class Catalog:
    """Everything that was listed, on local disk, out of core."""

    files: tuple[Path, ...]
    """Parquet, each with `schema`; rows in no order."""
    schema: pa.Schema
    """CATALOG, then the user's columns, null where a source has none."""
    listed: int
    bytes: int
    """Sum of the sizes that are known."""
    list_requests: int
    sources: tuple[str, ...]

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        for file in self.files:
            with pq.ParquetFile(file, pre_buffer=False) as rows:
                yield from rows.iter_batches(
                    batch_size=_ROWS_PER_GROUP, columns=columns, use_threads=False
                )


class CatalogWriter:
    """Writes batches of rows with the columns of CATALOG, and any others. Safe from many threads.

    Args:
        columns: which of the others travel, by the names their sources give them; None: all.
        progress: called with the rows so far.
    """

    def __init__(
        self,
        folder: Path,
        *,
        columns: Sequence[str] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._folder = folder
        self._columns = None if columns is None else set(columns)
        self._progress = progress
        self._lock = threading.Lock()
        self._schema = CATALOG
        self._seen: set[str] = set()
        self._held: list[pa.RecordBatch] = []
        self._held_rows = 0
        self._files: list[tuple[Path, pa.Schema]] = []
        self._file: pq.ParquetWriter | None = None
        self._file_rows = 0
        self.rows = 0
        self.bytes = 0
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, batch: pa.RecordBatch) -> None:
        with self._lock:
            batch = self._named(batch)
            self._held.append(batch)
            self._held_rows += len(batch)
            self.rows += len(batch)
            self.bytes += pc.sum(batch.column("size")).as_py() or 0
            if self._held_rows >= _ROWS_PER_GROUP:
                self._flush()
            if self._progress is not None:
                self._progress(self.rows)

    def mark(self) -> tuple[int, int, int]:
        """A point to go back to."""
        self._close()
        return len(self._files), self.rows, self.bytes

    def go_back(self, mark: tuple[int, int, int]) -> None:
        """Forget what was written since."""
        self._held, self._held_rows = [], 0
        self._close()
        files, self.rows, self.bytes = mark
        for path, _ in self._files[files:]:
            path.unlink()
        del self._files[files:]

    def finish(self, *, list_requests: int, sources: Sequence[str]) -> Catalog:
        """Raises SourceError if a wanted column is in no source."""
        self._close()
        if self._columns is not None and (missing := sorted(self._columns - self._seen)):
            has = ", ".join(map(repr, sorted(self._seen))) or "none"
            raise SourceError(
                f"no source has the column {missing[0]!r}; columns of their own: {has}"
            )
        for path, schema in self._files:
            if not schema.equals(self._schema):
                self._rewrite(path)
        return Catalog(
            files=tuple(path for path, _ in self._files),
            schema=self._schema,
            listed=self.rows,
            bytes=self.bytes,
            list_requests=list_requests,
            sources=tuple(sources),
        )

    def abandon(self) -> None:
        """Close what is open, after an error."""
        with self._lock:
            self._close_file()

    def _named(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch with the columns that travel, under names that the index does not use."""
        first = len(CATALOG)
        own = batch.schema.names[first:]
        self._seen.update(own)
        kept = [name for name in own if self._columns is None or name in self._columns]
        columns = batch.columns[:first]
        columns += [_plain(batch.column(first + own.index(name))) for name in kept]
        names = [f"user_{name}" if name in _TAKEN else name for name in kept]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise SourceError(f"two columns of a source would both be called {twice!r}; rename one")
        return pa.RecordBatch.from_arrays(columns, names=[*CATALOG.names, *names])

    def _flush(self) -> None:
        """Write what is held; columns that are new begin a new file."""
        if not self._held:
            return
        for batch in self._held:
            self._schema = _union(self._schema, batch.schema)
        table = pa.Table.from_batches([_as(batch, self._schema) for batch in self._held])
        self._held, self._held_rows = [], 0
        if self._file is not None and (
            self._file_rows >= _ROWS_PER_FILE or not self._file.schema.equals(self._schema)
        ):
            self._close_file()
        if self._file is None:
            path = self._folder / f"catalog-{len(self._files):05d}.parquet"
            self._file = pq.ParquetWriter(path, self._schema, compression="zstd")
            self._files.append((path, self._schema))
            self._file_rows = 0
        self._file.write_table(table)
        self._file_rows += len(table)

    def _close(self) -> None:
        with self._lock:
            self._flush()
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _rewrite(self, path: Path) -> None:
        """Give an earlier file the columns that were found later."""
        wider = path.with_suffix(".wider")
        with (
            pq.ParquetFile(path, pre_buffer=False) as rows,
            pq.ParquetWriter(wider, self._schema, compression="zstd") as file,
        ):
            for batch in rows.iter_batches(batch_size=_ROWS_PER_GROUP, use_threads=False):
                file.write_batch(_as(batch, self._schema))
        wider.replace(path)


def rows_of(
    root: pa.Array | str,
    paths: pa.Array,
    *,
    own: Mapping[str, pa.Array] = MappingProxyType({}),
    **facts: pa.Array | None,
) -> pa.RecordBatch:
    """Rows with the columns of CATALOG, null where not given, then the user's `own`."""
    if isinstance(root, str):
        root = pa.repeat(pa.scalar(root, pa.string()), len(paths))
    arrays = [root, paths]
    for field in list(CATALOG)[2:]:
        found = facts.get(field.name)
        arrays.append(pa.nulls(len(paths), field.type) if found is None else found)
    return pa.RecordBatch.from_arrays([*arrays, *own.values()], names=[*CATALOG.names, *own])


def _plain(column: pa.Array) -> pa.Array:
    """Without the encodings that differ from file to file of one table."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_large_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.string())
    return column


def _union(one: pa.Schema, other: pa.Schema) -> pa.Schema:
    """Every column of both; of two types the wider, or string."""
    if one.equals(other):
        return one
    fields = {field.name: field.remove_metadata().with_nullable(True) for field in one}
    for field in other:
        mine = fields.get(field.name)
        if mine is None:
            fields[field.name] = field.remove_metadata().with_nullable(True)
        elif not mine.type.equals(field.type):
            fields[field.name] = pa.field(field.name, _wider(mine.type, field.type))
    return pa.schema(fields.values())


def _wider(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    pair = pa.schema([("x", one)]), pa.schema([("x", other)])
    try:
        return pa.unify_schemas(pair, promote_options="permissive").field("x").type
    except pa.ArrowException:
        return pa.string()


def _as(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    columns = []
    for field in schema:
        place = batch.schema.get_field_index(field.name)
        if place < 0:
            columns.append(pa.nulls(len(batch), field.type))
            continue
        try:
            columns.append(batch.column(place).cast(field.type))
        except pa.ArrowException as err:
            raise SourceError(
                f"the column {field.name!r} is {batch.column(place).type} in one source and "
                f"another type in another; give it one type, or leave it out"
            ) from err
    return pa.RecordBatch.from_arrays(columns, schema=schema)
