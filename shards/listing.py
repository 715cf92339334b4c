"""A raw bucket, prefix or folder into a catalog: a row an object, sorted by path."""

import pyarrow as pa

from shards.errors import SourceError
from shards.store import LISTING, Store


def list_objects(source: Store) -> pa.Table:
    """Every object of the source: path, size in bytes, etag, modified.

    Raises:
        SourceError: there is not one object.
    """
    catalog = pa.Table.from_batches(list(source.list()), schema=LISTING)
    if not len(catalog):
        raise SourceError(f"{source.url} holds no objects; check the bucket and the prefix")
    return catalog.sort_by("path")
