"""A shard's index: one Parquet file with a row a sample, what the stream needs first."""

import io
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from shards.errors import FormatError
from shards.objects import Bytes

SCHEMA = pa.schema(
    [
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("checksum", pa.uint64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("format", pa.string()),
        ("orientation", pa.uint8()),
        ("key", pa.string()),
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("source_size", pa.int64()),
        ("flags", pa.uint32()),
        ("action", pa.string()),
    ]
)
"""offset: of the data in the tar, in bytes. checksum: xxh3-64 of the data. width, height: upright.
orientation: EXIF, 1 to 8. uri, etag, source_size: of the object that the sample was made from; a
file's etag is left out, because it is its place and time. flags: shards.images.ImageFlag. action:
what was done to the bytes."""

HOT = SCHEMA.names[:7]
_DELTA = ("offset", "length", "width", "height", "source_size")


@dataclass(frozen=True)
class ShardIndex:
    """What the stream needs of one shard: numpy columns with an entry a sample, in tar order."""

    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    checksum: NDArray[np.uint64]
    width: NDArray[np.int32]
    height: NDArray[np.int32]
    format: NDArray[np.str_]
    orientation: NDArray[np.uint8]

    @cached_property
    def end(self) -> NDArray[np.int64]:
        """First byte after each sample's data."""
        return self.offset + self.length


def write_index(table: pa.Table) -> bytes:
    """An index as Parquet bytes: same rows and pyarrow version, same bytes."""
    assert table.schema.equals(SCHEMA), "the schema is the format"
    written = io.BytesIO()
    packed = dict.fromkeys(_DELTA, "DELTA_BINARY_PACKED")
    repeated = ["format", "action"]
    pq.write_table(
        table, written, compression="zstd", use_dictionary=repeated, column_encoding=packed
    )
    return written.getvalue()


def read_index(data: Bytes, *, where: str) -> ShardIndex:
    """The columns that the stream needs.

    Raises:
        FormatError: `data` is no index.
    """
    table = read_table(data, where=where, columns=HOT)
    columns = {name: table.column(name).to_numpy() for name in HOT if name != "format"}
    # Fixed width: a few bytes a sample instead of an object.
    formats = np.array(table.column("format").to_pylist(), dtype="U8")
    return ShardIndex(format=formats, **columns)


def read_table(data: Bytes, *, where: str, columns: list[str] | None = None) -> pa.Table:
    """Any columns of an index. Raises FormatError if `data` is no index or lacks a column."""
    try:
        table = parquet_table(data, columns=columns)
    except (pa.ArrowException, OSError) as err:
        said = str(err).splitlines()[0]
        raise FormatError(f"{where}: not a readable index ({said}); pack again") from err
    missing = [name for name in columns or () if name not in table.column_names]
    if missing:
        raise FormatError(f"{where}: an index without the column {missing[0]!r}; pack again")
    return table


def parquet_table(data: Bytes, *, columns: list[str] | None = None) -> pa.Table:
    """A Parquet file out of memory, read by the calling thread alone.

    Arrow's own threads would let go of Python's buffer some time later; if the interpreter is
    ending by then, the process aborts ("terminate called without an active exception").
    """
    file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
    return file.read(columns=columns, use_threads=False)
