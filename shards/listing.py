"""Buckets, folders, inventories, lists and tars into one catalog."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa

from shards.catalog import CATALOG, Catalog, CatalogWriter, rows_of
from shards.errors import SourceError
from shards.inventory import MANIFEST, read_inventory
from shards.keyspace import OutOfOrder, list_ranges
from shards.lists import is_list, read_list
from shards.places import Stores, folder_of
from shards.tar_source import is_tar, read_tars

__all__ = ["CATALOG", "Catalog", "list_objects"]

logger = logging.getLogger(__name__)

_SORTED = ("s3", "gs", "memory")
"""Schemes whose LIST starts at any key at no cost and goes on in the order of keys."""


def list_objects(
    sources: Sequence[str],
    folder: Path,
    *,
    columns: Sequence[str] | None = None,
    requester_pays: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Catalog:
    """List every source into Parquet files in `folder`; memory does not grow with their size.

    What a source is, its address says:

    - .../manifest.json: an S3 Inventory
    - *.parquet, .csv, .tsv, .jsonl, .txt, the last four perhaps with .gz: a list of addresses in
      a column called uri, url, path or key; `size` and `etag` are used if there
    - *.tar, with {000..099}, {a,b}, * or ? in it perhaps: tars, a row for each image in them
    - anything else: a bucket, a prefix that ends at a slash, or a local folder

    Args:
        columns: the user's own columns that travel; None: all. One whose name the catalog or a
            shard's index uses itself is called user_NAME in the catalog.
        progress: called with the number of rows so far, from any thread, one call at a time.

    Raises:
        SourceError: a source holds nothing, or is not what its address says.
        FormatError: a tar that cannot be read.
        StoreError: a source does not exist, or refused, or stopped answering.
    """
    stores = Stores(requester_pays=requester_pays)
    for old in folder.glob("catalog-*.parquet"):
        old.unlink()
    writer = CatalogWriter(folder, columns=columns, progress=progress)
    requests = 0
    try:
        # First what has columns of its own, so that the files of the rest have them from the start.
        for source in sorted(sources, key=_is_place):
            before = writer.rows
            requests += _list_source(source, stores, folder, writer)
            if writer.rows == before:
                raise SourceError(f"{source}: holds {_nothing(source)}; check the address")
        return writer.finish(list_requests=requests, sources=sources)
    except BaseException:
        writer.abandon()
        raise


def _list_source(source: str, stores: Stores, folder: Path, writer: CatalogWriter) -> int:
    """Write the rows of one source; return the LIST requests it took."""
    if _is_inventory(source):
        read_inventory(source, stores, folder, writer.write)
        return 0
    if is_list(source):
        read_list(source, stores, writer.write)
        return 0
    if is_tar(source):
        return read_tars(source, stores, writer.write)
    return _list_place(source, stores, writer)


def _list_place(source: str, stores: Stores, writer: CatalogWriter) -> int:
    root, prefix = folder_of(source)
    scheme, separator, host = root.partition("://")
    if scheme in ("http", "https"):
        raise SourceError(f"{source}: a web server cannot be listed; give a list of addresses")
    store = stores.open(root)

    def write(page: pa.RecordBatch) -> None:
        facts = {name: page.column(name) for name in ("size", "etag", "modified")}
        writer.write(rows_of(root, page.column("path"), **facts))

    # A directory bucket of S3 Express sorts in no order.
    if separator and scheme in _SORTED and not host.endswith("--x-s3"):
        mark = writer.mark()
        for order in ("bytes", "folders"):
            try:
                return list_ranges(store, prefix, write, order=order)
            except OutOfOrder as err:
                logger.warning("%s: does not sort by %s (%s); begun again", source, order, err)
                writer.go_back(mark)
    requests = 0
    for page in store.list(prefix):
        requests += 1
        write(page)
    return max(requests, 1) if separator else 0


def _is_inventory(source: str) -> bool:
    return source.rpartition("/")[2] == MANIFEST


def _is_place(source: str) -> bool:
    return not (_is_inventory(source) or is_list(source) or is_tar(source))


def _nothing(source: str) -> str:
    return "no images" if is_tar(source) else "no objects"
