"""Which object goes into which shard: deduplicated, shuffled, cut by size, before any work.

A saved plan is a few Parquet parts, in which a row group is a shard, lists of what was left out and
of what is superseded, and plan.json, which is written last, once, and names the others. Their names
hold the start of a digest of their bytes, so that two planners never write into each other's files.
"""

import io
import json
import os
import tempfile
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from shards.catalog import CATALOG, Catalog
from shards.errors import AlreadyExistsError, NotFoundError, PlanError
from shards.index import parquet_table
from shards.shuffle import LEFT_OUT, SUPERSEDED, Shuffled, contents_of, plan_schema, shuffle
from shards.store import Store
from shards.tar import padded_bytes

FOLDER = "plan"
ROWS = plan_schema(CATALOG)
"""Columns of a shard's rows; the user's own follow."""
# Row groups of one file must stay under 1,000: a worker reads the whole footer, though of the rest
# only its own shard's rows.
SHARDS_PER_PART = 64
_ROWS_PER_LIST = 2**20
_GUESSED_BYTES = 2**17  # of an object whose size no listing tells: a photo of the web
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSettings:
    """What a plan depends on beside the listing. Another value is another shard set."""

    sources: tuple[str, ...]
    """What was listed; kept in order, without slashes at their ends and without repeats."""
    seed: int
    shard_bytes: int
    max_shard_samples: int
    max_object_bytes: int
    max_pixels: int
    min_side: int
    resize_side: int
    """Shorter side that images are resized to, in pixels; 0 keeps them."""
    columns: tuple[str, ...] | None
    """Which of the user's columns travel; None for all."""

    def __post_init__(self) -> None:
        plain = {source.rstrip("/") or source for source in self.sources}
        object.__setattr__(self, "sources", tuple(sorted(plain)))


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanFile:
    """One Parquet file of a plan."""

    path: str
    footer: int
    """Where its footer begins, in bytes."""
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A saved plan: shard first_shard + i is row group i, counted over the parts."""

    settings: PlanSettings
    plan_id: str
    """Digest of its files."""
    generation: int
    first_shard: int
    num_shards: int
    listed: int
    """listed = planned + dropped + already."""
    dropped: int
    """Rejected unseen."""
    already: int
    """Left out because earlier generations packed or rejected them."""
    known_bytes: int
    """Sum of the planned objects' sizes, as far as they are known."""
    unknown_sizes: int
    """Planned objects whose size is not known."""
    unhashed: int
    """Planned objects whose listing does not tell their MD5, and so not all duplicates."""
    parts: tuple[PlanFile, ...]
    dropped_files: tuple[PlanFile, ...]
    superseded_files: tuple[PlanFile, ...]

    @property
    def planned(self) -> int:
        """Objects to fetch."""
        return self.listed - self.dropped - self.already

    def rows(self, store: Store, number: int) -> pa.Table:
        """The objects of one shard, in order: root, path, member, start, size, etag, user columns.

        Two range reads, of the rows and of the part's footer, which is kept for other shards.

        Args:
            number: in range(first_shard, first_shard + num_shards).
        """
        assert 0 <= number - self.first_shard < self.num_shards, "a shard of this generation"
        part, group = divmod(number - self.first_shard, SHARDS_PER_PART)
        file = self.parts[part]
        footer = _footer(store, file)  # type: ignore[arg-type]  # stores hash by identity
        columns = footer.row_group(group)
        chunks = [columns.column(n) for n in range(columns.num_columns)]
        start = min(
            min(c.dictionary_page_offset or c.data_page_offset, c.data_page_offset) for c in chunks
        )
        end = start + sum(c.total_compressed_size for c in chunks)
        (data,) = store.read_ranges(file.path, [start], [end])
        # Offsets in a footer count from the file's beginning.
        whole = pa.BufferReader(bytes(start) + bytes(data))
        with pq.ParquetFile(whole, metadata=footer, pre_buffer=False) as parquet:
            return parquet.read_row_group(group, use_threads=False)

    def left_out(self, store: Store) -> Iterator[pa.RecordBatch]:
        """The objects that need no fetching to be rejected: uri, size, etag, reason, detail."""
        return _batches(store, self.dropped_files)

    def superseded(self, store: Store) -> Iterator[pa.RecordBatch]:
        """uri of what earlier generations packed or rejected, and is now in another state."""
        return _batches(store, self.superseded_files)


