"""From a raw bucket to a shard set: list, plan, pack shard by shard, make the whole visible last."""

import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata

import numpy as np
import pyarrow as pa
import xxhash

from shards.commit import MARKERS, Marker, commit_shard, committed, read_marker
from shards.engine import LocalEngine
from shards.errors import (
    AccessError,
    AlreadyExistsError,
    ChangedError,
    NotFoundError,
    PlanError,
    ShardError,
    SourceError,
)
from shards.images import EXTENSIONS, CheckedImage, ImageRules, Reason, Rejection, check_image
from shards.index import SCHEMA as INDEX_SCHEMA
from shards.index import write_index
from shards.listing import list_objects
from shards.manifest import MANIFEST, REJECTIONS, ShardSet, write_manifest, write_rejections
from shards.plan import Plan, PlanSettings, load_dropped, load_plan, make_plan, save_plan
from shards.store import Store, open_store
from shards.tar import Member, build_tar, sample_key

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """How a bucket is packed."""

    seed: int = 0
    """Seed of the global shuffle."""
    shard_bytes: int = 256 * 2**20
    """Size of a shard, in bytes; the last ones of a set may be smaller."""
    max_shard_samples: int = 16384
    """Most samples in a shard."""
    max_pixels: int = 89_478_485
    """Images of more pixels (width x height) are rejected as bombs, before any decoding."""
    min_side: int = 1
    """Images whose shorter side is below this many pixels are rejected as too small."""
    workers: int = 0
    """Processes; 0 takes the cores of this machine. Changes nothing but the time."""
    fetch_threads: int = 16
    """Objects fetched at once by each worker."""

    def __post_init__(self) -> None:
        for name in ("shard_bytes", "max_shard_samples", "max_pixels", "min_side", "fetch_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, not {self.workers}")


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
    """Shards that an earlier, interrupted run had already made."""
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
        max_pixels=config.max_pixels,
        min_side=config.min_side,
    )
    plan = load_plan(store, settings) if _has_plan_folder(store) else None
    if plan is None:
        catalog = list_objects(raw)
        _probe(store)
        plan, shards, dropped = make_plan(catalog, raw, settings)
        save_plan(store, plan, shards, dropped)
    done = committed(store)
    markers = [read_marker(store, shard) for shard in done]
    handled = plan.dropped + sum(map(_handled, markers))
    missing = sorted(set(range(plan.num_shards)) - set(done))
    run = partial(
        pack_shard,
        source=raw.url,
        destination=store.url,
        plan=plan,
        fetch_threads=config.fetch_threads,
    )
    for marker in LocalEngine(config.workers).map(run, missing):
        markers.append(marker)
        handled += _handled(marker)
        if progress is not None:
            progress(PackProgress(done=handled, total=plan.listed))
    return _finish(store, plan, markers, resumed=len(done), started=started)


def pack_shard(
    shard: int, *, source: str, destination: str, plan: Plan, fetch_threads: int
) -> Marker:
    """Fetch, check, assemble and commit one shard: what an engine runs, harmless to repeat."""
    raw, store = open_store(source), open_store(destination)
    rows = plan.rows(store, shard).to_pylist()
    rules = ImageRules(max_pixels=plan.settings.max_pixels, min_side=plan.settings.min_side)
    members: list[Member] = []
    kept: list[tuple[dict[str, object], CheckedImage]] = []
    rejected: list[tuple[str, int, str, str]] = []
    with ThreadPoolExecutor(fetch_threads) as pool:
        for row, checked in zip(
            rows, pool.map(lambda row: _fetch(raw, row, rules), rows), strict=True
        ):
            if isinstance(checked, Rejection):
                uri = raw.uri(row["path"])
                rejected.append((uri, row["size"], str(checked.reason), checked.detail))
                continue
            name = f"{sample_key(shard, len(members))}.{EXTENSIONS[checked.format]}"
            members.append(Member(name=name, data=checked.data))
            kept.append((row, checked))
    tar, offsets = build_tar(members)
    index = write_index(_index_table(raw, members, kept, offsets)) if members else b""
    return commit_shard(store, shard, tar=tar, index=index, samples=len(members), rejected=rejected)


