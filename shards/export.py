"""A shard set for other readers: DALI's .idx files, the wids JSON, and names that braces expand."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shards.adopt import STABLE, tar_samples
from shards.errors import FormatError, PlanError
from shards.images import EXTENSIONS
from shards.index import live_rows
from shards.manifest import ShardRecord, ShardSet
from shards.verify import is_adopted

IDX, WIDS = "idx", "wids.json"
_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class IdxReport:
    """Index files that were written for DALI's readers.webdataset."""

    url: str
    folder: str
    files: int
    samples: int
    """Live ones: DALI sees no others through these files."""
    left_out: tuple[str, ...]
    """Tars without a live sample: DALI takes no empty index, so leave them out of its paths."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value, in the order to show them."""
        yield "index files", f"{self.files:,} in {self.folder}"
        yield "samples", f"{self.samples:,}, without the tombstoned"
        for name in self.left_out:
            yield "no sample", f"{name}: leave it out of DALI's paths"


@dataclass(frozen=True, kw_only=True, slots=True)
class WidsReport:
    """The JSON index that was written for wids."""

    uri: str
    shards: int
    samples: int
    """All in the tars: wids reads tombstoned samples, too; `compact` takes them out for good."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value, in the order to show them."""
        yield "wids index", self.uri
        yield "shards", f"{self.shards:,}"
        yield "samples", f"{self.samples:,}, with any tombstoned"


@dataclass(frozen=True, kw_only=True, slots=True)
class StableReport:
    """Copies of the tars under names that a brace pattern expands to."""

    pattern: str
    """For webdataset and the like: s3://bucket/set/stable/{000000..000185}.tar."""
    shards: int
    copied: int
    """The others were there, by their ETag."""

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value, in the order to show them."""
        yield "pattern", self.pattern
        yield "shards", f"{self.shards:,}, {self.copied:,} of them copied now"


def write_idx(url: str) -> IdxReport:
    """Write an index file of DALI's format v1.2 for each tar: idx/NAME.idx, NAME as in index/.

    It lists the live samples' images only. Where a member's name has a space, which that format
    cannot say, the file is of v1.1, which has no names. Index files of earlier versions go.

    Raises:
        FormatError: an extension with a space: DALI cannot be told of such a member.
    """
    shard_set = ShardSet.open(url)
    store, records = shard_set.store, shard_set.records()

    def write(shard: int) -> int:
        text, samples = _idx(shard_set, shard, records[shard])
        if samples:
            store.put(_idx_path(records[shard]), text.encode())
        return samples

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        samples = list(pool.map(write, range(len(records))))
    written = {_idx_path(one) for one, n in zip(records, samples, strict=True) if n}
    _delete_others(shard_set, IDX, written)
    return IdxReport(
        url=shard_set.url,
        folder=store.uri(IDX),
        files=len(written),
        samples=sum(samples),
        left_out=tuple(one.name for one, n in zip(records, samples, strict=True) if not n),
    )


def write_wids(url: str) -> WidsReport:
    """Write wids.json, the index of wids (wids-shard-index-v1), at the root of the set.

    It has whole addresses: wids resolves no relative ones of the file it is given (wids_specs.py).
    Its samples are those in the tar, which is how wids counts them, tombstoned ones included.
    """
    shard_set = ShardSet.open(url)
    store, records = shard_set.store, shard_set.records()

    def samples(record: ShardRecord) -> int:
        if not is_adopted(shard_set):
            return record.samples
        return tar_samples(store.read(record.index)) or record.samples

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        counts = list(pool.map(samples, records))
    known = {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": shard_set.set_id,
        "shardlist": [
            {"url": shard_set.tars.uri(record.name), "nsamples": count, "filesize": record.bytes}
            for record, count in zip(records, counts, strict=True)
        ],
    }
    store.put(WIDS, json.dumps(known, indent=1).encode())
    return WidsReport(uri=store.uri(WIDS), shards=len(records), samples=sum(counts))


def finalize_stable_names(
    url: str, *, progress: Callable[[int, int], None] | None = None
) -> StableReport:
    """Copy the tars to stable/000000.tar and on, numbered without a hole, inside the store.

    Whole tars: a tombstoned sample is in the copy, until `compact` takes it out. Run it again after
    the set has changed; copies that are no longer part of it are deleted.

    Args:
        progress: is told how many tars are done, of how many.

    Raises:
        PlanError: the tars were adopted to stay in another place.
    """
    shard_set = ShardSet.open(url)
    store = shard_set.store
    if shard_set.tars is not store:
        raise PlanError(
            f"{url}: its tars stay in {shard_set.tars.url}, where nothing is written; copy them, "
            "and adopt the copies"
        )
    names = [record.name for record in shard_set.records() if record.samples]
    width = max(6, len(str(len(names) - 1)))
    targets = [f"{STABLE}/{number:0{width}}.tar" for number in range(len(names))]
    _delete_others(shard_set, STABLE, set(targets))
    etags = {
        path: etag
        for folder in sorted({STABLE, *(name.rpartition("/")[0] for name in names)})
        for page in store.list(folder)
        for path, etag in zip(
            page.column("path").to_pylist(), page.column("etag").to_pylist(), strict=True
        )
    }
    todo = [
        (name, target)
        for name, target in zip(names, targets, strict=True)
        if target not in etags or not etags[target] or etags[target] != etags.get(name)
    ]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done, _ in enumerate(pool.map(lambda pair: store.copy(*pair), todo), start=1):
            if progress is not None:
                progress(len(names) - len(todo) + done, len(names))
    numbers = f"{0:0{width}}"
    if len(names) > 1:
        numbers = f"{{{numbers}..{len(names) - 1:0{width}}}}"
    return StableReport(
        pattern=store.uri(f"{STABLE}/{numbers}.tar"), shards=len(names), copied=len(todo)
    )


def _idx(shard_set: ShardSet, shard: int, record: ShardRecord) -> tuple[str, int]:
    """The text of an index file, and its samples."""
    where = shard_set.store.uri(record.index)
    rows = live_rows(
        shard_set.store.read(record.index),
        where=where,
        columns=["offset", "length", "format", "key", "uri"],
        dead=shard_set.dead(shard),
    )
    lines, named = [], []
    for row in rows.to_pylist():
        name = f"{row['key']}.{EXTENSIONS.get(row['format'])}"
        if is_adopted(shard_set):  # the name in the tar is in the uri, behind the tar's own
            name = row["uri"][row["uri"].rindex(f"#{row['key']}.") + 1 :]
        extension = name[len(row["key"]) + 1 :].lower()
        if extension.split() != [extension]:
            raise FormatError(f"{where}: member {name!r} has a space in its extension; rename it")
        lines.append(f"{extension} {row['offset']} {row['length']}")
        named.append(f"{lines[-1]} {name}")
    version = "v1.2"
    if any(len(line.split()) != 4 for line in named):
        version, named = "v1.1", lines
    return "\n".join([f"{version} {len(rows)}", *named, ""]), len(rows)


def _idx_path(record: ShardRecord) -> str:
    return f"{IDX}/{record.index.partition('/')[2].removesuffix('.parquet')}.idx"


def _delete_others(shard_set: ShardSet, folder: str, keep: set[str]) -> None:
    """What an earlier version of the set left in a folder of exports."""
    store = shard_set.store
    found = [path for page in store.list(folder) for path in page.column("path").to_pylist()]
    store.delete([path for path in found if path not in keep])
