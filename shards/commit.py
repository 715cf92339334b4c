"""When a shard exists: tar, then index, then a create-only marker. The marker is the commit."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from shards.errors import AlreadyExistsError
from shards.manifest import ShardRecord
from shards.objects import Bytes, RejectedObject
from shards.store import Store

logger = logging.getLogger(__name__)

MARKERS = "_commit"


@dataclass(frozen=True, kw_only=True, slots=True)
class Marker:
    """What one shard number came to. No clock and no worker: a repeat writes the same bytes."""

    shard: int
    record: ShardRecord | None
    """None when not one object of the shard was usable: then there is no tar."""
    rejected: tuple[RejectedObject, ...]


def commit_shard(
    store: Store,
    shard: int,
    *,
    tar: Sequence[Bytes],
    index: bytes,
    samples: int,
    generation: int,
    rejected: Sequence[RejectedObject],
) -> Marker:
    """Make a shard exist. If another worker was first, its marker counts and is returned.

    The tar's name carries its content, so a repeat overwrites a tar with itself or writes another
    one, which nobody will name: a marker always points at one whole tar.
    """
    record = None
    if samples:
        digest = hashlib.sha256()
        for buffer in tar:
            digest.update(buffer)
        name = f"{shard:06}-{digest.hexdigest()[:8]}"
        record = ShardRecord(
            name=f"shards/{name}.tar",
            index=f"index/{name}.parquet",
            generation=generation,
            slots=samples,
            samples=samples,
            live=samples,
            bytes=sum(len(buffer) for buffer in tar),
            sha256=digest.hexdigest(),
            tombstones=None,
        )
        store.put(record.name, list(tar))
        store.put(record.index, index)
    marker = Marker(shard=shard, record=record, rejected=tuple(rejected))
    try:
        store.put(_path(shard), json.dumps(dataclasses.asdict(marker)).encode(), create_only=True)
    except AlreadyExistsError:
        found = read_marker(store, shard)
        if found != marker:  # equal: it is ours, written by a try whose answer was lost
            logger.warning(
                "%s: another worker was first; its shard counts", store.uri(_path(shard))
            )
        return found
    return marker


def committed(store: Store) -> list[int]:
    """Numbers of the shards that exist, ascending."""
    return sorted(
        int(path.rpartition("/")[2].removesuffix(".json"))
        for page in store.list(MARKERS)
        for path in page.column("path").to_pylist()
        if path.endswith(".json")
    )


def read_marker(store: Store, shard: int) -> Marker:
    """The marker of a committed shard."""
    saved = json.loads(bytes(store.read(_path(shard))))
    record = ShardRecord(**saved["record"]) if saved["record"] else None
    rejected = tuple(RejectedObject(*row) for row in saved["rejected"])
    return Marker(shard=saved["shard"], record=record, rejected=rejected)


def _path(shard: int) -> str:
    return f"{MARKERS}/{shard:06}.json"
