"""Tars that somebody else wrote become a shard set: an index for each, and a manifest.

No tar is changed or copied. A sample is what webdataset calls one: the members that share a name up
to its first dot. Its image is what the index points at; its short texts become columns of it.
"""

import dataclasses
import io
import json
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from braceexpand import braceexpand

from shards.decoder import Decoder
from shards.engine import LocalEngine
from shards.errors import FormatError, NotFoundError, PlanError, SourceError
from shards.images import CheckedImage, ImageRules, Reason, Rejection, check_image, sniff
from shards.index import SCHEMA as INDEX_SCHEMA
from shards.index import parquet_table, write_index
from shards.manifest import (
    MANIFEST,
    REJECTION_SCHEMA,
    ShardRecord,
    ShardSet,
    publish,
    rejections_path,
)
from shards.objects import Bytes, RejectedObject
from shards.pack import PackConfig
from shards.scan import FoundMember, ScanError, TarScan, next_member, padding
from shards.store import Store, open_store

logger = logging.getLogger(__name__)

STABLE = "stable"
"""Folder that `export.finalize_stable_names` copies tars to."""
_INDEXES = "index"
_FACTS = b"adopted_tar"
_RULES = 1  # of what is a sample and what is usable; another number and tars are read again
_IMAGES = {
    *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "tif", "tiff", "jp2", "j2k", "ppm"),
    *("pgm", "pbm", "pnm", "gif", "avif", "heic", "heif", "ico"),
}
_TEXTS = {"txt", "json", "cls"}
_MOST_TEXT_BYTES = 64 * 2**10
_SNIFFED_BYTES = 512
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")
_INDEXES_AT_ONCE = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptConfig:
    """How tars are adopted."""

    overwrite: bool = False
    """Make a new version of a set that was adopted here before, where tars have come, gone or
    changed since. Sample ids change with them."""
    workers: int = 0
    """Processes; 0 takes the cores of this machine."""

    def __post_init__(self) -> None:
        if not 0 <= self.workers <= 4096:
            raise ValueError(f"workers must be from 0 to 4096, not {self.workers}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptProgress:
    """How far an adoption is."""

    done: int
    """Tars that have an index."""
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AdoptReport:
    """What an adoption came to: listed = samples + all rejected, always."""

    url: str
    set_id: str
    version: int
    tars: int
    empty_tars: int
    """Tars without a usable sample: the set leaves them out."""
    listed: int
    """Samples in the tars, usable or not."""
    samples: int
    rejected: dict[str, int]
    """Samples left out, by reason. Their bytes stay in the tars."""
    ignored_members: int
    """Folders, links, hidden files, names without a dot: no reader of WebDataset sees them."""
    columns: tuple[str, ...]
    """Texts that travel in the index, by extension."""
    bytes: int
    resumed_tars: int
    """Tars that were indexed before, and not read again."""
    was_complete: bool
    """Whether the set was there already, so that nothing was written."""
    seconds: float

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value, in the order to show them."""
        yield "shard set", self.url
        yield "id", f"{self.set_id[:12]}, version {self.version}"
        yield "tars", f"{self.tars:,}, {self.resumed_tars:,} of them indexed before"
        if self.empty_tars:
            yield "without samples", f"{self.empty_tars:,} tars"
        counts = Counter(self.rejected).most_common()
        rejected = ", ".join(f"{reason} {count:,}" for reason, count in counts)
        yield "samples", f"{self.listed:,} listed = {self.samples:,} adopted + the rejected"
        yield "rejected", rejected or "nothing"
        if Reason.UNSUPPORTED_FORMAT in self.rejected:
            yield "", "to keep images of unsupported formats: 'moco-scale pack' rewrites them"
        if self.ignored_members:
            yield "ignored", f"{self.ignored_members:,} members that are no part of a sample"
        yield "columns", ", ".join(self.columns) or "none"
        yield "size", f"{self.bytes / 2**20:,.1f} MiB"


def adopt(
    source: str,
    destination: str | None = None,
    *,
    overwrite: bool = False,
    workers: int,
    progress: Callable[[AdoptProgress], None] | None = None,
) -> AdoptReport:
    """Index tars and make them a shard set; run it again to continue.

    Each tar is read once, in pieces. Memory of a worker: a few megabytes, the largest image of up
    to 256 MiB, and the texts of one tar.

    Args:
        source: a folder or prefix, all tars below it; one tar; or a pattern of tars with `{0..9}`,
            `{a,b}`, `*`, `?` and `[...]`, of which each but the first two stays within a folder.
        destination: where the indexes and the manifest go, for tars that lie where nobody may
            write; they must stay there. None: beside the tars, in the folder where the pattern
            begins, so that the set can be copied as a whole.
        overwrite, workers: see `AdoptConfig`.

    Raises:
        SourceError: no tar, a tar of the pattern is missing, or not one usable image.
        FormatError: a tar that cannot be right; named with byte and member. Nothing is published.
        PlanError: another set is there, or the tars are not those it was made of.
        StoreError: the store failed; the same command continues.
    """
    started = time.monotonic()
    raw, tars = _find_tars(source)
    store = raw if destination is None else open_store(destination)
    done = _indexed(store, tars)
    earlier = _earlier(raw, store)
    if earlier is not None:
        _, facts = _assemble(tars, done)
        changed = _changes(earlier, facts) if len(done) == len(tars) else "are new or changed"
        if changed is None:
            return _report(earlier, facts, resumed=len(done), complete=True, started=started)
        if not overwrite:
            raise PlanError(
                f"{store.url}: some of the tars {changed} since they were adopted; "
                "give --overwrite to make a new version of the set"
            )
    resumed = len(done)
    todo = [tar for tar in tars if tar.path not in done]
    for found in _read_all(raw, store, todo, workers=workers):
        done[found.path] = found
        if progress is not None:
            progress(AdoptProgress(done=len(done), total=len(tars)))
    records, facts = _assemble(tars, done)
    _publish(raw, store, source, records, facts, earlier)
    return _report(
        ShardSet.open(store.url), facts, resumed=resumed, complete=False, started=started
    )


# Which tars.


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tar:
    path: str
    size: int
    etag: str | None

    @property
    def index(self) -> str:
        return f"{_INDEXES}/{self.path.removesuffix('.tar')}.parquet"


def _find_tars(source: str) -> tuple[Store, list[_Tar]]:
    """The folder that the set is made in, and the tars of it, by path."""
    scheme, separator, rest = source.rpartition("://")
    wanted: set[str] | None = None
    root = rest.rstrip("/")
    pattern = None if not separator and Path(rest).is_dir() else re.search(r"[{*?\[]", rest)
    if pattern is not None or root.endswith(".tar"):
        stop = pattern.start() if pattern is not None else len(root)
        cut = rest.rfind("/", 0, stop)
        if separator and cut < 0:
            raise SourceError(f"{source}: a pattern must begin behind the bucket's name")
        root, below = (rest[:cut] or "/", rest[cut + 1 :]) if cut >= 0 else (".", rest)
        wanted = set(braceexpand(below, escape=False))
    store = open_store(f"{scheme}{separator}{root}")
    tars = []
    for page in store.list():
        columns = [page.column(name).to_pylist() for name in ("path", "size", "etag")]
        for path, size, etag in zip(*columns, strict=True):
            if wanted is not None:
                if not _matches(path, wanted):
                    continue
            elif path.startswith(f"{STABLE}/"):  # copies that finalize made
                continue
            if path.endswith(_COMPRESSED):
                raise FormatError(f"{store.uri(path)}: a compressed tar; unpack it first")
            if path.endswith(".tar"):
                tars.append(_Tar(path=path, size=size, etag=etag or None))
            elif wanted is not None:
                raise SourceError(f"{store.uri(path)}: no .tar; give a pattern of tars only")
    found = {tar.path for tar in tars}
    missing = sorted(name for name in wanted or () if name not in found and not _has_glob(name))
    if missing:
        raise SourceError(
            f"{store.uri(missing[0])}: not there, nor {len(missing) - 1} others of {source}; "
            "give a pattern of what is there"
        )
    if not tars:
        raise SourceError(f"{source}: no tar there; check the address")
    return store, sorted(tars, key=lambda tar: tar.path)


def _has_glob(name: str) -> bool:
    return re.search(r"[*?\[]", name) is not None


def _matches(path: str, wanted: set[str]) -> bool:
    """Whether a name is wanted, or a glob of as many folders fits."""
    if path in wanted:
        return True
    place = PurePosixPath("/", path)
    return any(_has_glob(name) and place.match(f"/{name}") for name in wanted)


# What an adopted tar holds.


@dataclass(frozen=True, kw_only=True, slots=True)
class _Facts:
    """Of one tar; kept in the metadata of its index, which a second run reads instead."""

    path: str
    size: int
    etag: str | None
    sha256: str
    listed: int
    samples: int
    ignored: int
    columns: tuple[str, ...]
    rejected: tuple[RejectedObject, ...]


def _indexed(store: Store, tars: Sequence[_Tar]) -> dict[str, _Facts]:
    """Facts of the tars that have an index, by path, if they have not changed since."""
    try:
        there = {path for page in store.list(_INDEXES) for path in page.column("path").to_pylist()}
    except NotFoundError:
        if "://" in store.url or Path(store.url).exists():
            raise
        return {}  # a folder that the first write makes

    def read(tar: _Tar) -> _Facts | None:
        data = store.read(tar.index)
        try:
            known = pq.read_metadata(pa.BufferReader(data)).metadata or {}
            saved = json.loads(known[_FACTS])
        except (pa.ArrowException, OSError, KeyError, ValueError):
            return None
        if saved.pop("rules") != _RULES or (saved["size"], saved["etag"]) != (tar.size, tar.etag):
            return None
        rejected = tuple(RejectedObject(*row) for row in saved.pop("rejected"))
        return _Facts(**saved | {"columns": tuple(saved["columns"])}, rejected=rejected)

    with ThreadPoolExecutor(_INDEXES_AT_ONCE) as pool:
        found = pool.map(read, [tar for tar in tars if tar.index in there])
        return {facts.path: facts for facts in found if facts is not None}


def _read_all(raw: Store, store: Store, tars: Sequence[_Tar], *, workers: int) -> Iterator[_Facts]:
    engine = LocalEngine(workers)
    if engine.workers > 1:
        work = partial(_read_in_worker, source=raw.url, destination=store.url)
        yield from engine.map(work, tars)
        return
    with Decoder() as decoder:
        yield from engine.map(partial(_read_tar, raw=raw, store=store, decoder=decoder), tars)


def _read_in_worker(tar: _Tar, *, source: str, destination: str) -> _Facts:
    raw, store, decoder = _workplace(source, destination)
    return _read_tar(tar, raw=raw, store=store, decoder=decoder)


@lru_cache(maxsize=1)
def _workplace(source: str, destination: str) -> tuple[Store, Store, Decoder]:
    """What a worker opens once and uses for all its tars."""
    return open_store(source), open_store(destination), Decoder()


def _read_tar(tar: _Tar, *, raw: Store, store: Store, decoder: Decoder) -> _Facts:
    """Read one tar and write its index."""
    with TarScan(raw, tar.path, size=tar.size, etag=tar.etag) as scan:
        reader = _Reader(scan, raw, tar, decoder)
        reader.run()
        digest = scan.sha256()
    columns = sorted({name for texts in reader.texts for name in texts})
    facts = _Facts(
        path=tar.path,
        size=tar.size,
        etag=tar.etag,
        sha256=digest,
        listed=len(reader.rows) + len(reader.rejected),
        samples=len(reader.rows),
        ignored=reader.ignored,
        columns=tuple(columns),
        rejected=tuple(reader.rejected),
    )
    table = pa.Table.from_pylist(reader.rows, schema=INDEX_SCHEMA)
    for name in columns:
        texts = pa.array([texts.get(name) for texts in reader.texts], pa.string())
        table = table.append_column(name, texts)
    known = json.dumps(dataclasses.asdict(facts) | {"rules": _RULES})
    store.put(tar.index, write_index(table.replace_schema_metadata({_FACTS: known})))
    return facts


@dataclass(slots=True)
class _Sample:
    """The members of one key, as far as they were met."""

    key: str
    first: FoundMember
    extensions: set[str] = field(default_factory=set)
    texts: dict[str, str] = field(default_factory=dict)
    image: FoundMember | None = None
    by_name: bool = False
    """Whether the image is one by its extension, not by its bytes alone."""
    checked: CheckedImage | Rejection | None = None
    content: bytes = b""
    checksum: int = 0


class _Reader:
    """The samples of one tar, from front to back."""

    def __init__(self, scan: TarScan, store: Store, tar: _Tar, decoder: Decoder) -> None:
        limits = PackConfig()
        self.rows: list[dict[str, Any]] = []
        self.texts: list[dict[str, str]] = []
        """By extension, for each row."""
        self.rejected: list[RejectedObject] = []
        self.ignored = 0
        self._scan = scan
        self._decoder = decoder
        self._uri = store.uri(tar.path)
        self._etag = tar.etag if "://" in store.url else None
        self._rules = ImageRules(
            max_pixels=limits.max_pixels, min_side=limits.min_side, resize_side=0
        )
        self._most_bytes = limits.max_object_bytes
        self._seen: set[str] = set()

    def run(self) -> None:
        """Raises:
        ScanError: the tar cannot be right.
        """
        scan = self._scan
        sample: _Sample | None = None
        while (member := next_member(scan)) is not None:
            end = member.offset + member.size
            parts = split_name(member.name) if member.is_file else None
            if parts is None:
                self.ignored += 1
            else:
                key, extension = parts
                if sample is None or sample.key != key:
                    self._finish(sample)
                    sample = self._begin(key, member)
                self._add(sample, extension, member)
            scan.skip_to(end + padding(member.size))
        self._finish(sample)
        start = scan.position
        for part in scan.take(scan.size - scan.position):
            if bytes(part).strip(b"\0"):
                what = "bytes behind its end mark, which no reader sees; write the tar again"
                raise ScanError(scan.where, what, byte=start)

    def _begin(self, key: str, member: FoundMember) -> _Sample:
        if key in self._seen:
            self._refuse(
                f"the key {key!r} again: two samples of one name, or its members lie apart", member
            )
        self._seen.add(key)
        return _Sample(key=key, first=member)

    def _add(self, sample: _Sample, extension: str, member: FoundMember) -> None:
        if re.search(r"[\x00-\x1f\x7f]", member.name):
            self._refuse("a name with a control character", member)
        if extension in sample.extensions:
            self._refuse(f"a second .{extension} of the key {sample.key!r}", member)
        sample.extensions.add(extension)
        kind = extension.rpartition(".")[2]
        if kind in _IMAGES:
            if sample.by_name:
                self._refuse_two(sample, member)
            self._check(sample, member, b"", by_name=True)
        elif kind in _TEXTS:
            if member.size <= _MOST_TEXT_BYTES:
                text = bytes(self._scan.read(member.size))
                sample.texts[extension] = text.decode(errors="backslashreplace")
        elif not sample.by_name:
            head = bytes(self._scan.read(min(member.size, _SNIFFED_BYTES)))
            if sniff(head) is not None:
                if sample.image is not None:
                    self._refuse_two(sample, member)
                self._check(sample, member, head, by_name=False)

    def _check(self, sample: _Sample, member: FoundMember, head: bytes, *, by_name: bool) -> None:
        """Take in the sample's image, of which `head` was read already."""
        sample.image, sample.by_name = member, by_name
        if member.size > self._most_bytes:
            detail = f"{member.size:,} bytes, limit {self._most_bytes:,}"
            sample.checked = Rejection(reason=Reason.TOO_LARGE, detail=detail)
            return
        rest = self._scan.read(member.size - len(head))
        data: Bytes = head + bytes(rest) if head else rest
        sample.checked = check_image(data, self._rules, self._decoder)
        sample.content = xxhash.xxh3_128_digest(data)
        sample.checksum = xxhash.xxh3_64_intdigest(data)

    def _finish(self, sample: _Sample | None) -> None:
        if sample is None:
            return
        checked, image = sample.checked, sample.image
        if checked is None or image is None:
            what = f"no image among its members ({', '.join(sorted(sample.extensions))})"
            checked = Rejection(reason=Reason.UNKNOWN_MAGIC, detail=what)
        elif isinstance(checked, CheckedImage) and checked.action != "keep":
            what = f"training needs it rewritten ({checked.action}): 'moco-scale pack' does that"
            checked = Rejection(reason=Reason.UNSUPPORTED_FORMAT, detail=what)
        member = image or sample.first
        if isinstance(checked, Rejection):
            self.rejected.append(
                RejectedObject(
                    uri=f"{self._uri}#{member.name}",
                    size=member.size,
                    etag=self._etag,
                    reason=str(checked.reason),
                    detail=checked.detail,
                )
            )
            return
        row = {
            "offset": member.offset,
            "length": member.size,
            "checksum": sample.checksum,
            "width": checked.width,
            "height": checked.height,
            "format": checked.format,
            "orientation": checked.orientation,
            "key": sample.key,
            "uri": f"{self._uri}#{member.name}",
            "etag": self._etag,
            "source_size": member.size,
            "flags": int(checked.flags),
            "action": checked.action,
            "content": sample.content,
            "phash": None,
        }
        self.rows.append(row)
        self.texts.append(sample.texts)

    def _refuse_two(self, sample: _Sample, member: FoundMember) -> None:
        assert sample.image is not None, "there are two"
        self._refuse(
            f"a second image of the key {sample.key!r}, beside {sample.image.name!r} (a key ends "
            "at the first dot of a name); pack the images instead, or leave one",
            member,
        )

    def _refuse(self, what: str, member: FoundMember) -> None:
        raise ScanError(self._scan.where, what, byte=member.start, member=member.name)


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension, as webdataset has them; None for what is no part of a sample.

    The key ends at the first dot of the last part of the path; the extension is in lower case.
    """
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    if not stem or not dot or (not folder and name.startswith("__") and name.endswith("__")):
        return None
    return f"{folder}{slash}{stem}", extension.lower()


def tar_samples(index: Bytes) -> int | None:
    """Samples of an adopted tar, by its index: the rejected ones, too. None for a packed one."""
    known = (pq.read_metadata(pa.BufferReader(index)).metadata or {}).get(_FACTS)
    return int(json.loads(known)["listed"]) if known is not None else None


# The set.


def _earlier(raw: Store, store: Store) -> ShardSet | None:
    """The set that is there already, if it was adopted from the same place."""
    try:
        store.head(MANIFEST)
    except NotFoundError:
        return None
    found = ShardSet.open(store.url)
    if found.metadata.get("adopted") != "true":
        raise PlanError(f"{store.url} holds a set that was packed; it has its indexes already")
    if found.tars.url != raw.url:
        raise PlanError(
            f"{store.url} holds a set of tars in {found.tars.url}, not in {raw.url}; "
            "give another destination"
        )
    return found


def _assemble(
    tars: Sequence[_Tar], done: dict[str, _Facts]
) -> tuple[list[ShardRecord], list[_Facts]]:
    """Rows of the manifest, and the facts of all tars, in order."""
    known = [(tar, done[tar.path]) for tar in tars if tar.path in done]
    records = [
        ShardRecord(
            name=tar.path,
            index=tar.index,
            generation=0,
            slots=facts.samples,
            samples=facts.samples,
            live=facts.samples,
            bytes=facts.size,
            sha256=facts.sha256,
            tombstones=None,
        )
        for tar, facts in known
        if facts.samples
    ]
    return records, [facts for _, facts in known]


def _changes(earlier: ShardSet, facts: Sequence[_Facts]) -> str | None:
    ours = {(record.name, record.sha256, record.slots) for record in earlier.records()}
    theirs = {(one.path, one.sha256, one.samples) for one in facts if one.samples}
    if theirs - ours:
        return "are new or changed"
    return "are gone" if ours - theirs else None


def _publish(
    raw: Store,
    store: Store,
    source: str,
    records: Sequence[ShardRecord],
    facts: Sequence[_Facts],
    earlier: ShardSet | None,
) -> None:
    rejected = sorted(row for one in facts for row in one.rejected)
    counts = dict(sorted(Counter(row.reason for row in rejected).items()))
    listed, samples = sum(one.listed for one in facts), sum(one.samples for one in facts)
    if not records:
        store.delete([_Tar(path=one.path, size=0, etag=None).index for one in facts])
        why = ", ".join(f"{reason} {count}" for reason, count in counts.items())
        raise SourceError(
            f"{source}: not one usable image in {listed} samples ({why or 'none'}); "
            "nothing was written"
        )
    records, dead = _keep_tombstones(store, records, earlier)
    written = io.BytesIO()
    table = pa.Table.from_pylist([row._asdict() for row in rejected], schema=REJECTION_SCHEMA)
    pq.write_table(table, written, compression="zstd")
    store.put(rejections_path(0), written.getvalue())
    generation = {
        "generation": 0, "listed": listed, "packed": samples, "already": 0, "rejected": counts
    }  # fmt: skip
    publish(
        store,
        records,
        {
            "sources": json.dumps([source if "://" in source else os.path.abspath(source)]),  # noqa: PTH100  # resolve() would follow links
            "seed": "0",
            "listed": str(listed),
            "rejected": json.dumps(counts),
            "dead": json.dumps(dead),
            "generations": json.dumps([generation]),
            "packer": f"moco-scale {metadata.version('moco-scale')}",
            "adopted": "true",
        }
        | ({"tars": raw.url} if raw.url != store.url else {}),
        version=earlier.version + 1 if earlier is not None else 1,
    )


def _keep_tombstones(
    store: Store, records: Sequence[ShardRecord], earlier: ShardSet | None
) -> tuple[list[ShardRecord], dict[str, int]]:
    """What was dead in a tar stays dead while the tar is the same."""
    if earlier is None:
        return list(records), {}
    before = {record.name: record for record in earlier.records()}
    kept: list[ShardRecord] = []
    dead: Counter[str] = Counter()
    for record in records:
        known = before.get(record.name)
        if known is None or known.tombstones is None:
            kept.append(record)
        elif known.sha256 != record.sha256:
            logger.warning(
                "%s: has changed, so its %d tombstones are gone",
                store.uri(record.name),
                known.samples - known.live,
            )
            kept.append(record)
        else:
            kept.append(known)
            part = parquet_table(store.read(known.tombstones))
            rows = zip(
                *(part.column(name).to_pylist() for name in ("shard", "reason")), strict=True
            )
            dead.update(reason for shard, reason in rows if shard == record.name)
    return kept, dict(sorted(dead.items()))


def _report(
    shard_set: ShardSet, facts: Sequence[_Facts], *, resumed: int, complete: bool, started: float
) -> AdoptReport:
    return AdoptReport(
        url=shard_set.url,
        set_id=shard_set.set_id,
        version=shard_set.version,
        tars=len(facts),
        empty_tars=sum(not one.samples for one in facts),
        listed=sum(one.listed for one in facts),
        samples=sum(one.samples for one in facts),
        rejected=json.loads(shard_set.metadata["rejected"]),
        ignored_members=sum(one.ignored for one in facts),
        columns=tuple(sorted({name for one in facts for name in one.columns})),
        bytes=shard_set.total_bytes,
        resumed_tars=resumed,
        was_complete=complete,
        seconds=time.monotonic() - started,
    )
