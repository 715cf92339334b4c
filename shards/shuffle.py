"""The rows of a catalog in shuffled order, without duplicates and without holding them in memory.

    catalog -> scatter   rows by the high bits of the shuffle key; of each whose ETag tells its
                         content, eight bytes by the high bits of the content
            -> repeats   contents that occur more than once, sent to where their rows are
            -> sort      each partition: known rows leave, the unusable are marked; of rows whose
                         content repeats, the first of each content is sent on
            -> keepers   the first row of each content, sent to where its duplicates are
            -> finish    each partition, in order: kept and dropped rows

Only rows whose content repeats are ever compared by name, and of these one a content and partition:
one placeholder under millions of names costs no more than any other object.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from itertools import repeat
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from shards.catalog import CATALOG, Catalog
from shards.images import Reason
from shards.partitions import Partitions

Item = TypeVar("Item")
Result = TypeVar("Result")

LEFT_OUT = pa.schema(
    [
        ("uri", pa.string()),
        ("size", pa.int64()),
        ("etag", pa.string()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
SUPERSEDED = pa.schema([("uri", pa.string())])
KNOWN = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
_NAME = ("root", "path", "member")
_ROWS_AT_ONCE = 2**19
_BYTES_AT_ONCE = 2**26
_PART_BITS = 16
_CONTENT_BITS = 64 - _PART_BITS
_HEX = np.zeros(256, dtype=bool)
_HEX[list(b"0123456789abcdef")] = True


class _Verdict(IntEnum):
    """What the second pass says of a row."""

    KEEP = 0
    REPEATS = 1
    """Kept if it is the first of its content."""
    EMPTY = 2
    FOLDER = 3
    TOO_LARGE = 4
    LISTED_TWICE = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Shuffled:
    """A piece of the shuffled rows."""

    kept: pa.Table
    """In order, with the columns of `plan_schema`."""
    dropped: pa.Table
    """With the columns LEFT_OUT, in the same order."""
    superseded: pa.Table
    """uri of rows whose object was packed or rejected before, in another state."""
    already: int
    """Rows that were left out because they are known."""


def plan_schema(catalog: pa.Schema) -> pa.Schema:
    """Columns of a plan: the catalog's without `modified`, the user's own in the order of names.

    Of a dictionary the values: their numbers would depend on what else is in a file.
    """
    own = ["root", "path", "member", "start", "size", "etag"]
    users = sorted(set(catalog.names) - {*own, "modified"})
    kinds = [(name, catalog.field(name).type) for name in (*own, *users)]
    plain = [(n, k.value_type if pa.types.is_dictionary(k) else k) for n, k in kinds]
    return pa.schema(plain)


def uris(rows: pa.Table) -> pa.ChunkedArray:
    """The full address of each row: root/path, and #member for an object inside a tar."""
    # Where all that it joins is null, "skip" leaves out the row (pyarrow 26): the address never is.
    address = pc.binary_join_element_wise(rows["root"], rows["path"], "/")
    return pc.binary_join_element_wise(address, rows["member"], "#", null_handling="skip")


def shuffle_keys(rows: pa.Table, seed: int) -> NDArray[np.uint64]:
    """xxh3-64 over bucket and key, the same whichever prefix of the bucket was listed.

    Of a local folder only the path below it counts, so that a copy of the folder packs alike.
    """
    roots = rows["root"].combine_chunks().dictionary_encode()
    buckets = pa.array([_bucket(root) for root in roots.dictionary.to_pylist()], pa.string())
    named = pc.binary_join_element_wise(
        buckets.take(roots.indices),
        rows["path"].combine_chunks(),
        rows["member"].combine_chunks(),
        "\0",
        null_handling="skip",
    )
    names = named.cast(pa.binary()).to_pylist()
    return np.fromiter(
        map(xxhash.xxh3_64_intdigest, names, repeat(seed)), dtype=np.uint64, count=len(names)
    )


