"""A raw bucket, prefix or folder into a catalog: a Parquet file with a row an object."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import SourceError
from shards.objects import LISTING
from shards.store import Store


def list_objects(source: Store, catalog: Path) -> int:
    """Write path, size in bytes, etag and modified of every object; return how many there are.

    Page by page: memory does not grow with the bucket.

    Raises:
        SourceError: there is not one object.
        StoreError: the bucket does not exist, or refused, or stopped answering.
    """
    count = 0
    with pq.ParquetWriter(catalog, LISTING, compression="zstd") as writer:
        for page in source.list():
            writer.write_table(pa.Table.from_batches([page]))
            count += len(page)
    if not count:
        raise SourceError(f"{source.url} holds no objects; check the bucket and the prefix")
    return count
