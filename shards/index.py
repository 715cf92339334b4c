"""A shard's index: one Parquet file with a row a sample, what the stream needs first."""

import io
from collections.abc import Sequence
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
        ("content", pa.binary(16)),
        ("phash", pa.uint64()),
    ]
)
"""offset: of the data in the tar, in bytes. checksum: xxh3-64 of the data. width, height: upright.
orientation: EXIF, 1 to 8. uri, etag, source_size: of the object that the sample was made from; a
file's etag is left out, because it is its place and time. flags: shards.images.ImageFlag. action:
what was done to the bytes. content: xxh3-128 of the object's bytes, the content key. phash: 64-bit
perceptual hash of the picture; null where it was not computed. The user's own columns follow, and
behind a compaction `position`, the sample's first position in its shard."""

POSITION = "position"
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
    position: NDArray[np.int64]
    """Where each sample stood when the shard was packed: what its sample id is counted from."""

    @cached_property
    def end(self) -> NDArray[np.int64]:
        """First byte after each sample's data."""
        return self.offset + self.length


def write_index(table: pa.Table) -> bytes:
    """An index as Parquet bytes: same rows and pyarrow version, same bytes.

    Behind the columns of SCHEMA come the user's own.
    """
    assert table.select(SCHEMA.names).schema.equals(SCHEMA), "the schema is the format"
    written = io.BytesIO()
    packed = dict.fromkeys(_DELTA, "DELTA_BINARY_PACKED")
    repeated = ["format", "action"]
    pq.write_table(
        table, written, compression="zstd", use_dictionary=repeated, column_encoding=packed
    )
    return written.getvalue()


def read_index(data: Bytes, *, where: str, dead: NDArray[np.int64] | None = None) -> ShardIndex:
    """The columns that the stream needs.

    Args:
        dead: positions that are left out, ascending.

    Raises:
        FormatError: `data` is no index.
    """
    table = live_rows(data, where=where, columns=HOT, dead=dead)
    columns = {
        name: table.column(name).to_numpy() for name in table.column_names if name != "format"
    }
    # Fixed width: a few bytes a sample instead of an object.
    formats = np.array(table.column("format").to_pylist(), dtype="U8")
    return ShardIndex(format=formats, **columns)


def live_rows(
    data: Bytes, *, where: str, columns: Sequence[str], dead: NDArray[np.int64] | None = None
) -> pa.Table:
    """Columns of an index and each row's `position`, without the rows at the positions `dead`."""
    table = read_table(data, where=where, columns=[*columns, POSITION])
    if POSITION not in table.column_names:
        table = table.append_column(POSITION, pa.array(np.arange(len(table), dtype=np.int64)))
    if dead is None or not len(dead):
        return table
    return table.filter(pa.array(~np.isin(table.column(POSITION).to_numpy(), dead)))


def read_table(data: Bytes, *, where: str, columns: list[str] | None = None) -> pa.Table:
    """Columns of an index, all for None; the user's own are left out where it has them not.

    Raises:
        FormatError: `data` is no index, or lacks one of the format's own columns.
    """
    try:
        table = parquet_table(data, columns=columns)
    except (pa.ArrowException, OSError) as err:
        said = str(err).splitlines()[0]
        raise FormatError(f"{where}: not a readable index ({said}); pack again") from err
    needed = [name for name in columns or () if name in SCHEMA.names]
    missing = [name for name in needed if name not in table.column_names]
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
