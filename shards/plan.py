"""Which object goes into which shard: deduplicated, shuffled, cut by size; decided before any work."""

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from shards.errors import NotFoundError, PlanError
from shards.images import Reason
from shards.store import Store
from shards.tar import padded_bytes

PLAN = "plan/plan.json"
DROPPED = "plan/dropped.parquet"
SHARDS_PER_PART = 1000
ROWS = pa.schema([("path", pa.string()), ("size", pa.int64()), ("etag", pa.string())])
DROPPED_ROWS = pa.schema([*ROWS, ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSettings:
    """What a plan depends on beside the listing. Another value is another shard set."""

    source: str
    seed: int
    shard_bytes: int
    max_shard_samples: int
    max_pixels: int
    min_side: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A saved plan: shard i is row group i, counted over the parts."""

    settings: PlanSettings
    num_shards: int
    listed: int
    dropped: int

    def rows(self, store: Store, shard: int) -> pa.Table:
        """The objects of one shard, in order."""
        data = store.read(_part(shard // SHARDS_PER_PART))
        return pq.ParquetFile(pa.BufferReader(data)).read_row_group(shard % SHARDS_PER_PART)


def make_plan(
    catalog: pa.Table, source: Store, settings: PlanSettings
) -> "tuple[Plan, list[pa.Table], pa.Table]":
    """The plan of a catalog, the rows of each shard, and what is left out as a duplicate."""
    kept, dropped = _drop_duplicates(catalog, source)
    order = np.lexsort((np.arange(len(kept)), _shuffle_keys(kept, settings)))
    shuffled = kept.select(ROWS.names).take(pa.array(order))
    cuts = _cut(shuffled.column("size").to_numpy(), settings)
    shards = [shuffled.slice(start, stop - start) for start, stop in pairwise(cuts)]
    plan = Plan(
        settings=settings, num_shards=len(shards), listed=len(catalog), dropped=len(dropped)
    )
    return plan, shards, dropped


def save_plan(store: Store, plan: Plan, shards: Sequence[pa.Table], dropped: pa.Table) -> None:
    """Write the parts, then plan.json, which is what makes it a plan."""
    for part, first in enumerate(range(0, len(shards), SHARDS_PER_PART)):
        written = io.BytesIO()
        with pq.ParquetWriter(written, ROWS, compression="zstd") as writer:
            for rows in shards[first : first + SHARDS_PER_PART]:
                writer.write_table(rows, row_group_size=max(1, len(rows)))
        store.put(_part(part), written.getvalue())
    written = io.BytesIO()
    pq.write_table(dropped, written, compression="zstd")
    store.put(DROPPED, written.getvalue())
    saved = {name: getattr(plan.settings, name) for name in PlanSettings.__slots__}
    counts = {"num_shards": plan.num_shards, "listed": plan.listed, "dropped": plan.dropped}
    store.put(PLAN, json.dumps({"settings": saved, **counts}, indent=1).encode())


def load_plan(store: Store, settings: PlanSettings) -> Plan | None:
    """The plan that was saved here; None if there is none.

    Raises:
        PlanError: it was made with other settings or from another source.
    """
    try:
        saved = json.loads(bytes(store.read(PLAN)))
    except NotFoundError:
        return None
    found = PlanSettings(**saved.pop("settings"))
    for name in PlanSettings.__slots__:
        was, now = getattr(found, name), getattr(settings, name)
        if was != now:
            raise PlanError(
                f"{store.url} was begun with {name} {was!r}, not {now!r}; "
                "give the same settings to continue, or another destination"
            )
    return Plan(settings=settings, **saved)


def load_dropped(store: Store) -> pa.Table:
    """What the plan left out, with reasons."""
    return pq.read_table(pa.BufferReader(store.read(DROPPED)))


def _part(number: int) -> str:
    return f"plan/part-{number:05}.parquet"


def _shuffle_keys(rows: pa.Table, settings: PlanSettings) -> NDArray[np.uint64]:
    """xxh3-64 over the object's identity: a shuffle that depends on nothing but seed and names.

    A local folder's own path is left out, so that a copy of the folder packs to the same bytes.
    """
    where = urlsplit(settings.source)
    root = f"{where.netloc}/{where.path.strip('/')}" if where.scheme == "s3" else ""
    paths = rows.column("path").to_pylist()
    hashed = (
        xxhash.xxh3_64_intdigest(f"{root}\0{path}".encode(), seed=settings.seed) for path in paths
    )
    return np.fromiter(hashed, dtype=np.uint64, count=len(paths))


def _cut(sizes: NDArray[np.int64], settings: PlanSettings) -> list[int]:
    """First row of each shard, and the end: greedy by padded bytes and by count."""
    cuts, used, count = [0], 0, 0
    for row, size in enumerate(sizes.tolist()):
        need = padded_bytes(size)
        if count and (used + need > settings.shard_bytes or count == settings.max_shard_samples):
            cuts.append(row)
            used = count = 0
        used += need
        count += 1
    return [*cuts, len(sizes)] if len(sizes) else [0]


def _drop_duplicates(catalog: pa.Table, source: Store) -> tuple[pa.Table, pa.Table]:
    """Keep the first path of each group of equal objects.

    Equal means equal size and equal MD5, which S3 gives as the ETag of a plain single PUT. Where a
    store gives none, objects that share their size with another are read, and only those.
    """
    sizes = catalog.column("size").to_numpy()
    etags = catalog.column("etag").to_pylist()
    paths = catalog.column("path").to_pylist()
    is_s3 = source.url.startswith("s3://")
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    shared = (counts[inverse] > 1) & (sizes > 0)  # empty objects are rejected as empty
    first: dict[tuple[int, str], str] = {}
    keep, drop, details = [], [], []
    for row, path in enumerate(paths):
        if not shared[row]:
            keep.append(row)
            continue
        content = etags[row] if is_s3 and _is_md5(etags[row]) else _content_key(source, path)
        kept = first.setdefault((int(sizes[row]), content), path)
        if kept == path:
            keep.append(row)
        else:
            drop.append(row)
            details.append(f"same bytes as {source.uri(kept)}")
    dropped = catalog.select(ROWS.names).take(pa.array(drop, pa.int64()))
    dropped = dropped.append_column(
        "reason", pa.array([str(Reason.DUPLICATE)] * len(drop), pa.string())
    )
    dropped = dropped.append_column("detail", pa.array(details, pa.string()))
    return catalog.take(pa.array(keep, pa.int64())), dropped.cast(DROPPED_ROWS)


def _is_md5(etag: str | None) -> bool:
    return etag is not None and len(etag) == 32 and set(etag) <= set("0123456789abcdef")


def _content_key(source: Store, path: str) -> str:
    try:
        return xxhash.xxh3_128_hexdigest(source.read(path))
    except NotFoundError:
        return f"gone:{path}"  # deleted since the listing: packing rejects it as not_found