def make_plan(
    catalog: Catalog,
    settings: PlanSettings,
    *,
    store: Store,
    scratch: Path,
    generation: int = 0,
    first_shard: int = 0,
    known: Iterable[pa.RecordBatch] = (),
    _partitions: int | None = None,
    _threads: int = _THREADS,
) -> Plan:
    """Plan the objects of a catalog and save the plan in `store`, in bounded memory.

    The order is by xxh3(seed, bucket, key): a global shuffle that needs nothing but the names. The
    plan does not depend on the order of the catalog's rows.

    Args:
        scratch: a folder on local disk, for about as many bytes as the catalog has.
        known: uri, etag and size in bytes of what earlier generations packed or rejected for good,
            in the order of generations. An object that is still like that (equal ETag; where one
            is not known, equal size) is left out; another is planned again and superseded.

    Raises:
        PlanError: another packing began here meanwhile, with other settings; or the disk is full.
    """
    writer = _PlanWriter(store, settings, plan_schema(catalog.schema), generation, _threads)
    try:
        with tempfile.TemporaryDirectory(prefix="plan-", dir=scratch) as folder, writer:
            for piece in shuffle(
                catalog,
                seed=settings.seed,
                max_object_bytes=settings.max_object_bytes,
                known=known,
                scratch=Path(folder),
                threads=_threads,
                partitions=_partitions,
            ):
                writer.add(piece)
            plan = writer.finish(first_shard)
    except OSError as err:
        raise PlanError(
            f"{scratch}: {err.strerror or err}; planning needs about as much room as the catalog "
            "for temporary files: make some, or set TMPDIR to another disk"
        ) from err
    assert plan.listed == catalog.listed, "every listed row has one place"
    saved = json.dumps(asdict(plan), indent=1).encode()
    try:
        store.put(_plan_path(generation), saved, create_only=True)
    except AlreadyExistsError:  # by another packing, or by a retry of this very write
        found = load_plan(store, settings, generation)
        assert found is not None, "it exists"
        return found
    return plan


def load_plan(
    store: Store, settings: PlanSettings, generation: int, *, free: Collection[str] = ()
) -> Plan | None:
    """The plan of a generation that was saved here; None if there is none.

    Args:
        free: settings that may differ.

    Raises:
        PlanError: it was made with other settings or from other sources.
    """
    try:
        saved = json.loads(bytes(store.read(_plan_path(generation))))
    except NotFoundError:
        return None
    was, now = saved.pop("settings"), json.loads(json.dumps(asdict(settings)))
    for name in now:
        if was.get(name) != now[name] and name not in free:
            raise PlanError(
                f"{store.url} was begun with {name} {_shown(was.get(name))}, not "
                f"{_shown(now[name])}; give the same settings to continue, or another destination"
            )
    for name in ("parts", "dropped_files", "superseded_files"):
        saved[name] = tuple(PlanFile(**file) for file in saved[name])
    return Plan(settings=settings, **saved)


def cut(padded: NDArray[np.int64], *, shard_bytes: int, max_samples: int) -> list[int]:
    """Where each shard stops, greedily by bytes and by count; what is left may go on.

    Args:
        padded: what each row takes in a tar, in bytes.
    """
    totals = np.cumsum(padded)
    stops: list[int] = []
    start = before = 0
    while True:
        by_bytes = int(np.searchsorted(totals, before + shard_bytes, side="right"))
        stop = max(start + 1, min(by_bytes, start + max_samples))
        if stop >= len(padded):
            return stops
        stops.append(stop)
        start, before = stop, int(totals[stop - 1])


