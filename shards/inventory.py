"""S3 Inventory: what AWS lists by itself, day by day, as Parquet or CSV files behind a manifest.

https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from shards.catalog import rows_of
from shards.errors import SourceError
from shards.places import Stores, file_of, pinned
from shards.store import Store

MANIFEST = "manifest.json"
_CSV_NAMES = {
    "Bucket": "bucket",
    "Key": "key",
    "IsLatest": "is_latest",
    "IsDeleteMarker": "is_delete_marker",
    "Size": "size",
    "LastModifiedDate": "last_modified_date",
    "ETag": "e_tag",
}
_WANTED = tuple(_CSV_NAMES.values())
_ROWS = 65_536
_PART = 8 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class _Manifest:
    bucket: str
    destination: str
    format: str
    fields: tuple[str, ...]
    """Names of a CSV file's columns, as Parquet files have them."""
    files: tuple[tuple[str, str], ...]
    """Key in the destination, MD5."""


def read_inventory(
    source: str, stores: Stores, scratch: Path, write: Callable[[pa.RecordBatch], None]
) -> None:
    """Hand the current version of every object of an inventory to `write`.

    Data files are read from the bucket that the manifest names, one at a time by way of a file in
    the folder `scratch`, and only if their MD5 is the manifest's. The ETag of an object under
    SSE-KMS or SSE-C is kept: it is no MD5, but If-Match needs it.

    Raises:
        SourceError: a manifest or a data file that is not what it should be.
    """
    place = file_of(source)
    manifest = _read_manifest(source, bytes(stores.open(place.root).read(place.path)))
    store = stores.open(f"s3://{manifest.destination}")
    local = scratch / "inventory-part"
    try:
        for key, md5 in manifest.files:
            uri = store.uri(key)
            _download(store, key, md5, local)
            try:
                for batch in _batches(manifest, local):
                    write(_current(manifest, batch))
            except (pa.ArrowException, OSError, ValueError, KeyError) as err:
                said = str(err).strip().splitlines()[0]
                raise SourceError(f"{uri}: not a readable part of an inventory ({said})") from err
    finally:
        local.unlink(missing_ok=True)


def _read_manifest(source: str, data: bytes) -> _Manifest:
    try:
        found: dict[str, Any] = json.loads(data)
        schema, kind = found["fileSchema"], found["fileFormat"]
        fields: tuple[str, ...] = ()
        if kind == "CSV":
            names = [name.strip() for name in schema.split(",")]
            fields = tuple(_CSV_NAMES.get(name, f"column {name}") for name in names)
            if "key" not in fields:
                raise ValueError("fileSchema has no Key")
        manifest = _Manifest(
            bucket=found["sourceBucket"],
            destination=found["destinationBucket"].removeprefix("arn:aws:s3:::"),
            format=kind,
            fields=fields,
            files=tuple((file["key"], file["MD5checksum"].lower()) for file in found["files"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        said = f"{err} is missing" if isinstance(err, KeyError) else err
        raise SourceError(f"{source}: not the manifest of an S3 Inventory ({said})") from err
    if manifest.format not in ("CSV", "Parquet"):
        raise SourceError(
            f"{source}: the inventory is {manifest.format}, which is not read here; "
            "set its format to Parquet or CSV"
        )
    return manifest


def _download(store: Store, key: str, md5: str, local: Path) -> None:
    info = store.head(key)
    digest = hashlib.md5(usedforsecurity=False)
    starts = range(0, info.size, _PART)
    with local.open("wb") as file:
        for begin in range(0, len(starts), 4):
            some = starts[begin : begin + 4]
            ends = [min(start + _PART, info.size) for start in some]
            for part in store.read_ranges(key, some, ends, if_match=pinned(info.etag)):
                digest.update(part)
                file.write(part)
    if digest.hexdigest() != md5:
        raise SourceError(
            f"{store.uri(key)}: its MD5 is {digest.hexdigest()}, the manifest says {md5}; "
            "the inventory is damaged or half copied"
        )


def _batches(manifest: _Manifest, local: Path) -> Iterator[pa.RecordBatch]:
    """The wanted columns, as far as the inventory has them."""
    if manifest.format == "Parquet":
        with pq.ParquetFile(local, pre_buffer=False) as rows:
            columns = [name for name in _WANTED if name in rows.schema_arrow.names]
            yield from rows.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False)
        return
    reader = pyarrow.csv.open_csv(
        pa.input_stream(local, compression="gzip"),
        read_options=pyarrow.csv.ReadOptions(use_threads=False, column_names=manifest.fields),
        parse_options=pyarrow.csv.ParseOptions(newlines_in_values=True),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(manifest.fields, pa.string()),
            include_columns=[name for name in _WANTED if name in manifest.fields],
        ),
    )
    for batch in reader:
        place = batch.schema.get_field_index("key")
        yield batch.set_column(place, "key", _decoded(batch.column(place)))


def _decoded(keys: pa.Array) -> pa.Array:
    """Keys in CSV are URL-encoded, a space as a plus."""
    coded = pc.match_substring_regex(keys, "[%+]")
    texts = pa.array([unquote_plus(key) for key in keys.filter(coded).to_pylist()], pa.string())
    return pc.replace_with_mask(keys, coded, texts)


def _current(manifest: _Manifest, batch: pa.RecordBatch) -> pa.RecordBatch:
    """Rows of the catalog, without older versions and delete markers."""
    for name, wanted in (("is_latest", True), ("is_delete_marker", False)):
        if name in batch.schema.names:
            flag = batch.column(name)
            if pa.types.is_string(flag.type):
                flag = pc.equal(pc.utf8_lower(flag), "true")
            batch = batch.filter(pc.equal(pc.fill_null(flag, wanted), wanted))
    columns = {name: batch.column(name) for name in batch.schema.names}
    roots: pa.Array | str = f"s3://{manifest.bucket}"
    if "bucket" in columns:
        roots = pc.binary_join_element_wise("s3://", columns["bucket"].cast(pa.string()), "")
    etag = columns.get("e_tag")
    return rows_of(
        roots,
        columns["key"].cast(pa.string()),
        size=_value(columns.get("size"), pa.int64()),
        etag=None if etag is None else pc.utf8_trim(etag.cast(pa.string()), '"'),
        modified=_value(columns.get("last_modified_date"), pa.timestamp("us", tz="UTC")),
    )


def _value(column: pa.Array | None, kind: pa.DataType) -> pa.Array | None:
    if column is None:
        return None
    if pa.types.is_string(column.type):
        column = pc.if_else(pc.equal(column, ""), None, column)
    if pa.types.is_timestamp(kind) and pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", tz=column.type.tz))
        return column.cast(kind) if column.type.tz else pc.assume_timezone(column, "UTC")
    return column.cast(kind)
