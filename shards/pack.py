"""From a raw bucket to a shard set: list, plan, pack shard by shard, publish the whole at last."""

import json
import logging
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from shards.commit import MARKERS, Marker, commit_shard, committed, read_marker
from shards.decoder import Decoder
from shards.engine import LocalEngine
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
    REJECTIONS,
    SHARD_LIST,
    ShardSet,
    write_manifest,
    write_rejections,
)
from shards.objects import Bytes
from shards.plan import FOLDER as PLAN_FOLDER
from shards.plan import Plan, PlanSettings, load_plan, make_plan
from shards.store import Store, open_store
from shards.tar import Member, build_tar, sample_key

logger = logging.getLogger(__name__)

_PROBE = "_probe"
# So many refusals of so many objects are no chance, even in a bucket of which little may be read.
_REFUSALS_ENOUGH = 200
_MARKERS_AT_ONCE = 16
_MOST_PIXELS = 178_956_970  # Pillow opens nothing larger


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
    workers: int = 0
    """Processes; 0 takes the cores of this machine. Changes nothing but the time."""
    fetch_threads: int = 16
    """Objects fetched at once by each worker."""

    def __post_init__(self) -> None:
        # The largest: what a seed can be; one PUT; a key's width; Pillow's own limit.
        ranges = {
            "seed": (0, 2**63 - 1),
            "shard_bytes": (1, 4 * 2**30),
            "max_shard_samples": (1, 16**6),
            "max_object_bytes": (1, 4 * 2**30),
            "max_pixels": (1, _MOST_PIXELS),
            "min_side": (1, 2**31 - 1),
            "workers": (0, 4096),
            "fetch_threads": (1, 1024),
        }
        for name, (low, high) in ranges.items():
            if not low <= (value := getattr(self, name)) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, not {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackProgress:
    """How far a packing is."""

    done: int
    """Objects that were packed or rejected."""
    total: int
    """Objects listed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackReport:
    """What a packing came to: listed = packed + all rejected, always."""

    url: str
    set_id: str
    listed: int
    packed: int
    rejected: dict[str, int]
    """Objects left out, by reason."""
    shards: int
    bytes: int
    resumed_shards: int
    """Shard numbers that an earlier run had already dealt with."""
    was_complete: bool
    """Whether an earlier run had finished the set, so that this one wrote nothing."""
    seconds: float


def pack(
    source: str,
    destination: str,
    config: PackConfig,
    *,
    progress: Callable[[PackProgress], None] | None = None,
) -> PackReport:
    """Build a shard set; running it again continues, and does nothing when the set is complete.

    Raises:
        SourceError: no object, or not one usable image; nothing is left behind.
        PlanError: the destination was begun with other settings, or overlaps the source.
        StoreError: the store refused or failed; the same command continues after what is committed.
    """
    started = time.monotonic()
    raw, store = open_store(source), open_store(destination)
    _refuse_overlap(raw.url, store.url)
    settings = PlanSettings(
        source=raw.url,
        seed=config.seed,
        shard_bytes=config.shard_bytes,
        max_shard_samples=config.max_shard_samples,
        max_object_bytes=config.max_object_bytes,
        max_pixels=config.max_pixels,
        min_side=config.min_side,
    )
    plan = _begin(raw, store, settings)
    done = committed(store)
    if len(done) == plan.num_shards and _has_manifest(store):
        return _report(store.url, resumed=len(done), was_complete=True, started=started)
    with ThreadPoolExecutor(_MARKERS_AT_ONCE) as pool:
        markers = list(pool.map(partial(read_marker, store), done))
    handled = plan.dropped + sum(map(_handled, markers))
    for marker in _pack_missing(
        raw, store, plan, sorted({*range(plan.num_shards)} - {*done}), config
    ):
        markers.append(marker)
        handled += _handled(marker)
        if progress is not None:
            progress(PackProgress(done=handled, total=plan.listed))
    _finish(raw, store, plan, markers)
    return _report(store.url, resumed=len(done), was_complete=False, started=started)


def pack_shard(
    shard: int,
    plan: Plan,
    *,
    raw: Store,
    store: Store,
    decoder: Decoder,
    fetch_threads: int,
) -> Marker:
    """Fetch, check, assemble and commit one shard: what an engine runs, harmless to repeat.

    Holds one shard in memory. Fetches run ahead in threads; images are checked here, one by one.
    """
    rows = plan.rows(store, shard).to_pylist()
    rules = ImageRules(max_pixels=plan.settings.max_pixels, min_side=plan.settings.min_side)
    members: list[Member] = []
    kept: list[tuple[dict[str, Any], CheckedImage]] = []
    rejected: list[tuple[str, int, str, str]] = []
    for row, found in _fetch_all(raw, rows, threads=fetch_threads):
        checked = found if isinstance(found, Rejection) else check_image(found, rules, decoder)
        if isinstance(checked, Rejection):
            rejected.append((raw.uri(row["path"]), row["size"], checked.reason, checked.detail))
            continue
        name = f"{sample_key(shard, len(members))}.{EXTENSIONS[checked.format]}"
        members.append(Member(name=name, data=checked.data))
        kept.append((row, checked))
    tar, index = _assemble(raw, members, kept) if members else ([], b"")
    return commit_shard(store, shard, tar=tar, index=index, samples=len(members), rejected=rejected)


def _begin(raw: Store, store: Store, settings: PlanSettings) -> Plan:
    """The plan that was begun here, or a new one of what the source holds now."""
    plan = load_plan(store, settings) if _has_plan(store) else None
    if plan is not None:
        return plan
    if _has_manifest(store):
        raise PlanError(
            f"{store.url} holds a shard set already, and no plan to continue; "
            "give another destination"
        )
    with tempfile.TemporaryDirectory(prefix="moco-scale-") as folder:
        catalog = Path(folder, "catalog.parquet")
        list_objects(raw, catalog)
        _probe(store)
        return make_plan(catalog, raw, settings, store=store)


def _pack_missing(
    raw: Store, store: Store, plan: Plan, missing: Sequence[int], config: PackConfig
) -> Iterator[Marker]:
    engine = LocalEngine(config.workers)
    if engine.workers > 1:
        work = partial(
            _pack_in_worker,
            plan=plan,
            source=raw.url,
            destination=store.url,
            fetch_threads=config.fetch_threads,
        )
        yield from engine.map(work, missing)
        return
    with Decoder() as decoder:
        here = partial(
            pack_shard,
            plan=plan,
            raw=raw,
            store=store,
            decoder=decoder,
            fetch_threads=config.fetch_threads,
        )
        yield from engine.map(here, missing)


def _pack_in_worker(
    shard: int, *, plan: Plan, source: str, destination: str, fetch_threads: int
) -> Marker:
    raw, store, decoder = _workplace(source, destination)
    return pack_shard(
        shard, plan, raw=raw, store=store, decoder=decoder, fetch_threads=fetch_threads
    )


@lru_cache(maxsize=1)
def _workplace(source: str, destination: str) -> tuple[Store, Store, Decoder]:
    """What a worker process opens once and uses for all its shards."""
    return open_store(source), open_store(destination), Decoder()


def _fetch_all(
    raw: Store, rows: Sequence[dict[str, Any]], *, threads: int
) -> Iterator[tuple[dict[str, Any], Bytes | Rejection]]:
    """Each row with its bytes, or with what is permanently wrong, in order.

    A refused object is forbidden if others can be read, before and after: otherwise it is the
    credentials, which is no property of the object, and the run stops.

    Raises:
        StoreError: anything that may pass; the shard is not committed.
    """
    refused: list[tuple[dict[str, Any], AccessError]] = []
    readable: str | None = None
    with ThreadPoolExecutor(threads) as pool:
        fetches: list[Future[Bytes | Rejection] | None]
        fetches = [pool.submit(_fetch, raw, row) for row in rows]
        try:
            for number, row in enumerate(rows):
                fetch = fetches[number]
                fetches[number] = None  # frees the bytes, once they are used
                assert fetch is not None, "each is taken once"
                try:
                    found = fetch.result()
                except AccessError as err:
                    refused.append((row, err))
                    if readable is None and len(refused) == _REFUSALS_ENOUGH:
                        raise
                    continue
                if not isinstance(found, Rejection):
                    readable = row["path"]
                yield row, found
        finally:
            for waiting in filter(None, fetches):
                waiting.cancel()
    if not refused:
        return
    if readable is None:
        raise refused[0][1]
    for row, _ in refused:
        try:
            yield row, _fetch(raw, row)
        except AccessError as err:
            raw.head(readable)
            yield row, Rejection(reason=Reason.FORBIDDEN, detail=str(err))


def _fetch(raw: Store, row: dict[str, Any]) -> Bytes | Rejection:
    try:
        return raw.read(row["path"], if_match=row["etag"])
    except NotFoundError:
        return Rejection(reason=Reason.NOT_FOUND, detail="deleted after it was listed")
    except ChangedError:
        return Rejection(reason=Reason.CHANGED, detail=f"its etag was {row['etag']} when listed")


def _assemble(
    raw: Store,
    members: Sequence[Member],
    kept: Sequence[tuple[dict[str, Any], CheckedImage]],
) -> tuple[list[Bytes], bytes]:
    """The tar's buffers, and its index."""
    tar, offsets = build_tar(members)
    is_folder = "://" not in raw.url
    columns = {
        "offset": offsets,
        "length": [len(member.data) for member in members],
        "checksum": [xxhash.xxh3_64_intdigest(member.data) for member in members],
        "width": [image.width for _, image in kept],
        "height": [image.height for _, image in kept],
        "format": [image.format for _, image in kept],
        "orientation": [image.orientation for _, image in kept],
        "key": [member.name.partition(".")[0] for member in members],
        "uri": [raw.uri(row["path"]) for row, _ in kept],
        "etag": [None if is_folder else row["etag"] for row, _ in kept],
        "source_size": [row["size"] for row, _ in kept],
        "flags": [int(image.flags) for _, image in kept],
        "action": [image.action for _, image in kept],
    }
    return tar, write_index(pa.table(columns, schema=INDEX_SCHEMA))


def _finish(raw: Store, store: Store, plan: Plan, markers: Sequence[Marker]) -> None:
    """Check the account, then write the manifest, which is what readers trust."""
    records = [m.record for m in sorted(markers, key=lambda m: m.shard) if m.record is not None]
    rejections = [
        (raw.uri(row["path"]), row["size"], row["reason"], row["detail"])
        for row in plan.left_out(store).to_pylist()
    ]
    rejections += [row for marker in markers for row in marker.rejected]
    counts = Counter(reason for _, _, reason, _ in rejections)
    packed = sum(record.samples for record in records)
    if packed + len(rejections) != plan.listed:
        raise ShardError(
            f"{store.url}: listed {plan.listed}, packed {packed}, rejected {len(rejections)}; "
            "this is a fault of this program: please report it"
        )
    if not records:
        _remove_traces(store)
        why = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
        raise SourceError(
            f"{raw.url}: not one usable image in {plan.listed} objects ({why}); nothing was written"
        )
    write_rejections(store, rejections)
    write_manifest(
        store,
        records,
        {
            "source": raw.url,
            "seed": str(plan.settings.seed),
            "listed": str(plan.listed),
            "rejected": json.dumps(dict(sorted(counts.items()))),
            "packer": f"moco-scale {metadata.version('moco-scale')}",
        },
    )


def _report(url: str, *, resumed: int, was_complete: bool, started: float) -> PackReport:
    shard_set = ShardSet.open(url)
    return PackReport(
        url=shard_set.url,
        set_id=shard_set.set_id,
        listed=int(shard_set.metadata["listed"]),
        packed=shard_set.num_samples,
        rejected=json.loads(shard_set.metadata["rejected"]),
        shards=len(shard_set.names),
        bytes=shard_set.total_bytes,
        resumed_shards=resumed,
        was_complete=was_complete,
        seconds=time.monotonic() - started,
    )


def _handled(marker: Marker) -> int:
    return len(marker.rejected) + (marker.record.samples if marker.record else 0)


def _has_plan(store: Store) -> bool:
    """Whether anything was begun here. A folder that does not exist yet is made by the first write.

    Raises:
        NotFoundError: no such bucket.
    """
    try:
        return any(len(page) for page in store.list(PLAN_FOLDER))
    except NotFoundError as err:
        if "://" in store.url or Path(store.url).exists():
            raise type(err)(f"destination {err}") from err
        return False
    except StoreError as err:
        raise type(err)(f"destination {err}") from err


def _has_manifest(store: Store) -> bool:
    try:
        store.head(MANIFEST)
    except NotFoundError:
        return False
    except StoreError as err:
        raise type(err)(f"destination {err}") from err
    return True


def _probe(store: Store) -> None:
    """Write and remove a small object: a destination without rights fails before any work."""
    try:
        store.put(_PROBE, b"moco-scale", create_only=True)
    except AlreadyExistsError:
        pass  # left by a run that was killed right here
    except StoreError as err:
        raise type(err)(f"destination {err}") from err
    store.delete([_PROBE])


def _remove_traces(store: Store) -> None:
    for prefix in (MARKERS, PLAN_FOLDER):
        paths = [p for page in store.list(prefix) for p in page.column("path").to_pylist()]
        store.delete(paths)
    store.delete([REJECTIONS, SHARD_LIST, MANIFEST])


def _refuse_overlap(source: str, destination: str) -> None:
    """Shards inside the source would be listed by the next packing, and the other way round."""
    places = [url if "://" in url else os.path.realpath(url) for url in (source, destination)]
    for outer, inner in (places, places[::-1]):
        if f"{inner}/".startswith(f"{outer}/"):
            raise PlanError(
                f"source {source} and destination {destination} lie in one another; "
                "give the shard set a place of its own"
            )