class _PlanWriter:
    """Cuts shuffled rows into shards and saves them, encoding in threads."""

    def __init__(
        self,
        store: Store,
        settings: PlanSettings,
        schema: pa.Schema,
        generation: int,
        threads: int,
    ) -> None:
        self._settings = settings
        self._generation = generation
        folder = plan_folder(generation)
        self._pool = ThreadPoolExecutor(threads)
        self._parts = _Files(store, f"{folder}/part", self._pool, 2 * threads)
        self._lists = [
            _List(schema, _Files(store, f"{folder}/{name}", self._pool, 2 * threads))
            for name, schema in (("dropped", LEFT_OUT), ("superseded", SUPERSEDED))
        ]
        self._rest = schema.empty_table()
        self._shards: list[pa.Table] = []
        self._num_shards = self._planned = self._dropped = self._already = 0
        self._known_bytes = self._unknown_sizes = self._unhashed = 0

    def __enter__(self) -> "_PlanWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, piece: Shuffled) -> None:
        """Take the next rows; cut off the shards that are full."""
        self._planned += len(piece.kept)
        self._dropped += len(piece.dropped)
        self._already += piece.already
        self._known_bytes += pc.sum(piece.kept["size"]).as_py() or 0
        self._unknown_sizes += piece.kept["size"].null_count
        self._unhashed += int((contents_of(piece.kept) == 0).sum())
        for saved, rows in zip(self._lists, (piece.dropped, piece.superseded), strict=True):
            saved.add(rows)
        rows = pa.concat_tables([self._rest, piece.kept])
        start = 0
        for stop in cut(
            self._padded(rows),
            shard_bytes=self._settings.shard_bytes,
            max_samples=self._settings.max_shard_samples,
        ):
            self._add_shard(rows.slice(start, stop - start))
            start = stop
        self._rest = rows.slice(start)

    def finish(self, first_shard: int) -> Plan:
        """Save what is left, wait for all writes, and return the plan, which is not saved yet."""
        if len(self._rest):
            self._add_shard(self._rest)
        self._flush()
        dropped, superseded = (saved.finish() for saved in self._lists)
        parts = self._parts.finish()
        digest = xxhash.xxh3_128()
        for file, whole in (*parts, *dropped, *superseded):
            digest.update(f"{file.path} {whole}\n".encode())
        return Plan(
            settings=self._settings,
            plan_id=digest.hexdigest(),
            generation=self._generation,
            first_shard=first_shard,
            num_shards=self._num_shards,
            listed=self._planned + self._dropped + self._already,
            dropped=self._dropped,
            already=self._already,
            known_bytes=self._known_bytes,
            unknown_sizes=self._unknown_sizes,
            unhashed=self._unhashed,
            parts=tuple(file for file, _ in parts),
            dropped_files=tuple(file for file, _ in dropped),
            superseded_files=tuple(file for file, _ in superseded),
        )

    def _padded(self, rows: pa.Table) -> NDArray[np.int64]:
        sizes = pc.fill_null(rows["size"], _GUESSED_BYTES).to_numpy()
        if side := self._settings.resize_side:
            sizes = np.minimum(sizes, side * side)  # a byte a pixel is more than a JPEG takes
        padded: NDArray[np.int64] = padded_bytes(sizes)
        return padded

    def _add_shard(self, rows: pa.Table) -> None:
        self._num_shards += 1
        self._shards.append(rows)
        if len(self._shards) == SHARDS_PER_PART:
            self._flush()

    def _flush(self) -> None:
        if self._shards:
            self._parts.write(self._shards)
            self._shards = []


