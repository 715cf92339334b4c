"""From raw buckets to a shard set: list, plan, pack shard by shard, publish the whole at last."""

import json
import logging
import os
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from shards.catalog import Catalog
from shards.commit import MARKERS, Marker, commit_shard, committed, read_marker
from shards.compact import erased_rows
from shards.decoder import Decoder
from shards.dedup import find_duplicates
from shards.engine import Engine, LocalEngine, RayEngine
from shards.errors import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    PlanError,
    ShardError,
    SourceError,
    StoreError,
)
from shards.images import EXTENSIONS, CheckedImage, ImageRules, Reason, Rejection, check_image
from shards.index import SCHEMA as INDEX_SCHEMA
from shards.index import write_index
from shards.listing import list_objects
from shards.manifest import (
    MANIFEST,
    REJECTION_SCHEMA,
    ShardRecord,
    ShardSet,
    rejections_path,
)
from shards.objects import Bytes, RejectedObject
from shards.plan import (
    ROWS,
    Plan,
    PlanSettings,
    load_plan,
    make_plan,
    plan_folder,
    saved_generations,
    superseded_in,
)
from shards.store import Store, open_store
from shards.takedown import rows_of_objects
from shards.tar import Member, build_tar, sample_key
from shards.tombstones import DeadReason, dead_rows

logger = logging.getLogger(__name__)

