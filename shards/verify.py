"""Is a shard set what its manifest says: by a listing, byte by byte, or decoded as well."""

import json
import math
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from shards.commit import MARKERS, committed, read_marker
from shards.decoder import Decoder
from shards.engine import LocalEngine
from shards.errors import FormatError, NotFoundError
from shards.images import EXTENSIONS, CheckedImage, ImageRules, Rejection, check_image
from shards.index import HOT, POSITION, parquet_table, read_table
from shards.manifest import (
    MANIFEST,
    SHARD_LIST,
    VERSIONS,
    ShardRecord,
    ShardSet,
    rejections_path,
    version_path,
)
from shards.objects import Bytes, shown
from shards.scan import FoundMember, ScanError, TarScan, next_member, padding
from shards.store import Store, open_store
from shards.tar import BLOCK
from shards.tombstones import read_part

Level = Literal["list", "bytes", "decode"]
_MOST_FAULTS_OF_A_SHARD, _MOST_FAULTS = 1_000, 10_000
_MARKERS_AT_ONCE = 16
_COMPARED = [*HOT, "key", POSITION]
# Pillow opens nothing larger.
_ANY_SIZE = ImageRules(max_pixels=178_956_970, min_side=1, resize_side=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """How closely to look."""

    level: Level = "bytes"
    """list: sizes and names, without reading a shard. bytes: every byte of the shards is read once.
    decode: every image in them is decoded, too."""
    sample_frac: float = 1.0
    """Fraction of the shards that bytes and decode read; at least one is."""
    seed: int = 0
    """Which shards a fraction is."""
    workers: int = 0
    """Processes; 0 takes the cores of this machine."""

    def __post_init__(self) -> None:
        if not 0 < self.sample_frac <= 1:
            raise ValueError(f"sample_frac must be above 0 and at most 1, not {self.sample_frac}")
        if not 0 <= self.workers <= 4096:
            raise ValueError(f"workers must be from 0 to 4096, not {self.workers}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One thing that is not as it should be."""

    shard: str
    """Path of the tar, or of the other file that is wrong."""
    key: str | None
    """The sample's key."""
    byte: int | None
    """Of the tar, where it is wrong; None if it is not one place."""
    what: str

    def __str__(self) -> str:
        place = f": byte {self.byte}" if self.byte is not None else ""
        return f"{self.shard}{place}{f' (sample {self.key})' if self.key else ''}: {self.what}"


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyProgress:
    """How far a verification is."""

    done: int
    """Shards that were read."""
    total: int


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What was looked at, and every fault that was found."""

    url: str
    set_id: str
    version: int
    level: Level
    shards: int
    samples: int
    read_shards: int
    """Shards that were read, out of all."""
    read_samples: int
    """Samples in them that were compared byte by byte, tombstoned ones too."""
    read_bytes: int
    faults: tuple[Fault, ...]
    """In the order of the shards; the first 10,000, and of one shard the first 1,000."""
    num_faults: int
    """All of them."""
    orphans: tuple[str, ...]
    """Tars and indexes that no manifest and no marker names: left over, safe to delete while no
    packing runs."""
    orphan_bytes: int
    seconds: float

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found wrong."""
        return self.num_faults == 0

    def rows(self) -> Iterator[tuple[str, str]]:
        """Name and value, in the order to show them."""
        yield "shard set", self.url
        yield "id", f"{self.set_id[:12]}, version {self.version}"
        yield "level", self.level
        yield "shards", f"{self.shards:,}, {self.read_shards:,} of them read"
        read = f"{self.read_samples:,} compared, {self.read_bytes / 2**20:,.1f} MiB"
        yield "samples", f"{self.samples:,}, {read}"
        if self.orphans:
            yield "orphans", f"{len(self.orphans):,} ({self.orphan_bytes / 2**20:,.1f} MiB)"
            for path in self.orphans:
                yield "safe to delete", shown(path)
        yield "faults", f"{self.num_faults:,}" if self.num_faults else "none"
        for fault in self.faults:
            yield "fault", shown(str(fault))
        if self.num_faults > len(self.faults):
            yield "fault", f"... and {self.num_faults - len(self.faults):,} more"


def verify(
    url: str,
    *,
    level: Level,
    sample_frac: float = 1.0,
    seed: int,
    workers: int,
    progress: Callable[[VerifyProgress], None] | None = None,
) -> VerifyReport:
    """Compare a shard set with its manifest and indexes, and report everything that is wrong.

    Nothing is written. Memory: a few megabytes a worker, and at level decode its largest image.

    Args:
        level, sample_frac, seed, workers: see `VerifyConfig`.

    Raises:
        FormatError: there is no manifest that could be read.
        StoreError: the store failed; that says nothing about the set.
    """
    started = time.monotonic()
    shard_set = ShardSet.open(url)
    tars, indexes = _list_tars(shard_set), _list_indexes(shard_set)
    markers = {} if is_adopted(shard_set) else _read_markers(shard_set.store)
    found = list(_check_listing(shard_set, tars, indexes, markers))
    orphans = _orphans(shard_set, tars, indexes, markers)
    checks = []
    if level != "list":
        todo = _todo(shard_set, tars, sample_frac=sample_frac, seed=seed)
        for check in _check_all(shard_set, todo, level=level, workers=workers):
            checks.append(check)
            if progress is not None:
                progress(VerifyProgress(done=len(checks), total=len(todo)))
    checks.sort(key=lambda check: check.shard)
    faults = [*found, *(fault for check in checks for fault in check.faults)]
    return VerifyReport(
        url=shard_set.url,
        set_id=shard_set.set_id,
        version=shard_set.version,
        level=level,
        shards=len(shard_set.names),
        samples=shard_set.num_samples,
        read_shards=len(checks),
        read_samples=sum(check.samples for check in checks),
        read_bytes=sum(check.bytes for check in checks),
        faults=tuple(faults[:_MOST_FAULTS]),
        num_faults=len(found) + sum(check.num_faults for check in checks),
        orphans=tuple(path for path, _ in orphans),
        orphan_bytes=sum(size for _, size in orphans),
        seconds=time.monotonic() - started,
    )


def is_adopted(shard_set: ShardSet) -> bool:
    """Whether somebody else wrote the tars (see adopt.py): they hold more than the index names."""
    return shard_set.metadata.get("adopted") == "true"


# What a listing and the small files say.


_Listed = dict[str, tuple[int, str | None]]
"""Size and etag by path."""
_Markers = dict[int, ShardRecord | str | None]
"""What each shard number's marker commits; a string: why it cannot be read."""


def _list_tars(shard_set: ShardSet) -> _Listed:
    """What lies in the folders of the tars."""
    folders = {name.partition("/")[0] if "/" in name else "" for name in shard_set.names}
    return _list(shard_set.tars, {""} if "" in folders else folders)


def _list_indexes(shard_set: ShardSet) -> _Listed:
    return _list(
        shard_set.store, {record.index.partition("/")[0] for record in shard_set.records()}
    )


def _list(store: Store, folders: set[str]) -> _Listed:
    found: _Listed = {}
    for folder in sorted(folders):
        for page in store.list(folder):
            columns = [page.column(name).to_pylist() for name in ("path", "size", "etag")]
            found.update(
                (path, (size, etag or None)) for path, size, etag in zip(*columns, strict=True)
            )
    return found


def _check_listing(
    shard_set: ShardSet,
    tars: _Listed,
    indexes: _Listed,
    markers: _Markers,
) -> Iterator[Fault]:
    records = shard_set.records()
    yield from _check_manifest(shard_set, records)
    yield from _check_account(shard_set, records)
    if not is_adopted(shard_set):
        yield from _check_markers(markers, records)
    for number, record in enumerate(records):
        size, _ = tars.get(record.name, (None, None))
        if size is None:
            yield _fault(record.name, "missing")
        elif size != record.bytes:
            yield _fault(
                record.name,
                f"has {size:,} bytes, the manifest says {record.bytes:,}",
                byte=min(size, record.bytes),
            )
        if record.index not in indexes:
            yield _fault(record.name, f"its index {record.index} is missing")
        try:
            dead = shard_set.dead(number)
        except NotFoundError:
            yield _fault(record.name, f"its tombstones {record.tombstones} are missing")
            continue
        except (pa.ArrowException, OSError, KeyError):
            yield _fault(record.name, f"its tombstones {record.tombstones} are not readable")
            continue
        if record.samples == record.slots and record.live != record.samples - len(dead):
            yield _fault(
                record.name,
                f"{record.samples:,} samples and {len(dead):,} tombstones, "
                f"but {record.live:,} live ones in the manifest",
            )
        elif not record.live <= record.samples <= record.slots:
            yield _fault(
                record.name,
                f"{record.live:,} live of {record.samples:,} samples in {record.slots:,} slots",
            )


def _check_manifest(shard_set: ShardSet, records: Sequence[ShardRecord]) -> Iterator[Fault]:
    """It is the copy of its version; the list of shards agrees; nothing is named twice."""
    store, path = shard_set.store, version_path(shard_set.version)
    try:
        if bytes(store.read(path)) != bytes(store.read(MANIFEST)):
            yield _fault(MANIFEST, f"differs from {path}, its own version")
    except NotFoundError:
        yield _fault(MANIFEST, f"{path}, its own version, is missing")
    try:
        names = bytes(store.read(SHARD_LIST)).decode(errors="replace")
    except NotFoundError:
        yield _fault(SHARD_LIST, "missing")
    else:
        if names != "".join(f"{name}\n" for name in shard_set.names):
            yield _fault(SHARD_LIST, "does not list the shards of the manifest")
    for field in ("name", "index"):
        counts = Counter(getattr(record, field) for record in records)
        for name, count in counts.items():
            if count > 1:
                yield _fault(MANIFEST, f"names {name} {count} times")


def _check_account(shard_set: ShardSet, records: Sequence[ShardRecord]) -> Iterator[Fault]:
    """listed = packed + rejected, of every generation, and the rows are there to show it."""
    slots: Counter[int] = Counter()
    for record in records:
        slots[record.generation] += record.slots
    for entry in json.loads(shard_set.metadata["generations"]):
        number, rejected = entry["generation"], sum(entry["rejected"].values())
        known = entry["packed"] + entry["already"] + rejected
        if entry["listed"] != known:
            yield _fault(
                MANIFEST,
                f"generation {number}: {entry['listed']:,} listed, but {entry['packed']:,} packed, "
                f"{entry['already']:,} packed before and {rejected:,} rejected",
            )
        if entry["packed"] != slots.pop(number, 0):
            yield _fault(
                MANIFEST,
                f"generation {number}: {entry['packed']:,} packed, other than its shards hold",
            )
        path = rejections_path(number)
        try:
            rows = parquet_table(shard_set.store.read(path), columns=["reason"])
        except NotFoundError:
            if rejected:
                yield _fault(path, f"missing; the manifest counts {rejected:,} rejections")
            continue
        except (pa.ArrowException, OSError):
            yield _fault(path, "not readable")
            continue
        counts = {
            row["values"]: row["counts"] for row in pc.value_counts(rows["reason"]).to_pylist()
        }
        if counts != entry["rejected"]:
            yield _fault(path, "other rejections than the manifest counts")
    for number in sorted(slots):
        yield _fault(MANIFEST, f"generation {number} has shards, but no account")


def _check_markers(markers: _Markers, records: Sequence[ShardRecord]) -> Iterator[Fault]:
    """Each shard is committed as the manifest has it, unless a compaction rewrote it since."""
    uncommitted = {_shard_number(record.name): record for record in records}
    latest = max((record.generation for record in records), default=0)
    for number, committed_as in markers.items():
        path = f"{MARKERS}/{number:06}.json"
        record = uncommitted.pop(number, None)
        if isinstance(committed_as, str):
            yield _fault(path, f"not a readable marker ({committed_as})")
        elif committed_as is None:
            if record is not None:
                yield _fault(record.name, f"in the manifest, but {path} says it has no samples")
        elif record is None:
            if committed_as.generation <= latest:  # a later one is not published yet
                yield _fault(committed_as.name, f"committed by {path}, not in the manifest")
        else:
            fields = ["generation", "slots"]
            if record.samples == record.slots:
                fields += ["name", "index", "bytes", "sha256"]
            for field in fields:
                ours, theirs = getattr(record, field), getattr(committed_as, field)
                if ours != theirs:
                    yield _fault(
                        record.name, f"{field} is {ours} in the manifest, {theirs} in {path}"
                    )
    for record in uncommitted.values():
        yield _fault(record.name, "in the manifest, but no marker commits it")


def _read_markers(store: Store) -> _Markers:
    """What each marker commits, without its rejections; why not, where it cannot be read."""

    def read(number: int) -> ShardRecord | str | None:
        try:
            return read_marker(store, number).record
        except (ValueError, TypeError, KeyError) as err:
            return f"{type(err).__name__}: {err}"

    with ThreadPoolExecutor(_MARKERS_AT_ONCE) as pool:
        numbers = committed(store)
        return dict(zip(numbers, pool.map(read, numbers), strict=True))


def _shard_number(name: str) -> int:
    """Of the tar's name; -1 for a name that pack gives to none."""
    found = re.search(r"(\d+)-[0-9a-f]+\.tar$", name)
    return int(found[1]) if found else -1


def _orphans(
    shard_set: ShardSet,
    tars: _Listed,
    indexes: _Listed,
    markers: _Markers,
) -> list[tuple[str, int]]:
    """Path and bytes of what nothing names; beside somebody else's tars lies what is theirs."""
    if is_adopted(shard_set):
        return []
    named: set[str] = set()
    for record in (*shard_set.records(), *markers.values()):
        if isinstance(record, ShardRecord):
            named |= {record.name, record.index}
    for page in shard_set.store.list(VERSIONS):
        for path in page.column("path").to_pylist():
            table = parquet_table(shard_set.store.read(path), columns=["name", "index"])
            named |= {*table.column("name").to_pylist(), *table.column("index").to_pylist()}
    listed = tars | indexes
    return sorted((path, size) for path, (size, _) in listed.items() if path not in named)


def _fault(shard: str, what: str, *, key: str | None = None, byte: int | None = None) -> Fault:
    return Fault(shard=shard, key=key, byte=byte, what=what)


# What the bytes say.


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    shard: int
    record: ShardRecord
    size: int
    """As listed."""
    etag: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Check:
    shard: int
    samples: int
    bytes: int
    faults: tuple[Fault, ...]
    num_faults: int


def _todo(
    shard_set: ShardSet,
    tars: _Listed,
    *,
    sample_frac: float,
    seed: int,
) -> list[_Task]:
    """The shards to read: those with the smallest seeded hashes of their names."""
    names, records = shard_set.names, shard_set.records()
    ranked = sorted(
        range(len(names)), key=lambda n: (xxhash.xxh3_64_intdigest(names[n].encode(), seed), n)
    )
    chosen = sorted(ranked[: math.ceil(sample_frac * len(ranked))])
    return [
        _Task(shard=n, record=records[n], size=tars[names[n]][0], etag=tars[names[n]][1])
        for n in chosen
        if names[n] in tars
    ]


def _check_all(
    shard_set: ShardSet, todo: Sequence[_Task], *, level: Level, workers: int
) -> Iterator[_Check]:
    engine, adopted = LocalEngine(workers), is_adopted(shard_set)
    if engine.workers > 1:
        work = partial(
            _check_in_worker,
            url=shard_set.store.url,
            tars=shard_set.tars.url,
            level=level,
            is_adopted=adopted,
        )
        yield from engine.map(work, todo)
        return
    with Decoder() as decoder:
        here = partial(
            _check_shard,
            store=shard_set.store,
            tars=shard_set.tars,
            decoder=decoder if level == "decode" else None,
            is_adopted=adopted,
        )
        yield from engine.map(here, todo)


def _check_shard(
    task: _Task, *, store: Store, tars: Store, decoder: Decoder | None, is_adopted: bool
) -> _Check:
    with TarScan(tars, task.record.name, size=task.size, etag=task.etag) as scan:
        return _ShardCheck(scan, store, task, decoder, is_adopted=is_adopted).run()


def _check_in_worker(task: _Task, *, url: str, tars: str, level: Level, is_adopted: bool) -> _Check:
    store, raw, decoder = _workplace(url, tars)
    return _check_shard(
        task,
        store=store,
        tars=raw,
        decoder=decoder if level == "decode" else None,
        is_adopted=is_adopted,
    )


@lru_cache(maxsize=1)
def _workplace(url: str, tars: str) -> tuple[Store, Store, Decoder]:
    """What a worker opens once and uses for all its shards."""
    return open_store(url), open_store(tars), Decoder()


class _ShardCheck:
    """One tar against its index, both from front to back.

    Where a header is damaged the walk goes on at the next sample that the index names, so that one
    fault hides no other.
    """

    def __init__(
        self,
        scan: TarScan,
        store: Store,
        task: _Task,
        decoder: Decoder | None,
        *,
        is_adopted: bool,
    ) -> None:
        self._scan = scan
        self._store = store
        self._task = task
        self._record = task.record
        self._decoder = decoder
        self._is_adopted = is_adopted
        self._rest: deque[dict[str, Any]] = deque()
        """Rows of the index that were not met yet."""
        self._faults: list[Fault] = []
        self._num_faults = 0
        self._samples = 0
        self._knows_name = True
        """Whether the walk came to the next header through all in front of it: a long name is."""

    def run(self) -> _Check:
        if self._read_rows():
            self._walk()
        digest = self._scan.sha256()
        if digest != self._record.sha256:
            self._add(f"its sha256 is {digest}, the manifest says {self._record.sha256}")
        return _Check(
            shard=self._task.shard,
            samples=self._samples,
            bytes=self._task.size,
            faults=tuple(self._faults),
            num_faults=self._num_faults,
        )

    def _add(self, what: str, *, key: str | None = None, byte: int | None = None) -> None:
        self._num_faults += 1
        if len(self._faults) < _MOST_FAULTS_OF_A_SHARD:
            self._faults.append(_fault(self._record.name, what, key=key, byte=byte))

    def _read_rows(self) -> bool:
        """Take in the index; False if there is none to compare with, which is a fault by then."""
        path = self._record.index
        try:
            table = read_table(self._store.read(path), where=path, columns=_COMPARED)
        except NotFoundError:
            return False  # the listing has said so
        except FormatError as err:
            self._add(str(err))
            return False
        if len(table) != self._record.samples:
            self._add(
                f"its index has {len(table):,} rows, the manifest says {self._record.samples:,}"
            )
        self._check_positions(table)
        offsets = table.column("offset").to_numpy()
        if (np.diff(offsets) <= 0).any():
            self._add("its index is not in the order of the tar")
        for row in table.sort_by("offset").to_pylist():
            if row["offset"] % BLOCK or row["offset"] < BLOCK or row["length"] < 0:
                what = "no member can begin at this byte, which the index names"
            elif row["offset"] + row["length"] > self._task.size:
                what = "lies beyond the end of the tar"
            else:
                self._rest.append(row)
                continue
            self._add(what, key=row["key"], byte=row["offset"])
        return True

    def _check_positions(self, table: pa.Table) -> None:
        """Positions are unique and inside the slots; as many are alive as the manifest says."""
        positions = (
            table.column(POSITION).to_numpy()
            if POSITION in table.column_names
            else np.arange(len(table))
        )
        if (np.diff(positions) <= 0).any() or (positions >= self._record.slots).any():
            self._add("positions in its index are not ascending, or beyond its slots")
        if self._record.tombstones is None:
            dead = np.zeros(0, dtype=np.int64)
        else:
            try:
                dead = read_part(self._store.read(self._record.tombstones))[self._record.name]
            except (NotFoundError, pa.ArrowException, OSError, KeyError):
                return  # the listing has said so
        live = len(positions) - int(np.isin(positions, dead).sum())
        if live != self._record.live:
            self._add(f"{live:,} live rows in its index, the manifest says {self._record.live:,}")

    def _walk(self) -> None:
        scan = self._scan
        while True:
            try:
                member = next_member(scan)
            except ScanError as err:
                self._add(err.what, key=self._key_here(), byte=err.byte)
                if self._go_on():
                    continue
                return
            if member is None:
                if not self._rest:
                    break
                self._add(
                    "zeros in place of a header", key=self._key_here(), byte=scan.position - BLOCK
                )
                if self._go_on():
                    continue
                return
            self._meet(member)
        self._check_end()

    def _meet(self, member: FoundMember) -> None:
        """Compare a member with its row. What the index does not name is passed over."""
        while self._rest and self._rest[0]["offset"] < member.offset:
            self._lost(self._rest.popleft())
        scan, end = self._scan, member.offset + member.size
        if not self._rest or self._rest[0]["offset"] != member.offset:
            if not self._is_adopted:
                self._add(f"member {member.name!r} is not in its index", byte=member.start)
            scan.skip_to(end + padding(member.size))
            self._knows_name = True
            return
        row = self._rest.popleft()
        if self._is_adopted:
            is_named = not self._knows_name or member.name.startswith(row["key"] + ".")
        else:
            is_named = member.name == f"{row['key']}.{EXTENSIONS.get(row['format'])}"
        self._knows_name = True
        header = member.offset - BLOCK
        if not is_named:
            self._add(f"the header names {member.name!r}", key=row["key"], byte=header)
        if not member.is_file:
            self._add("the header is not a file's", key=row["key"], byte=header)
        fits = member.size == row["length"]
        if not fits:
            self._add(
                f"the header says {member.size:,} bytes, the index {row['length']:,}",
                key=row["key"],
                byte=header,
            )
        self._check_data(row, may_decode=fits)
        if not fits and not self._go_on():
            scan.skip_to(end + padding(member.size))

    def _check_data(self, row: dict[str, Any], *, may_decode: bool) -> None:
        """The bytes from here on are this sample's; their padding is taken, too."""
        data: Bytes = b""
        digest = xxhash.xxh3_64()
        if self._decoder is not None and may_decode:
            data = self._scan.read(row["length"])
            digest.update(data)
        else:
            for part in self._scan.take(row["length"]):
                digest.update(part)
        self._samples += 1
        if digest.intdigest() != row["checksum"]:
            self._add("its bytes are not those of the index", key=row["key"], byte=row["offset"])
        elif self._decoder is not None and may_decode:
            self._check_decoded(row, check_image(data, _ANY_SIZE, self._decoder))
        padded = bytes(self._scan.read(padding(row["length"])))
        if not self._is_adopted and padded.strip(b"\0"):
            end = row["offset"] + row["length"]
            self._add("the padding behind it is not zero", key=row["key"], byte=end)

    def _check_decoded(self, row: dict[str, Any], image: CheckedImage | Rejection) -> None:
        if isinstance(image, Rejection):
            what = f"does not decode: {image.reason} ({image.detail})"
        elif image.action != "keep":
            what = f"training cannot decode it as it is ({image.action})"
        else:
            facts = ("format", "width", "height", "orientation")
            wrong = [name for name in facts if getattr(image, name) != row[name]]
            if not wrong:
                return
            what = ", ".join(
                f"{name} is {getattr(image, name)}, the index says {row[name]}" for name in wrong
            )
        self._add(what, key=row["key"], byte=row["offset"])

    def _key_here(self) -> str | None:
        """Of the sample whose data begins right behind what was read."""
        for row in self._rest:
            if row["offset"] >= self._scan.position:
                return row["key"] if row["offset"] == self._scan.position else None
        return None

    def _go_on(self) -> bool:
        """Continue at the next sample of the index; its own header may be the damaged one."""
        scan = self._scan
        while self._rest and self._rest[0]["offset"] < scan.position:
            self._lost(self._rest.popleft())
        if not self._rest:
            return False
        if self._rest[0]["offset"] == scan.position:
            self._check_data(self._rest.popleft(), may_decode=False)
        else:
            scan.skip_to(self._rest[0]["offset"] - BLOCK)
            self._knows_name = False
        return True

    def _lost(self, row: dict[str, Any]) -> None:
        self._add("no member begins here", key=row["key"], byte=row["offset"])

    def _check_end(self) -> None:
        """Behind the first zero block: one more, and nothing else."""
        scan = self._scan
        if not self._is_adopted and scan.size - scan.position != BLOCK:
            left = scan.size - scan.position
            self._add(f"ends with {left:,} bytes behind a zero block, not 512", byte=scan.position)
        start = scan.position
        for part in scan.take(scan.size - scan.position):
            if found := bytes(part).lstrip(b"\0"):
                what = "bytes behind the tar's end mark"
                self._add(what, byte=start + len(part) - len(found))
                return
            start += len(part)