class _List:
    """Rows gathered into files of a fixed number of rows."""

    def __init__(self, schema: pa.Schema, files: "_Files") -> None:
        self._rows = schema.empty_table()
        self._files = files

    def add(self, rows: pa.Table) -> None:
        self._rows = pa.concat_tables([self._rows, rows])
        while len(self._rows) >= _ROWS_PER_LIST:
            self._files.write([self._rows.slice(0, _ROWS_PER_LIST)])
            self._rows = self._rows.slice(_ROWS_PER_LIST)

    def finish(self) -> list[tuple[PlanFile, str]]:
        if len(self._rows):
            self._files.write([self._rows])
        return self._files.finish()


class _Files:
    """Numbered Parquet files, encoded and put by threads, a bounded number at a time."""

    def __init__(self, store: Store, name: str, pool: ThreadPoolExecutor, most: int) -> None:
        self._store = store
        self._name = name
        self._pool = pool
        self._most = most
        self._running: deque[Future[tuple[PlanFile, str]]] = deque()
        self._done: list[tuple[PlanFile, str]] = []

    def write(self, row_groups: Sequence[pa.Table]) -> None:
        number = len(self._done) + len(self._running)
        self._running.append(self._pool.submit(self._write, number, row_groups))
        if len(self._running) == self._most:
            self._done.append(self._running.popleft().result())

    def finish(self) -> list[tuple[PlanFile, str]]:
        """All files, each with the digest of its bytes."""
        return self._done + [future.result() for future in self._running]

    def _write(self, number: int, row_groups: Sequence[pa.Table]) -> tuple[PlanFile, str]:
        data = _parquet(row_groups)
        digest = xxhash.xxh3_128_hexdigest(data)
        path = f"{self._name}-{number:05}-{digest[:8]}.parquet"
        self._store.put(path, data)
        footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
        return PlanFile(path=path, footer=footer, bytes=len(data)), digest


def saved_generations(store: Store) -> list[int]:
    """Generations whose plan was saved here, ascending.

    Raises:
        NotFoundError: no such bucket or folder.
    """
    paths = [path for page in store.list(FOLDER) for path in page.column("path").to_pylist()]
    plans = [path.split("/") for path in paths if path.endswith("/plan.json")]
    return sorted(int(folder.removeprefix("g")) for _, folder, _ in plans)


def superseded_in(store: Store, generation: int) -> Iterator[pa.RecordBatch]:
    """uri of what a saved plan of this generation found in another state, whatever its settings."""
    saved = json.loads(bytes(store.read(_plan_path(generation))))
    yield from _batches(store, [PlanFile(**file) for file in saved["superseded_files"]])


def plan_folder(generation: int) -> str:
    """Where the files of a generation's plan are."""
    return f"{FOLDER}/g{generation:04}"


def _plan_path(generation: int) -> str:
    return f"{plan_folder(generation)}/plan.json"


def _parquet(row_groups: Sequence[pa.Table]) -> bytes:
    """A Parquet file: same rows, however they lie in memory, and pyarrow version, same bytes."""
    written = io.BytesIO()
    schema = row_groups[0].schema
    unlike = {"path", "uri", "etag", "size", "start"}  # a dictionary of those is only time lost
    repeated = [name for name in schema.names if name not in unlike]
    with pq.ParquetWriter(
        written, schema, compression="zstd", use_dictionary=repeated, write_statistics=False
    ) as writer:
        for rows in row_groups:
            # Chunks would move the page boundaries.
            writer.write_table(rows.combine_chunks(), row_group_size=len(rows))
    return written.getvalue()


def _batches(store: Store, files: Iterable[PlanFile]) -> Iterator[pa.RecordBatch]:
    for file in files:
        yield from parquet_table(store.read(file.path)).to_batches()


@lru_cache(maxsize=64)
def _footer(store: Store, file: PlanFile) -> Any:
    (data,) = store.read_ranges(file.path, [file.footer], [file.bytes])
    return pq.read_metadata(pa.BufferReader(bytes(data)))


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else repr(value)