def _fetch(raw: Store, row: dict[str, object], rules: ImageRules) -> CheckedImage | Rejection:
    path, etag = str(row["path"]), row["etag"]
    if not row["size"]:
        return Rejection(reason=Reason.EMPTY, detail="0 bytes")
    try:
        data = raw.read(path, if_match=f'"{etag}"' if etag else None)
    except NotFoundError:
        return Rejection(reason=Reason.NOT_FOUND, detail="deleted after it was listed")
    except ChangedError:
        return Rejection(reason=Reason.CHANGED, detail=f"etag was {etag} when listed")
    return check_image(data, rules)


def _index_table(
    raw: Store,
    members: Sequence[Member],
    kept: Sequence[tuple[dict[str, object], CheckedImage]],
    offsets: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> pa.Table:
    columns = {
        "offset": offsets,
        "length": [len(member.data) for member in members],
        "checksum": np.array(
            [xxhash.xxh3_64_intdigest(member.data) for member in members], dtype=np.uint64
        ),
        "width": [image.width for _, image in kept],
        "height": [image.height for _, image in kept],
        "orientation": [image.orientation for _, image in kept],
        "format": [image.format for _, image in kept],
        "key": [member.name.partition(".")[0] for member in members],
        "uri": [raw.uri(str(row["path"])) for row, _ in kept],
        "etag": [row["etag"] for row, _ in kept],
        "source_size": [row["size"] for row, _ in kept],
        "action": [image.action for _, image in kept],
    }
    return pa.table(columns, schema=INDEX_SCHEMA)


def _finish(
    store: Store, plan: Plan, markers: Sequence[Marker], *, resumed: int, started: float
) -> PackReport:
    """Check the account, then write the manifest, which is what readers trust."""
    records = [m.record for m in sorted(markers, key=lambda m: m.shard) if m.record is not None]
    dropped = load_dropped(store)
    source = plan.settings.source
    rejections = [
        (f"{source}/{row['path']}", row["size"], row["reason"], row["detail"])
        for row in dropped.to_pylist()
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
            f"{source}: not one usable image in {plan.listed} objects ({why}); nothing was written"
        )
    write_rejections(store, rejections)
    write_manifest(
        store,
        records,
        {
            "source": source,
            "seed": str(plan.settings.seed),
            "listed": str(plan.listed),
            "rejected": json.dumps(dict(sorted(counts.items()))),
            "packer": f"moco-scale {metadata.version('moco-scale')}",
        },
    )
    shard_set = ShardSet.open(store.url)
    return PackReport(
        url=store.url,
        set_id=shard_set.set_id,
        listed=plan.listed,
        packed=packed,
        rejected=dict(counts),
        shards=len(records),
        bytes=shard_set.total_bytes,
        resumed_shards=resumed,
        seconds=time.monotonic() - started,
    )


def _handled(marker: Marker) -> int:
    return len(marker.rejected) + (marker.record.samples if marker.record else 0)


def _has_plan_folder(store: Store) -> bool:
    """Whether anything was begun here; a destination that does not exist yet is no error."""
    try:
        return any(len(page) for page in store.list("plan"))
    except NotFoundError as err:
        if store.url.startswith(("/", "file:")):
            return False  # a folder that the first write makes
        raise err


def _probe(store: Store) -> None:
    """Write and remove a small object, so that a destination without rights fails before any work."""
    try:
        store.put("_probe", b"moco-scale", create_only=True)
    except AlreadyExistsError:
        pass  # left by a run that was killed right here
    except AccessError as err:
        raise AccessError(f"destination {err}") from err
    store.delete(["_probe"])


def _remove_traces(store: Store) -> None:
    for prefix in (MARKERS, "plan"):
        paths = [p for page in store.list(prefix) for p in page.column("path").to_pylist()]
        store.delete(paths)
    store.delete([REJECTIONS, MANIFEST])


def _refuse_overlap(source: str, destination: str) -> None:
    """Shards inside the source would be listed by the next packing, and the other way round."""
    for outer, inner in ((source, destination), (destination, source)):
        if f"{inner}/".startswith(f"{outer}/"):
            raise PlanError(
                f"source {source} and destination {destination} lie in one another; "
                "give the shard set a place of its own"
            )