def shuffle(
    catalog: Catalog,
    *,
    seed: int,
    max_object_bytes: int,
    known: Iterable[pa.RecordBatch],
    scratch: Path,
    threads: int,
    partitions: int | None = None,
) -> Iterator[Shuffled]:
    """All rows, in the order of their shuffle keys and, where these are equal, of their names.

    Args:
        known: KNOWN of what was packed or rejected before; the last word on a uri counts.
        scratch: an empty folder, for about as many bytes as the catalog has.
        partitions: into how many pieces to cut; changes nothing but memory and time.
    """
    count = partitions or _partitions(catalog)
    assert count < 2**_PART_BITS, "so many fit beside a content hash in eight bytes"
    passes = _Passes(
        catalog.schema,
        seed=seed,
        max_object_bytes=max_object_bytes,
        scratch=scratch,
        partitions=count,
    )
    with ThreadPoolExecutor(threads) as pool:

        def each(run: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
            return _ahead(pool, run, items, most=threads + 1)

        for roots in each(passes.scatter, _chunks(catalog.batches())):
            passes.roots |= roots
        for _ in each(passes.scatter_known, _numbered(_chunks(_known_only(known)))):
            pass
        for run in (passes.find_repeats, passes.sort, passes.find_keepers):
            for _ in each(run, range(count)):
                pass
        yield from each(passes.finish, range(count))


class _Passes:
    """The passes over one catalog, each a method that runs on one piece of it, in any order."""

    def __init__(
        self,
        catalog: pa.Schema,
        *,
        seed: int,
        max_object_bytes: int,
        scratch: Path,
        partitions: int,
    ) -> None:
        self._seed = seed
        self._max_object_bytes = max_object_bytes
        self._count = partitions
        self._plan_schema = plan_schema(catalog)
        self._fields = self._plan_schema.append(CATALOG.field("modified"))
        self._users = self._plan_schema.names[6:]
        listed = pa.schema([*self._fields, ("#key", pa.uint64()), ("#content", pa.uint64())])
        first = pa.schema(
            [
                *(pa.field(name, pa.string()) for name in ("etag", *_NAME)),
                ("size", pa.int64()),
                ("#part", pa.uint16()),
            ]
        )
        judged = pa.schema(
            [*self._plan_schema, ("#verdict", pa.uint8()), ("#is_superseding", pa.bool_())]
        )
        known = pa.schema([*KNOWN, ("#turn", pa.int64())])

        def folder(name: str, schema: pa.Schema) -> Partitions:
            return Partitions(scratch / name, schema, partitions)

        self._listed = folder("listed", listed)
        self._contents = folder("contents", pa.schema([("content", pa.uint64())]))
        self._repeats = folder("repeats", pa.schema([("content", pa.uint64())]))
        self._known = folder("known", known)
        self._judged = folder("judged", judged)
        self._firsts = folder("firsts", first)
        self._keepers = folder("keepers", first)
        self._already = np.zeros(partitions, dtype=np.int64)
        self.roots: set[str] = set()

    def scatter(self, rows: pa.Table) -> set[str]:
        """Rows to the partition of their shuffle key; return the roots that are no buckets."""
        keys = shuffle_keys(rows, self._seed)
        parts = self._part(keys)
        contents = contents_of(rows)
        sizes = _sizes(rows)
        contents[(sizes == 0) | (sizes > self._max_object_bytes)] = 0
        columns = rows.select(self._fields.names).cast(self._fields).columns
        listed = pa.table([*columns, keys, contents], schema=self._listed.schema)
        self._listed.scatter(listed, parts)
        told = contents != 0
        entries = (contents[told] << np.uint64(_PART_BITS)) | parts[told].astype(np.uint64)
        entries.sort()
        # Two tell that there are more.
        entries = entries[np.append([True, True], entries[2:] != entries[:-2])[: len(entries)]]
        self._contents.scatter(pa.table({"content": entries}), self._part(entries))
        return {root for root in pc.unique(rows["root"]).to_pylist() if not _bucket(root)}

    def scatter_known(self, numbered: tuple[int, pa.Table]) -> None:
        """Known rows to the partition where their object's row is, if there is one.

        A uri does not tell where its path ends and a member's name begins ('#' may be part of
        either), nor which folder was listed, so it goes wherever it may belong.
        """
        first, known = numbered
        rows = known.append_column("#turn", pa.array(np.arange(first, first + len(known))))
        for root, path, found in _places(rows["uri"].combine_chunks(), sorted(self.roots)):
            at_hash = pc.count_substring(path, "#")
            for number in range((pc.max(at_hash).as_py() or 0) + 1):
                holds = pc.greater_equal(at_hash, number)
                names = _split(root.filter(holds), path.filter(holds), number)
                where = self._part(shuffle_keys(names, self._seed))
                self._known.scatter(rows.take(found.filter(holds)), where)

    def find_repeats(self, number: int) -> None:
        """Contents that occur more than once, to the partitions of their rows."""
        entries = np.sort(self._contents.take(number)["content"].to_numpy())
        contents = entries >> np.uint64(_PART_BITS)
        is_next = contents[1:] == contents[:-1]
        again = np.append(is_next, False) | np.append(False, is_next)
        found = np.unique(entries[again[: len(entries)]])
        parts = (found & np.uint64(2**_PART_BITS - 1)).astype(np.uint16)
        self._repeats.scatter(pa.table({"content": found >> np.uint64(_PART_BITS)}), parts)

    def sort(self, number: int) -> None:
        """One partition's rows in order, each with a verdict."""
        listed = self._listed.take(number)
        order, listed_twice = self._order(listed)
        rows = listed.take(pa.array(order))
        del listed
        sizes = _sizes(rows)
        verdicts = np.zeros(len(rows), dtype=np.uint8)
        contents = rows["#content"].to_numpy()
        repeats = self._repeats.take(number)["content"].to_numpy()
        verdicts[np.isin(contents, repeats)] = _Verdict.REPEATS
        verdicts[sizes > self._max_object_bytes] = _Verdict.TOO_LARGE
        is_folder = pc.and_(pc.ends_with(rows["path"], "/"), pc.is_null(rows["member"]))
        verdicts[is_folder.to_numpy()] = _Verdict.FOLDER
        verdicts[sizes == 0] = _Verdict.EMPTY
        verdicts[listed_twice] = _Verdict.LISTED_TWICE
        is_known, has_changed = _match(rows, self._known.take(number))
        self._already[number] = is_known.sum()
        has_changed[listed_twice] = False
        judged = rows.select(self._plan_schema.names)
        judged = judged.append_column("#verdict", pa.array(verdicts))
        judged = judged.append_column("#is_superseding", pa.array(has_changed))
        if is_known.any():
            judged, contents = judged.filter(pa.array(~is_known)), contents[~is_known]
        self._judged.write(number, judged)
        repeating = judged["#verdict"].to_numpy() == _Verdict.REPEATS
        candidates = judged.filter(pa.array(repeating)).select(["etag", "size", *_NAME])
        first, _ = _first_of_each(candidates)
        parts = pa.array(np.full(len(first), number, dtype=np.uint16))
        firsts = candidates.take(pa.array(first)).append_column("#part", parts)
        where = self._part(contents[repeating][first] << np.uint64(_PART_BITS))
        self._firsts.scatter(firsts.select(self._firsts.schema.names), where)

    def find_keepers(self, number: int) -> None:
        """The first row of each content, to the partitions that hold rows of this content."""
        found = self._firsts.take(number)
        first, group = _first_of_each(found)
        named = [found[name].take(pa.array(first[group])) for name in _NAME]
        columns = [found["etag"], *named, found["size"], found["#part"]]
        keepers = pa.table(columns, schema=self._keepers.schema)
        self._keepers.scatter(keepers, found["#part"].to_numpy())

    def finish(self, number: int) -> Shuffled:
        """What of one partition is kept and what is not."""
        rows, keepers = self._judged.take(number), self._keepers.take(number)
        verdicts = rows["#verdict"].to_numpy()
        of = pc.index_in(_content_names(rows), value_set=_content_names(keepers).combine_chunks())
        of = of.combine_chunks()
        keeper_uris = uris(keepers).take(of)
        keepers = keepers.select(_NAME).take(of)
        is_other = np.zeros(len(rows), dtype=bool)
        for name in _NAME:
            equal = pc.equal(pc.fill_null(rows[name], ""), pc.fill_null(keepers[name], ""))
            is_other |= ~equal.to_numpy()
        is_duplicate = (verdicts == _Verdict.REPEATS) & is_other
        is_dropped = is_duplicate | (verdicts > _Verdict.REPEATS)
        out = pa.array(is_dropped)
        return Shuffled(
            kept=rows.filter(pa.array(~is_dropped)).select(self._plan_schema.names),
            dropped=self._left_out(rows.filter(out), keeper_uris.filter(out)),
            superseded=pa.table([uris(rows.filter(rows["#is_superseding"]))], schema=SUPERSEDED),
            already=int(self._already[number]),
        )

    def _left_out(self, rows: pa.Table, duplicated: pa.ChunkedArray) -> pa.Table:
        """LEFT_OUT of rows, given the uri of the row that each duplicates by content."""
        said = rows["#verdict"].combine_chunks()
        size = pc.binary_join_element_wise(rows["size"].cast(pa.string()), "bytes", " ")
        limit = f", limit {self._max_object_bytes}"
        known = [
            (_Verdict.EMPTY, Reason.EMPTY, "0 bytes"),
            (_Verdict.FOLDER, Reason.EMPTY, "a folder's name, no object"),
            (_Verdict.TOO_LARGE, Reason.TOO_LARGE, pc.binary_join_element_wise(size, limit, "")),
            (_Verdict.LISTED_TWICE, Reason.DUPLICATE, "the same object, listed again"),
            (
                _Verdict.REPEATS,
                Reason.DUPLICATE,
                pc.binary_join_element_wise("same bytes as", duplicated, " "),
            ),
        ]
        cases = pc.make_struct(*(pc.equal(said, int(verdict)) for verdict, _, _ in known))
        reason = pc.case_when(cases, *(pa.scalar(str(reason)) for _, reason, _ in known))
        detail = pc.case_when(
            cases,
            *(pa.scalar(d) if isinstance(d, str) else d.combine_chunks() for _, _, d in known),
        )
        return pa.table([uris(rows), rows["size"], rows["etag"], reason, detail], schema=LEFT_OUT)

    def _order(self, rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where each row is in the order, and which places of the order hold an object again.

        Of an object that was listed twice, by a bucket and by a list of labels perhaps, the row
        with most of the user's columns comes first, then the newest: likeliest to be there still.
        """
        keys = rows["#key"].to_numpy()
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        is_next = ordered[1:] == ordered[:-1]
        tied = np.flatnonzero(np.append(is_next, False) | np.append(False, is_next))
        if not len(tied):
            return order, np.zeros(0, dtype=np.int64)
        ties = rows.take(pa.array(order[tied]))
        for name in self._users:  # of any type, even one that has no order
            shown = [None if value is None else repr(value) for value in ties[name].to_pylist()]
            at = ties.schema.get_field_index(name)
            ties = ties.set_column(at, name, pa.array(shown, pa.string()))
        missing = np.zeros(len(ties), dtype=np.int64)
        for name in self._users:
            missing += ties[name].is_null().to_numpy()
        ties = ties.append_column("#missing", pa.array(missing))
        by = [(name, "ascending") for name in ("#key", *_NAME, "#missing")]
        by += [("modified", "descending")]
        by += [(name, "ascending") for name in ("etag", "size", "start", *self._users)]
        inner = pc.sort_indices(ties, sort_keys=by)
        order[tied] = order[tied][inner.to_numpy()]
        return order, tied[~_differs(ties.take(inner), _NAME)]

    def _part(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint16]:
        """Which partition: by the high bits, so that partitions are in the order of hashes."""
        return (((hashes >> np.uint64(32)) * np.uint64(self._count)) >> np.uint64(32)).astype(
            np.uint16
        )


def _partitions(catalog: Catalog) -> int:
    """As many as leave about half a million rows, and 64 MiB, in each."""
    encoded = 0
    for path in catalog.files:
        found = pq.read_metadata(path)
        encoded += sum(found.row_group(n).total_byte_size for n in range(found.num_row_groups))
    return 1 + max(catalog.listed // _ROWS_AT_ONCE, encoded // _BYTES_AT_ONCE)


def _chunks(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    gathered: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        gathered.append(batch)
        rows, size = rows + len(batch), size + batch.nbytes
        if rows >= _ROWS_AT_ONCE or size >= _BYTES_AT_ONCE:
            yield pa.Table.from_batches(gathered)
            gathered, rows, size = [], 0, 0
    if rows:
        yield pa.Table.from_batches(gathered)


def _known_only(known: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in known:
        yield batch.select(KNOWN.names).cast(KNOWN)


def _numbered(tables: Iterable[pa.Table]) -> Iterator[tuple[int, pa.Table]]:
    """Each with the number of rows before it."""
    first = 0
    for table in tables:
        yield first, table
        first += len(table)


def _ahead(
    pool: ThreadPoolExecutor,
    run: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    most: int,
) -> Iterator[Result]:
    """Results in the order of the items, computed by threads for at most so many items ahead."""
    running: deque[Future[Result]] = deque()
    try:
        for item in items:
            running.append(pool.submit(run, item))
            if len(running) == most:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        for future in running:
            future.cancel()


def _bucket(root: str) -> str:
    """The bucket or host of a root; nothing for a folder, or a container that has a path."""
    scheme, separator, rest = root.partition("://")
    return "" if not separator or "/" in rest or scheme in ("memory", "file") else rest


def _sizes(rows: pa.Table) -> NDArray[np.int64]:
    """In bytes, -1 where unknown."""
    found: NDArray[np.int64] = pc.fill_null(rows["size"], -1).to_numpy()
    return found


def contents_of(rows: pa.Table) -> NDArray[np.uint64]:
    """48 bits that are equal where size and MD5 are; 0 where the ETag is no MD5 of the content.

    An MD5 is what S3 gives as the ETag of a plain upload.
    """
    found = np.zeros(len(rows), dtype=np.uint64)
    roots = rows["root"].combine_chunks().dictionary_encode()
    is_s3 = pc.starts_with(roots.dictionary, "s3://").take(roots.indices)
    is_plain = pc.and_(pc.is_null(rows["member"]), pc.is_valid(rows["size"]))
    is_long = pc.equal(pc.binary_length(rows["etag"]), 32)
    trusted = pc.fill_null(pc.and_(pc.and_(is_s3, is_plain), is_long), False)
    tags = rows["etag"].filter(trusted).combine_chunks()
    if not len(tags):
        return found
    _, offsets, text = tags.buffers()
    start = np.frombuffer(offsets, dtype=np.int32)[tags.offset]
    data = np.frombuffer(text, dtype=np.uint8, count=32 * len(tags), offset=start)
    digits = data.reshape(len(tags), 32)
    words = data.view(np.uint64).reshape(len(tags), 4)
    mixed = rows["size"].filter(trusted).to_numpy().astype(np.uint64)
    for column in range(4):
        mixed = (mixed ^ words[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    mixed = (mixed * np.uint64(0xBF58476D1CE4E5B9)) >> np.uint64(_PART_BITS)
    found[trusted.to_numpy()] = np.where(_HEX[digits].all(axis=1), np.maximum(mixed, 1), 0)
    return found


def _content_names(rows: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(rows["etag"], rows["size"].cast(pa.string()), "/")


def _first_of_each(rows: pa.Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first row by name of each content, and for every row the number of its content."""
    by = [(name, "ascending") for name in ("etag", "size", *_NAME)]
    order = pc.sort_indices(rows, sort_keys=by).to_numpy().astype(np.int64)
    starts = _differs(rows.take(pa.array(order)), ("etag", "size"))
    groups = np.zeros(len(rows), dtype=np.int64)
    groups[order] = np.cumsum(starts) - 1
    return order[starts], groups


def _differs(rows: pa.Table, names: Iterable[str]) -> NDArray[np.bool_]:
    """Whether each row differs in any of these columns from the row before it."""
    found = np.zeros(len(rows), dtype=bool)
    found[:1] = True
    for name in names:
        values = rows[name].combine_chunks()
        if pa.types.is_string(values.type):
            values = pc.fill_null(values, "")
        found[1:] |= pc.not_equal(
            values.slice(1), values.slice(0, max(len(values) - 1, 0))
        ).to_numpy(zero_copy_only=False)
    return found


def _places(
    addresses: pa.Array, roots: Iterable[str]
) -> Iterator[tuple[pa.Array, pa.Array, pa.Array]]:
    """Root, path and row number of uris, for each way that a uri may be split into the two."""
    numbers = pa.array(np.arange(len(addresses)))
    split = pc.extract_regex(addresses, r"(?s)^(?P<root>[^/]+://[^/]+)/(?P<path>.*)$")
    fits = pc.is_valid(split)
    root, path = (split.field(name).filter(fits) for name in ("root", "path"))
    yield root, path, numbers.filter(fits)
    for folder in roots:
        fits = pc.starts_with(addresses, f"{folder}/")
        path = pc.utf8_slice_codeunits(addresses.filter(fits), len(folder) + 1)
        yield pa.array([folder] * len(path), pa.string()), path, numbers.filter(fits)


def _split(root: pa.Array, path: pa.Array, number: int) -> pa.Table:
    """Names whose member, if any, begins behind the `number`-th '#' of the path."""
    member = pa.nulls(len(path), pa.string())
    if number:
        parts = pc.split_pattern(path, "#", max_splits=number)
        head = pc.list_slice(parts, 0, number)
        path, member = pc.binary_join(head, "#"), pc.list_element(parts, number)
    return pa.table([root, path, member], names=list(_NAME))


def _match(rows: pa.Table, known: pa.Table) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Which rows are known as they are, and which are known in another state.

    The ETag decides where both are given, else the size; a size that is not given says nothing.
    """
    if not len(known):
        return np.zeros(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    known = known.sort_by([("uri", "ascending"), ("#turn", "descending")])
    latest = known.filter(pa.array(_differs(known, ("uri",)))).combine_chunks()
    at = pc.index_in(uris(rows), value_set=latest["uri"].combine_chunks())
    other = latest.take(at.combine_chunks())
    same = pc.coalesce(pc.equal(rows["etag"], other["etag"]), pc.equal(rows["size"], other["size"]))
    found = pc.is_valid(at).to_numpy()
    is_same = pc.fill_null(same, True).to_numpy()
    return found & is_same, found & ~is_same
