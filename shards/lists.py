"""Lists of addresses: Parquet, CSV, TSV, JSON lines or plain text, streamed from any store."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from shards.catalog import rows_of
from shards.errors import SourceError
from shards.places import HOSTED, Place, StoreFile, Stores, file_of, place_of
from shards.store import SECRET, refuse_secrets

ADDRESS_COLUMNS = ("uri", "url", "path", "key")
_ENDINGS = (".parquet", ".csv", ".csv.gz", ".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz", ".txt",
            ".txt.gz")  # fmt: skip
_ROWS = 10_000
_BLOCK = 4 << 20
_LINE_BYTES = 64 << 20


def is_list(source: str) -> bool:
    return source.lower().endswith(_ENDINGS)


def read_list(source: str, stores: Stores, write: Callable[[pa.RecordBatch], None]) -> None:
    """Hand every row of a list to `write`, as CATALOG and the list's other columns.

    Out of Parquet these keep their types; out of text all are strings (in JSON lines whatever is
    no string stays JSON).

    Raises:
        SourceError: it cannot be read as what its name says, or has no column of addresses.
    """
    place = file_of(source)
    file = StoreFile(stores.open(place.root), place.path)
    number = 0
    try:
        for batch in _batches(source, file):
            write(_rows(source, batch, place, number))
            number += len(batch)
    except (pa.ArrowException, EOFError, OSError, ValueError, csv.Error) as err:
        said = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
        raise SourceError(f"{source}: not a readable list after row {number} ({said})") from err
    if not number:
        raise SourceError(f"{source}: the list has no rows")


def _batches(source: str, file: StoreFile) -> Iterator[pa.RecordBatch]:
    name = source.lower()
    if name.endswith(".parquet"):
        yield from _parquet(file)
        return
    plain: Any = pa.PythonFile(file)
    if name.endswith(".gz"):
        plain = pa.CompressedInputStream(plain, "gzip")
        name = name.removesuffix(".gz")
    if name.endswith(".txt"):
        yield from _text(plain)
    elif name.endswith(".jsonl"):
        yield from _json_lines(plain)
    else:
        yield from _csv(source, plain, "\t" if name.endswith(".tsv") else ",")


def _parquet(file: StoreFile) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(pa.PythonFile(file), pre_buffer=False, buffer_size=1 << 20) as rows:
        yield from rows.iter_batches(batch_size=_ROWS, use_threads=False)


def _csv(source: str, stream: Any, delimiter: str) -> Iterator[pa.RecordBatch]:
    head = stream.read(_BLOCK)
    start = head.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "backslashreplace")
    names = next(csv.reader(io.StringIO(start, newline=""), delimiter=delimiter), [])
    _address_of(source, names)
    reader = pyarrow.csv.open_csv(
        pa.PythonFile(_Joined(head, stream)),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(names, pa.binary()), strings_can_be_null=False
        ),
    )
    for batch in reader:
        columns = [_text_of(column) for column in batch.columns]
        yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _text(stream: Any) -> Iterator[pa.RecordBatch]:
    for lines in _lines(stream):
        found = _text_of(pa.array([line for line in lines if line], pa.binary()))
        yield pa.RecordBatch.from_arrays([found], names=["uri"])


def _json_lines(stream: Any) -> Iterator[pa.RecordBatch]:
    for lines in _lines(stream):
        rows = [json.loads(line) for line in lines if line.strip()]
        names = list(dict.fromkeys(name for row in rows for name in _object(row)))
        columns = [pa.array([_json_text(row.get(name)) for row in rows], pa.string())
                   for name in names]  # fmt: skip
        if rows:
            yield pa.RecordBatch.from_arrays(columns, names=names)


def _object(row: object) -> dict[str, object]:
    if not isinstance(row, dict):
        raise ValueError(f"a line is no JSON object: {json.dumps(row)[:80]}")
    return row


def _json_text(value: object) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)


def _lines(stream: Any) -> Iterator[list[bytes]]:
    """Lines without their ends, some thousands at a time."""
    rest = b""
    while block := stream.read(_BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        if len(rest) > _LINE_BYTES:
            raise ValueError(f"a line of more than {_LINE_BYTES >> 20} MiB")
        for begin in range(0, len(lines), _ROWS):
            yield [line.removesuffix(b"\r") for line in lines[begin : begin + _ROWS]]
    if rest:
        yield [rest.removesuffix(b"\r")]


class _Joined(io.RawIOBase):
    """What was read already, then the rest of the stream."""

    def __init__(self, head: bytes, stream: Any) -> None:
        super().__init__()
        self._head, self._stream = head, stream

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if self._head:
            part, self._head = self._head[:size], self._head[size:]
            return part
        return bytes(self._stream.read(size))


def _text_of(column: pa.Array) -> pa.Array:
    """Bytes as text; bytes that are not UTF-8 as \\xNN, which is how local folders name them."""
    try:
        return column.cast(pa.string())
    except pa.ArrowInvalid:
        texts = [value.decode("utf-8", "backslashreplace") for value in column.to_pylist()]
        return pa.array(texts, pa.string())


def _rows(source: str, batch: pa.RecordBatch, beside: Place, number: int) -> pa.RecordBatch:
    """Rows of the catalog; `number` rows came before."""
    names = batch.schema.names
    address = _address_of(source, names)
    uris = batch.column(address)
    if pa.types.is_dictionary(uris.type):
        uris = uris.dictionary_decode()
    if pa.types.is_binary(uris.type) or pa.types.is_large_binary(uris.type):
        uris = _text_of(uris)
    uris = uris.cast(pa.string())
    empty = pc.fill_null(pc.equal(uris, ""), True)
    if pc.any(empty).as_py():
        row = number + pc.index(empty, True).as_py() + 1
        raise SourceError(f"{source}: row {row} has no {address}")
    own = {name: batch.column(name) for name in names}
    del own[address]
    facts = {name.lower(): name for name in own if name.lower() in ("size", "etag")}
    size = etag = None
    if "size" in facts:
        size = _size(source, own.pop(facts["size"]), number)
    if "etag" in facts:
        trimmed = pc.utf8_trim(own.pop(facts["etag"]).cast(pa.string()), '"')
        etag = pc.if_else(pc.equal(trimmed, ""), None, trimmed)
    roots, paths = _split(uris, beside)
    return rows_of(roots, paths, own=own, size=size, etag=etag)


def _size(source: str, column: pa.Array, number: int) -> pa.Array:
    if pa.types.is_string(column.type):
        column = pc.if_else(pc.equal(column, ""), None, column)
    try:
        return column.cast(pa.int64())
    except pa.ArrowException as err:
        said = str(err).splitlines()[0]
        raise SourceError(
            f"{source}: the column 'size' is no number of bytes, in rows {number + 1} to "
            f"{number + len(column)} ({said})"
        ) from err


def _split(uris: pa.Array, beside: Place) -> tuple[pa.Array, pa.Array]:
    """Roots and paths. Whole addresses of buckets at Arrow's speed, others one by one."""
    secret = pc.match_substring_regex(uris, SECRET)
    if pc.any(secret).as_py():
        refuse_secrets(uris[pc.index(secret, True).as_py()].as_py())
    found = pc.extract_regex(
        uris, pattern=rf"(?s)^(?P<root>(?:{'|'.join(HOSTED)})://[^/]+)/(?P<path>.+)$"
    )
    roots, paths = pc.struct_field(found, "root"), pc.struct_field(found, "path")
    odd = pc.invert(found.is_valid())
    if pc.any(odd).as_py():
        places = [place_of(uri, beside) for uri in uris.filter(odd).to_pylist()]
        roots = pc.replace_with_mask(roots, odd, pa.array([p.root for p in places], pa.string()))
        paths = pc.replace_with_mask(paths, odd, pa.array([p.path for p in places], pa.string()))
    return roots, paths


def _address_of(source: str, names: Sequence[str]) -> str:
    """The column of addresses, in upper or lower case; raises SourceError if there is none."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceError(f"{source}: two columns are called {twice!r}")
    for wanted in ADDRESS_COLUMNS:
        for name in names:
            if name.lower() == wanted:
                return name
    has = ", ".join(map(repr, names)) or "none"
    raise SourceError(
        f"{source}: none of its columns is one of {', '.join(ADDRESS_COLUMNS)}; it has {has}"
    )