_PROBE = "_probe"
# So many refusals of so many objects are no chance, even in a bucket of which little may be read.
_REFUSALS_ENOUGH = 200
_MARKERS_AT_ONCE = 16
_REJECTIONS_AT_ONCE = 65_536
_LARGEST_TAR = 4 * 2**30
_MOST_PIXELS = 178_956_970  # Pillow opens nothing larger
_GUESSED_BYTES = 2**20  # of an object whose listing gave no size, while it is being fetched


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """How a bucket is packed."""

    seed: int = 0
    """Seed of the global shuffle."""
    shard_bytes: int = 256 * 2**20
    """Size of a shard, in bytes; the last ones of a set may be smaller."""
    max_shard_samples: int = 16384
    """Most samples in a shard."""
    max_object_bytes: int = 256 * 2**20
    """Objects of more bytes are rejected as too large, without fetching them."""
    max_pixels: int = 89_478_485
    """Images of more pixels (width x height) are rejected as bombs, before any decoding."""
    min_side: int = 1
    """Images whose shorter side is below this many pixels are rejected as too small."""
    resize_side: int = 0
    """Resize images to this many pixels on the shorter side, if theirs is longer; 0 keeps bytes."""
    columns: tuple[str, ...] | None = None
    """Which of the user's own columns (of lists and tars) travel into the index; None: all."""
    requester_pays: bool = False
    """Agree to pay for requests to requester-pays buckets (S3)."""
    engine: Literal["local", "ray"] = "local"
    """Where shards are packed: processes of this machine, or a Ray cluster."""
    ray_address: str = "auto"
    """Of the Ray cluster: auto finds a running one; or host:port."""
    workers: int = 0
    """Shards at once; 0 takes the cores of the machine or cluster. Changes nothing but the time."""
    fetch_threads: int = 16
    """Objects fetched at once by each worker."""
    fetch_bytes: int = 64 * 2**20
    """Most bytes that each worker fetches ahead of checking, beside the shard it is making."""
    scratch: Path | None = None
    """Local folder for listing and planning; None: the system's temporary one."""

    def __post_init__(self) -> None:
        # The largest: what a seed can be; one PUT; a key's width; Pillow's own limit.
        ranges = {
            "seed": (0, 2**63 - 1),
            "shard_bytes": (1, 4 * 2**30),
            "max_shard_samples": (1, 16**6),
            "max_object_bytes": (1, 4 * 2**30),
            "max_pixels": (1, _MOST_PIXELS),
            "min_side": (1, 2**31 - 1),
            "resize_side": (0, 16384),
            "workers": (0, 65536),
            "fetch_threads": (1, 1024),
            "fetch_bytes": (1, 2**40),
        }
        for name, (low, high) in ranges.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, not {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackProgress:
    """How far a packing is. Counts beside `shards_done` are of this run alone."""

    shards_done: int
    """Committed by this run and the ones before it."""
    shards: int
    """Of the plan."""
    packed: int
    rejected: int
    bytes: int
    """Of the tars."""
    throttles: int
    """Answers 429 and 503 that the workers met."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackReport:
    """What a packing came to: listed = packed + all rejected + already, always."""

    url: str
    set_id: str
    version: int
    generation: int
    listed: int
    packed: int
    rejected: dict[str, int]
    """Objects left out, by reason."""
    already: int
    """Objects that earlier generations packed or rejected, and that are the same still."""
    dead: dict[str, int]
    """Samples of the whole set that are tombstoned, by reason."""
    shards: int
    """Of the whole set, as are samples and bytes."""
    samples: int
    """Live ones."""
    bytes: int
    resumed_shards: int
    """Shard numbers that an earlier run had already dealt with."""
    was_complete: bool
    """Whether there was nothing to do, so that this run wrote nothing."""
    seconds: float


def pack(
    sources: str | Sequence[str],
    destination: str,
    config: PackConfig,
    *,
    add: bool = False,
    dry_run: bool = False,
    on_plan: Callable[[Plan, Catalog], None] | None = None,
    progress: Callable[[PackProgress], None] | None = None,
) -> PackReport | None:
    """Build a shard set; running it again continues, and does nothing when the set is complete.

    Args:
        sources: see `list_objects` for what each may be.
        add: look for new and changed objects, and pack them as another generation.
        dry_run: stop when the plan is made; None is returned. The same command without it goes on.
        on_plan: is shown a plan that was made just now, before the work begins.

    Raises:
        SourceError: no object, or not one usable image; nothing is left behind.
        PlanError: the destination was begun with other settings, or overlaps a source.
        StoreError: a store refused or failed; the same command continues after what is committed.
    """
    started = time.monotonic()
    given = (sources,) if isinstance(sources, str) else tuple(sources)
    store = open_store(destination)
    for source in given:
        _refuse_overlap(source, store.url)
    settings = _settings(given, config)
    with tempfile.TemporaryDirectory(prefix="moco-scale-", dir=config.scratch) as scratch:
        head, planned = _found(store)
        plan = _begun(store, head, planned, settings, add=add)
        if plan is None:
            plan, catalog = _new_plan(store, head, settings, config, scratch=Path(scratch))
            if on_plan is not None:
                on_plan(plan, catalog)
        is_done = head is not None and plan.generation in _generations(head)
        is_empty = head is not None and plan.num_shards == plan.dropped == 0
        if head is not None and is_empty and not is_done:
            _remove(store, plan_folder(plan.generation))  # the next one shall list again
        if head is not None and (is_done or is_empty):
            head.renew()
            return _report(store.url, plan, resumed=plan.num_shards, started=started)
        if dry_run:
            return None
        done = [shard for shard in committed(store) if shard >= plan.first_shard]
        _work(store, plan, done, config, progress=progress)
        _finish(store, head, plan, scratch=Path(scratch))
    report = _report(store.url, plan, resumed=len(done), started=started)
    return replace(report, was_complete=False)


def pack_shard(
    shard: int,
    plan: Plan,
    *,
    store: Store,
    open_source: Callable[[str], Store],
    decoder: Decoder,
    fetch_threads: int,
    fetch_bytes: int,
) -> Marker:
    """Fetch, check, assemble and commit one shard: what an engine runs, harmless to repeat.

    Holds one shard in memory, and up to `fetch_bytes` of objects (or one, if it is larger) that are
    fetched ahead in threads. Images are checked here, one by one.
    """
    rows = plan.rows(store, shard)
    rules = ImageRules(
        max_pixels=plan.settings.max_pixels,
        min_side=plan.settings.min_side,
        resize_side=plan.settings.resize_side,
    )
    objects = _Objects(rows, open_source, max_object_bytes=plan.settings.max_object_bytes)
    kept: dict[int, tuple[CheckedImage, bytes, int]] = {}
    rejected: dict[int, RejectedObject] = {}
    for number, found in objects.fetch(threads=fetch_threads, ahead_bytes=fetch_bytes):
        if isinstance(found, Rejection):
            rejected[number] = objects.rejected(number, found)
            continue
        checked = check_image(found, rules, decoder)
        if isinstance(checked, Rejection):
            rejected[number] = objects.rejected(number, checked)
        else:
            kept[number] = (checked, xxhash.xxh3_128_digest(found), len(found))
    kept_bytes = sum(len(image.data) for image, _, _ in kept.values())
    if kept_bytes > _LARGEST_TAR:
        raise PlanError(
            f"shard {shard} came to {kept_bytes / 2**30:.1f} GiB, more than one PUT takes, because "
            "its objects' sizes were not known; pack to another destination with a lower "
            f"--max-shard-samples than {len(kept)}"
        )
    # In the order of the plan, whenever each of them came.
    tar, index = _assemble(shard, rows, objects, dict(sorted(kept.items()))) if kept else ([], b"")
    return commit_shard(
        store,
        shard,
        tar=tar,
        index=index,
        samples=len(kept),
        generation=plan.generation,
        rejected=[rejected[number] for number in sorted(rejected)],
    )


class _Objects:
    """The objects of one shard: what each is called, and its bytes or what is wrong with it."""

    def __init__(
        self, rows: pa.Table, open_source: Callable[[str], Store], *, max_object_bytes: int
    ) -> None:
        self._rows = rows.select(ROWS.names).to_pylist()
        self._open_source = open_source
        self._max_object_bytes = max_object_bytes

    def uri(self, number: int) -> str:
        row = self._rows[number]
        uri = self._open_source(row["root"]).uri(row["path"])
        return uri if row["member"] is None else f"{uri}#{row['member']}"

    def etag(self, number: int) -> str | None:
        """A file's is left out: it is a place and a time."""
        row = self._rows[number]
        return row["etag"] if "://" in row["root"] else None

    def rejected(self, number: int, rejection: Rejection) -> RejectedObject:
        return RejectedObject(
            uri=self.uri(number),
            size=self._rows[number]["size"],
            etag=self.etag(number),
            reason=rejection.reason,
            detail=rejection.detail,
        )

    def fetch(self, *, threads: int, ahead_bytes: int) -> Iterator[tuple[int, Bytes | Rejection]]:
        """Each row's number with its bytes, or with what is permanently wrong.

        A refused object is forbidden if others of its bucket can be read, before and after:
        otherwise it is the credentials, which is no property of the object, and the run stops.

        Raises:
            StoreError: anything that may pass; the shard is not committed.
        """
        refused: list[tuple[int, AccessError]] = []
        readable: dict[str, str] = {}
        with ThreadPoolExecutor(threads) as pool:
            for number, fetch in self._ahead(pool, ahead_bytes):
                row = self._rows[number]
                try:
                    found = fetch.result()
                except AccessError as err:
                    refused.append((number, err))
                    if row["root"] not in readable and len(refused) >= _REFUSALS_ENOUGH:
                        raise
                    continue
                if not isinstance(found, Rejection):
                    readable[row["root"]] = row["path"]
                yield number, found
        for number, error in refused:
            row = self._rows[number]
            if row["root"] not in readable:
                raise error
            try:
                yield number, self._read(row)
            except AccessError as err:
                self._open_source(row["root"]).head(readable[row["root"]])
                yield number, Rejection(reason=Reason.FORBIDDEN, detail=str(err))

    def _ahead(
        self, pool: ThreadPoolExecutor, most_bytes: int
    ) -> Iterator[tuple[int, "Future[Bytes | Rejection]"]]:
        """Fetches in the order of the rows, so many ahead as there is room for."""
        running: deque[tuple[int, Future[Bytes | Rejection]]] = deque()
        held = submitted = 0
        try:
            for number in range(len(self._rows)):
                while submitted < len(self._rows):
                    need = self._need(submitted)
                    if running and held + need > most_bytes:
                        break
                    running.append((submitted, pool.submit(self._read, self._rows[submitted])))
                    held += need
                    submitted += 1
                yield running.popleft()
                held -= self._need(number)
        finally:
            for _, waiting in running:
                waiting.cancel()

    def _need(self, number: int) -> int:
        size = self._rows[number]["size"]
        return _GUESSED_BYTES if size is None else int(size)

    def _read(self, row: dict[str, Any]) -> Bytes | Rejection:
        source, etag = self._open_source(row["root"]), row["etag"]
        try:
            if row["size"] is None:
                # Its size decides whether it is fetched at all.
                known = source.head(row["path"])
                if known.size > self._max_object_bytes:
                    detail = f"{known.size:,} bytes, limit {self._max_object_bytes:,}"
                    return Rejection(reason=Reason.TOO_LARGE, detail=detail)
                etag = etag or known.etag or None
            if row["start"] is None:
                return source.read(row["path"], if_match=etag)
            start, end = row["start"], row["start"] + row["size"]
            (found,) = source.read_ranges(row["path"], [start], [end], if_match=etag)
            return found
        except NotFoundError:
            return Rejection(reason=Reason.NOT_FOUND, detail="deleted after it was listed")
        except ChangedError:
            return Rejection(reason=Reason.CHANGED, detail=f"its etag was {etag} when listed")


def _assemble(
    shard: int,
    rows: pa.Table,
    objects: _Objects,
    kept: Mapping[int, tuple[CheckedImage, bytes, int]],
) -> tuple[list[Bytes], bytes]:
    """The tar's buffers, and its index."""
    images = [image for image, _, _ in kept.values()]
    members = [
        Member(name=f"{sample_key(shard, place)}.{EXTENSIONS[image.format]}", data=image.data)
        for place, image in enumerate(images)
    ]
    tar, offsets = build_tar(members)
    columns = {
        "offset": offsets,
        "length": [len(image.data) for image in images],
        "checksum": [xxhash.xxh3_64_intdigest(image.data) for image in images],
        "width": [image.width for image in images],
        "height": [image.height for image in images],
        "format": [image.format for image in images],
        "orientation": [image.orientation for image in images],
        "key": [member.name.partition(".")[0] for member in members],
        "uri": [objects.uri(number) for number in kept],
        "etag": [objects.etag(number) for number in kept],
        "source_size": [size for _, _, size in kept.values()],
        "flags": [int(image.flags) for image in images],
        "action": [image.action for image in images],
        "content": [content for _, content, _ in kept.values()],
        "phash": [image.phash for image in images],
    }
    table = pa.table(columns, schema=INDEX_SCHEMA)
    of_the_user = rows.drop_columns(ROWS.names).take(pa.array(list(kept), pa.int64()))
    for name in of_the_user.column_names:
        table = table.append_column(of_the_user.schema.field(name), of_the_user.column(name))
    return tar, write_index(table)


def _settings(sources: Sequence[str], config: PackConfig) -> PlanSettings:
    return PlanSettings(
        sources=tuple(sources),
        seed=config.seed,
        shard_bytes=config.shard_bytes,
        max_shard_samples=config.max_shard_samples,
        max_object_bytes=config.max_object_bytes,
        max_pixels=config.max_pixels,
        min_side=config.min_side,
        resize_side=config.resize_side,
        columns=config.columns,
    )


def _found(store: Store) -> tuple[ShardSet | None, list[int]]:
    """The shard set that is there already, and the generations that were planned.

    A folder that does not exist yet is made by the first write.

    Raises:
        NotFoundError: no such bucket.
    """
    try:
        planned = saved_generations(store)
    except NotFoundError as err:
        if "://" in store.url or Path(store.url).exists():
            raise type(err)(f"destination {err}") from err
        return None, []
    except StoreError as err:
        raise type(err)(f"destination {err}") from err
    try:
        store.head(MANIFEST)
    except NotFoundError:
        return None, planned
    return ShardSet.open(store.url), planned


def _begun(
    store: Store,
    head: ShardSet | None,
    planned: Sequence[int],
    settings: PlanSettings,
    *,
    add: bool,
) -> Plan | None:
    """The plan to go on with, or that was finished; None where a new one has to be made."""
    newest = planned[-1] if planned else None
    if newest is not None and (head is None or newest not in _generations(head)):
        return load_plan(store, settings, newest)
    if head is None:
        return None
    if "tars" in head.metadata:
        raise PlanError(
            f"{store.url}: its tars stay in {head.tars.url}, where nothing is written; "
            "pack to another destination"
        )
    if add:
        if planned:  # what decides how a sample looks is the same in all generations
            load_plan(store, settings, planned[0], free=("sources", "columns"))
        return None
    if not planned:
        raise PlanError(
            f"{store.url} holds a shard set already, and no plan to continue; "
            "give another destination, or --add to add to it"
        )
    return load_plan(store, settings, planned[0])


def _new_plan(
    store: Store,
    head: ShardSet | None,
    settings: PlanSettings,
    config: PackConfig,
    *,
    scratch: Path,
) -> tuple[Plan, Catalog]:
    catalog = list_objects(
        settings.sources,
        scratch / "catalog",
        columns=config.columns,
        requester_pays=config.requester_pays,
    )
    _probe(store)
    plan = make_plan(
        catalog,
        settings,
        store=store,
        scratch=scratch,
        generation=max(_generations(head), default=-1) + 1 if head else 0,
        first_shard=max(committed(store), default=-1) + 1 if head else 0,
        known=_known(head) if head else (),
    )
    return plan, catalog


def _known(head: ShardSet) -> Iterator[pa.RecordBatch]:
    """What earlier generations packed, or rejected for what it is: uri, etag, size.

    Not what was left out as a duplicate of an object that has changed since: its bytes are served
    by nobody, so it is to be planned again.
    """
    columns = ["uri", "etag", "source_size"]
    made_by = [record.generation for record in head.records()]
    may_pass = pa.array([Reason.NOT_FOUND, Reason.CHANGED, Reason.FORBIDDEN], pa.string())
    twin_is_gone = _said_of_changed(head)
    for generation in _generations(head):
        # Of what was listed twice a generation has a rejection and a sample: the sample counts.
        table = head.rejections(generation)
        again = pc.or_(
            pc.is_in(table.column("reason"), may_pass),
            pc.is_in(table.column("detail"), twin_is_gone),
        )
        yield from table.filter(pc.invert(again)).select(["uri", "etag", "size"]).to_batches()
        shards = [shard for shard, made in enumerate(made_by) if made == generation]
        widowed = _widowed(head, shards, twin_is_gone)
        for table in head.tables(columns, shards=shards, with_dead=True):
            known = ~np.isin(table.column("sample_id").to_numpy(), widowed)
            yield from _as_known(table.filter(pa.array(known)), columns)
        for _, table in erased_rows(head, shards):
            again = pc.is_in(table.column("detail"), twin_is_gone)
            yield from _as_known(table.filter(pc.invert(again)), columns)


def _as_known(table: pa.Table, columns: list[str]) -> list[pa.RecordBatch]:
    named = table.select(columns).rename_columns(["uri", "etag", "size"])
    found: list[pa.RecordBatch] = named.to_batches()
    return found


def _said_of_changed(head: ShardSet) -> pa.ChunkedArray:
    """What the duplicates of objects that have changed since say of themselves."""
    uris = [
        batch.column("uri")
        for generation in saved_generations(head.store)
        if generation in _generations(head)
        for batch in superseded_in(head.store, generation)
    ]
    return pc.binary_join_element_wise("same bytes as ", pa.chunked_array(uris, pa.string()), "")


def _widowed(
    head: ShardSet, shards: Sequence[int], twin_is_gone: pa.ChunkedArray
) -> NDArray[np.int64]:
    """Sample ids in these shards of duplicates whose twin has changed since."""
    found = [np.zeros(0, dtype=np.int64)]
    records = head.records()
    for at in range(0, len(shards) if len(twin_is_gone) else 0, 1000):
        some = shards[at : at + 1000]
        dead = dead_rows(
            head.store,
            [records[shard].name for shard in some],
            [records[shard].tombstones for shard in some],
        )
        dead = dead.filter(pc.is_in(dead.column("detail"), twin_is_gone))
        first = head.first_ordinal[np.array(some)[dead.column("shard").to_numpy()]]
        found.append(first + dead.column("position").to_numpy())
    return np.concatenate(found)


def _generations(head: ShardSet) -> list[int]:
    return [entry["generation"] for entry in head.generations]


class _Done(NamedTuple):
    """What an engine brings back of one shard; its marker has the rest."""

    packed: int
    rejected: int
    bytes: int
    throttles: int
    """Since the worker's last shard."""


def _work(
    store: Store,
    plan: Plan,
    done: Sequence[int],
    config: PackConfig,
    *,
    progress: Callable[[PackProgress], None] | None,
) -> None:
    shards = range(plan.first_shard, plan.first_shard + plan.num_shards)
    missing = sorted({*shards} - {*done})
    run = partial(
        _pack_in_worker,
        plan=plan,
        destination=store.url,
        requester_pays=config.requester_pays,
        fetch_threads=config.fetch_threads,
        fetch_bytes=config.fetch_bytes,
    )
    totals = Counter(dict.fromkeys(_Done._fields, 0))
    try:
        for number, one in enumerate(_engine(config).map(run, missing), start=1):
            totals.update(one._asdict())
            if progress is not None:
                committed = len(done) + number
                progress(PackProgress(shards_done=committed, shards=plan.num_shards, **totals))
    finally:
        _decoder().close()  # this process was the worker, if there is only one


def _engine(config: PackConfig) -> Engine:
    if config.engine == "ray":
        return RayEngine(config.ray_address, config.workers)
    return LocalEngine(config.workers)


def _pack_in_worker(
    shard: int,
    *,
    plan: Plan,
    destination: str,
    requester_pays: bool,
    fetch_threads: int,
    fetch_bytes: int,
) -> _Done:
    before = _throttles()
    marker = pack_shard(
        shard,
        plan,
        store=_opened(destination),
        open_source=partial(_opened, requester_pays=requester_pays),
        decoder=_decoder(),
        fetch_threads=fetch_threads,
        fetch_bytes=fetch_bytes,
    )
    return _Done(
        packed=marker.record.samples if marker.record else 0,
        rejected=len(marker.rejected),
        bytes=marker.record.bytes if marker.record else 0,
        throttles=_throttles() - before,
    )


# What a worker process opens once and uses for all its shards.
_stores: dict[tuple[str, bool], Store] = {}


def _opened(url: str, *, requester_pays: bool = False) -> Store:
    key = (url, requester_pays)
    if key not in _stores:
        _stores[key] = open_store(url, requester_pays=requester_pays)
    return _stores[key]


def _throttles() -> int:
    return sum(store.stats().throttles for store in _stores.values())


@lru_cache(maxsize=1)
def _decoder() -> Decoder:
    return Decoder()


def _finish(store: Store, head: ShardSet | None, plan: Plan, *, scratch: Path) -> None:
    """Check the account, then write the manifest, which is what readers trust."""
    store.delete([_PROBE])  # a run that was killed at the wrong moment leaves it
    records: list[ShardRecord] = []
    counts: Counter[str] = Counter()
    rejections = scratch / "rejections.parquet"
    with (
        pq.ParquetWriter(rejections, REJECTION_SCHEMA, compression="zstd") as writer,
        ThreadPoolExecutor(_MARKERS_AT_ONCE) as pool,
    ):
        for batch in plan.left_out(store):
            writer.write_batch(batch)
            counts.update(batch.column("reason").to_pylist())
        shards = range(plan.first_shard, plan.first_shard + plan.num_shards)
        rows: list[dict[str, Any]] = []
        for part in (shards[at : at + 128] for at in range(0, len(shards), 128)):
            for marker in pool.map(partial(read_marker, store), part):
                records += [marker.record] if marker.record else []
                counts.update(row.reason for row in marker.rejected)
                rows += [row._asdict() for row in marker.rejected]
            if len(rows) >= _REJECTIONS_AT_ONCE:
                writer.write_table(pa.Table.from_pylist(rows, schema=REJECTION_SCHEMA))
                rows = []
        writer.write_table(pa.Table.from_pylist(rows, schema=REJECTION_SCHEMA))
    packed = sum(record.samples for record in records)
    if packed + counts.total() + plan.already != plan.listed:
        raise ShardError(
            f"{store.url}: listed {plan.listed}, packed {packed}, rejected {counts.total()}, "
            f"already there {plan.already}; this is a fault of this program: please report it"
        )
    if not records and head is None:
        _remove(store, MARKERS, plan_folder(0))
        why = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
        raise SourceError(
            f"{' '.join(plan.settings.sources)}: not one usable image in {plan.listed} objects "
            f"({why}); nothing was written"
        )
    store.put(rejections_path(plan.generation), rejections.read_bytes())
    reasons = dict(sorted(counts.items()))
    generation = {
        "generation": plan.generation,
        "sources": list(plan.settings.sources),
        "listed": plan.listed,
        "packed": packed,
        "already": plan.already,
        "rejected": reasons,
    }
    draft = ShardSet.draft(
        store,
        [*(head.records() if head else []), *records],
        _metadata(head, plan, generation),
        version=head.version if head else 0,
    )
    draft.publish(_dead(draft, head, plan, store, scratch=scratch))


def _metadata(
    head: ShardSet | None, plan: Plan, generation: Mapping[str, Any]
) -> Mapping[str, str]:
    before = head.metadata if head is not None else {}
    sources = [*json.loads(before.get("sources", "[]")), *plan.settings.sources]
    rejected = Counter(json.loads(before.get("rejected", "{}")))
    rejected.update(generation["rejected"])
    listed = int(before.get("listed", "0")) + plan.listed - plan.already
    return {
        **before,
        "sources": json.dumps(list(dict.fromkeys(sources))),
        "seed": before.get("seed", str(plan.settings.seed)),
        "listed": str(listed),
        "rejected": json.dumps(dict(sorted(rejected.items()))),
        "dead": before.get("dead", "{}"),
        "generations": json.dumps([*json.loads(before.get("generations", "[]")), generation]),
        "packer": f"moco-scale {metadata.version('moco-scale')}",
    }


def _dead(
    draft: ShardSet, head: ShardSet | None, plan: Plan, store: Store, *, scratch: Path
) -> pa.Table | Iterator[pa.Table]:
    """What must not be served: objects that changed since, and bytes that are there twice."""
    if head is None:
        return find_duplicates(draft, scratch=scratch) if plan.unhashed else iter(())
    changed = [batch.column("uri") for batch in plan.superseded(store)]
    uris = pa.chunked_array(changed, pa.string())
    gone = rows_of_objects(head, uris, reason=DeadReason.SUPERSEDED)
    ids = head.first_ordinal[gone.column("shard").to_numpy()] + gone.column("position").to_numpy()
    # The earlier generations are hashed by nobody's listing here; and nothing is a duplicate of
    # what goes itself.
    return pa.concat_tables([gone, *find_duplicates(draft, scratch=scratch, without=ids)])


def _report(url: str, plan: Plan, *, resumed: int, started: float) -> PackReport:
    shard_set = ShardSet.open(url)
    entries = {entry["generation"]: entry for entry in shard_set.generations}
    nothing = {"listed": plan.listed, "packed": 0, "rejected": {}, "already": plan.already}
    entry = entries.get(plan.generation, nothing)
    return PackReport(
        url=shard_set.url,
        set_id=shard_set.set_id,
        version=shard_set.version,
        generation=plan.generation,
        listed=entry["listed"],
        packed=entry["packed"],
        rejected=entry["rejected"],
        already=entry["already"],
        dead=json.loads(shard_set.metadata["dead"]),
        shards=len(shard_set.names),
        samples=shard_set.num_samples,
        bytes=shard_set.total_bytes,
        resumed_shards=resumed,
        was_complete=True,
        seconds=time.monotonic() - started,
    )


def _probe(store: Store) -> None:
    """Write and remove a small object: a destination without rights fails before any work."""
    try:
        store.put(_PROBE, b"moco-scale", create_only=True)
    except AlreadyExistsError:
        pass  # left by a run that was killed right here
    except StoreError as err:
        raise type(err)(f"destination {err}") from err
    store.delete([_PROBE])


def _remove(store: Store, *folders: str) -> None:
    written = [page.column("path").to_pylist() for name in folders for page in store.list(name)]
    # plan.json first: without it the rest is nothing, but with it nothing may be missing.
    paths = [path for paths in written for path in paths]
    store.delete(sorted(paths, key=lambda path: not path.endswith("/plan.json")))


def _refuse_overlap(source: str, destination: str) -> None:
    """Shards inside the source would be listed by the next packing, and the other way round."""
    local = [url.removeprefix("file://") for url in (source, destination)]
    places = [url if "://" in url else os.path.realpath(url) for url in local]
    for outer, inner in (places, places[::-1]):
        if f"{inner}/".startswith(f"{outer.rstrip('/')}/"):
            raise PlanError(
                f"source {source} and destination {destination} lie in one another; "
                "give the shard set a place of its own"
            )
