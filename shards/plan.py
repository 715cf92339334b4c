"""Which object goes into which shard: deduplicated, shuffled, cut by size, before any work.

A saved plan is a few Parquet parts, in which a row group is a shard, the list of what was left out,
and plan.json, which is written last, once, and names the others by their content.
"""

import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import md5
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from shards.errors import AccessError, AlreadyExistsError, NotFoundError, PlanError
from shards.images import Reason
from shards.index import parquet_table
from shards.store import Store
from shards.tar import padded_bytes

FOLDER = "plan"
PLAN = f"{FOLDER}/plan.json"
# A worker reads a whole part to learn its shard's rows: with so many that stays far below what it
# reads of images anyway. (Row groups of one file must stay under 1,000.)
SHARDS_PER_PART = 64
ROWS = pa.schema([("path", pa.string()), ("size", pa.int64()), ("etag", pa.string())])
DROPPED_ROWS = pa.schema([*ROWS, ("reason", pa.string()), ("detail", pa.string())])
_HASHED_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSettings:
    """What a plan depends on beside the listing. Another value is another shard set."""

    source: str
    seed: int
    shard_bytes: int
    max_shard_samples: int
    max_object_bytes: int
    max_pixels: int
    min_side: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A saved plan: shard i is row group i, counted over the parts."""

    settings: PlanSettings
    plan_id: str
    """Digest of its rows."""
    num_shards: int
    listed: int
    dropped: int

    def rows(self, store: Store, shard: int) -> pa.Table:
        """The objects of one shard, in order: path, size in bytes, etag."""
        data = store.read(_part(shard // SHARDS_PER_PART, self.plan_id))
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False)
        return file.read_row_group(shard % SHARDS_PER_PART, use_threads=False)

    def left_out(self, store: Store) -> pa.Table:
        """The objects that need no fetching to be rejected, with reason and detail."""
        return parquet_table(store.read(_dropped(self.plan_id)))


def make_plan(catalog: Path, source: Store, settings: PlanSettings, *, store: Store) -> Plan:
    """Plan the objects of a catalog and save the plan in `store`.

    The order is by xxh3(seed, bucket, key): a global shuffle that needs nothing but the names.

    Args:
        source: where the objects are, to read those of equal size whose ETag says too little.

    Raises:
        PlanError: another packing began here meanwhile, with other settings.
    """
    listed = pq.read_table(catalog).sort_by("path")
    kept, dropped = _leave_out(listed.select(ROWS.names), source, settings)
    order = np.argsort(_shuffle_keys(kept, settings), kind="stable")
    shuffled = kept.take(pa.array(order)).combine_chunks()
    cuts = _cut(shuffled.column("size").to_numpy(), settings)
    shards = [shuffled.slice(start, stop - start) for start, stop in pairwise(cuts)]
    files = [_parquet(dropped), *map(_parquet_of, _parts(shards))]
    digest = xxhash.xxh3_128()
    for data in files:
        digest.update(data)
    plan = Plan(
        settings=settings,
        plan_id=digest.hexdigest(),
        num_shards=len(shards),
        listed=len(listed),
        dropped=len(dropped),
    )
    store.put(_dropped(plan.plan_id), files[0])
    for number, data in enumerate(files[1:]):
        store.put(_part(number, plan.plan_id), data)
    try:
        store.put(PLAN, json.dumps(asdict(plan), indent=1).encode(), create_only=True)
    except AlreadyExistsError:  # by another packing, or by a retry of this very write
        found = load_plan(store, settings)
        assert found is not None, "it exists"
        return found
    return plan


def load_plan(store: Store, settings: PlanSettings) -> Plan | None:
    """The plan that was saved here; None if there is none.

    Raises:
        PlanError: it was made with other settings or from another source.
    """
    try:
        saved = json.loads(bytes(store.read(PLAN)))
    except NotFoundError:
        return None
    was = saved.pop("settings")
    for name, now in asdict(settings).items():
        if was.get(name) != now:
            raise PlanError(
                f"{store.url} was begun with {name} {was.get(name)!r}, not {now!r}; "
                "give the same settings to continue, or another destination"
            )
    return Plan(settings=settings, **saved)


def _part(number: int, plan_id: str) -> str:
    return f"{FOLDER}/part-{number:05}-{plan_id[:8]}.parquet"


def _dropped(plan_id: str) -> str:
    return f"{FOLDER}/dropped-{plan_id[:8]}.parquet"


def _parts(shards: list[pa.Table]) -> Iterator[list[pa.Table]]:
    for first in range(0, len(shards), SHARDS_PER_PART):
        yield shards[first : first + SHARDS_PER_PART]


def _parquet_of(row_groups: list[pa.Table]) -> bytes:
    written = io.BytesIO()
    with pq.ParquetWriter(written, ROWS, compression="zstd") as writer:
        for rows in row_groups:
            writer.write_table(rows, row_group_size=len(rows))
    return written.getvalue()


def _parquet(table: pa.Table) -> bytes:
    written = io.BytesIO()
    pq.write_table(table, written, compression="zstd")
    return written.getvalue()


def _shuffle_keys(rows: pa.Table, settings: PlanSettings) -> NDArray[np.uint64]:
    """xxh3-64 over bucket and key, the same whichever prefix of the bucket is packed.

    Of a local folder only the path below it counts, so that a copy of the folder packs alike.
    """
    where = urlsplit(settings.source)
    is_bucket = where.scheme in ("s3", "gs", "az")
    bucket = where.netloc if is_bucket else ""
    folder = where.path.strip("/") + "/" if is_bucket and where.path.strip("/") else ""
    paths = rows.column("path").to_pylist()
    hashed = (
        xxhash.xxh3_64_intdigest(f"{bucket}\0{folder}{path}".encode(), seed=settings.seed)
        for path in paths
    )
    return np.fromiter(hashed, dtype=np.uint64, count=len(paths))


def _cut(sizes: NDArray[np.int64], settings: PlanSettings) -> list[int]:
    """First row of each shard, and the end: greedy by padded bytes and by count."""
    if not len(sizes):
        return [0]
    cuts, used, count = [0], 0, 0
    for row, size in enumerate(sizes.tolist()):
        need = padded_bytes(size)
        if count and (used + need > settings.shard_bytes or count == settings.max_shard_samples):
            cuts.append(row)
            used = count = 0
        used += need
        count += 1
    return [*cuts, len(sizes)]


def _leave_out(
    listed: pa.Table, source: Store, settings: PlanSettings
) -> tuple[pa.Table, pa.Table]:
    """What is packed, and what is rejected unseen: empty, too large, or a duplicate."""
    sizes = listed.column("size").to_numpy()
    is_empty, is_huge = sizes == 0, sizes > settings.max_object_bytes
    left_out = dict.fromkeys(np.flatnonzero(is_empty).tolist(), (Reason.EMPTY, "0 bytes"))
    for row in np.flatnonzero(is_huge).tolist():
        detail = f"{sizes[row]:,} bytes, limit {settings.max_object_bytes:,}"
        left_out[row] = (Reason.TOO_LARGE, detail)
    for row, kept in _duplicates(listed, np.flatnonzero(~is_empty & ~is_huge), source):
        detail = f"same bytes as {source.uri(listed.column('path')[kept].as_py())}"
        left_out[row] = (Reason.DUPLICATE, detail)
    dropped = sorted(left_out)
    why = [left_out[row] for row in dropped]
    table = listed.take(pa.array(dropped, pa.int64()))
    table = table.append_column("reason", pa.array([str(r) for r, _ in why], pa.string()))
    table = table.append_column("detail", pa.array([detail for _, detail in why], pa.string()))
    is_kept = np.ones(len(sizes), dtype=bool)
    is_kept[dropped] = False
    return listed.filter(pa.array(is_kept)), table.cast(DROPPED_ROWS)


def _duplicates(
    listed: pa.Table, candidates: NDArray[np.int64], source: Store
) -> Iterator[tuple[int, int]]:
    """Rows with the same bytes as an earlier row, each with that row.

    Equal means equal size and equal MD5, which S3 gives as the ETag of a plain single PUT. Where
    the listing does not tell, objects that share their size with another are read, only those.
    """
    sizes = listed.column("size").to_numpy()[candidates]
    _, inverse, counts = np.unique(sizes, return_inverse=True, return_counts=True)
    rows = pa.array(candidates[counts[inverse] > 1])
    shared = listed.take(rows).append_column("row", rows)
    shared = shared.append_column("md5", _md5s(shared, source))
    groups = shared.group_by(["size", "md5"]).aggregate([("row", "list"), ("row", "count")])
    for equal in groups.filter(pc.greater(groups["row_count"], 1))["row_list"].to_pylist():
        first, *others = sorted(equal)
        yield from ((row, first) for row in others)


def _md5s(objects: pa.Table, source: Store) -> pa.Array:
    """MD5 of each object: its ETag where that is one, else by reading the object."""
    found = objects.column("etag").to_pylist()
    is_s3 = source.url.startswith("s3://")
    unknown = [row for row, etag in enumerate(found) if not (is_s3 and _is_md5(etag))]
    paths = objects.column("path").take(pa.array(unknown, pa.int64())).to_pylist()
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        for row, key in zip(unknown, pool.map(partial(_read_md5, source), paths), strict=True):
            found[row] = key
    return pa.array(found, pa.string())


def _is_md5(etag: str | None) -> bool:
    return etag is not None and len(etag) == 32 and set(etag) <= set("0123456789abcdef")


def _read_md5(source: Store, path: str) -> str:
    """MD5, so that it can be compared with the ETags beside it; nothing here depends on secrecy."""
    try:
        return md5(source.read(path), usedforsecurity=False).hexdigest()
    except (NotFoundError, AccessError):
        return f"not read: {path}"  # packing finds out why, and what to make of it
