"""Which object goes into which shard."""

import datetime
import random
import re
from collections.abc import Iterable, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from shards.catalog import CATALOG, Catalog
from shards.errors import PlanError
from shards.objects import Bytes
from shards.plan import SHARDS_PER_PART, Plan, PlanSettings, cut, load_plan, make_plan
from shards.shuffle import KNOWN, _Passes, plan_schema, shuffle_keys
from shards.store import Store, open_store
from shards.tar import padded_bytes

Row = dict[str, Any]
MD5 = "0123456789abcdef0123456789abcdef"


def settings(**changes: Any) -> PlanSettings:
    known: Row = {
        "sources": ("s3://bucket",),
        "seed": 0,
        "shard_bytes": 10_000,
        "max_shard_samples": 100,
        "max_object_bytes": 5000,
        "max_pixels": 1,
        "min_side": 1,
        "resize_side": 0,
        "columns": None,
    }
    return PlanSettings(**{**known, **changes})


def row(path: str, **changes: Any) -> Row:
    known = dict.fromkeys(CATALOG.names, None)
    return {**known, "root": "s3://bucket", "path": path, "size": 400, **changes}


def catalog_of(
    rows: Sequence[Row], folder: Path, *, files: int = 1, own: Sequence[pa.Field] = ()
) -> Catalog:
    """A catalog of these rows, dealt out over files."""
    schema = pa.schema([*CATALOG, *own])
    folder.mkdir(parents=True, exist_ok=True)
    paths = tuple(folder / f"{number}.parquet" for number in range(files))
    for number, path in enumerate(paths):
        table = pa.Table.from_pylist(list(rows[number::files]), schema=schema)
        pq.write_table(table, path, row_group_size=97)
    return Catalog(
        files=paths,
        schema=schema,
        listed=len(rows),
        bytes=sum(r["size"] or 0 for r in rows),
        list_requests=0,
        sources=("s3://bucket",),
    )


def known_of(*rows: tuple[str, str | None, int | None]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(
        [dict(zip(KNOWN.names, one, strict=True)) for one in rows], schema=KNOWN
    )


def plan_of(
    rows: Sequence[Row],
    tmp_path: Path,
    *,
    store: Store | None = None,
    known: Iterable[pa.RecordBatch] = (),
    partitions: int | None = 3,
    **changes: Any,
) -> tuple[Plan, Store]:
    store = store or open_store(str(tmp_path / "out"))
    plan = make_plan(
        catalog_of(rows, tmp_path / "catalog"),
        settings(**changes),
        store=store,
        scratch=tmp_path,
        known=known,
        _partitions=partitions,
    )
    return plan, store


def shards_of(plan: Plan, store: Store) -> list[list[Row]]:
    numbers = range(plan.first_shard, plan.first_shard + plan.num_shards)
    return [plan.rows(store, number).to_pylist() for number in numbers]


def names_of(plan: Plan, store: Store) -> list[str]:
    return [r["path"] for r in chain(*shards_of(plan, store))]


def left_out_of(plan: Plan, store: Store) -> list[Row]:
    return [r for batch in plan.left_out(store) for r in batch.to_pylist()]


def superseded_of(plan: Plan, store: Store) -> list[str]:
    return [r["uri"] for batch in plan.superseded(store) for r in batch.to_pylist()]


def uri_of(r: Row) -> str:
    return f"{r['root']}/{r['path']}" + (f"#{r['member']}" if r["member"] is not None else "")


def files_below(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def test_every_object_is_in_one_shard_within_the_limits(tmp_path: Path) -> None:
    rows = [row(f"{n}", size=n * 37 + 1) for n in range(120)]

    plan, store = plan_of(rows, tmp_path, max_shard_samples=9)

    shards = shards_of(plan, store)
    assert sorted(r["path"] for r in chain(*shards)) == sorted(r["path"] for r in rows)
    for shard in shards:
        assert 1 <= len(shard) <= 9
        assert sum(padded_bytes(r["size"]) for r in shard) <= 10_000
    assert (plan.listed, plan.planned, plan.dropped, plan.already) == (120, 120, 0, 0)
    assert (plan.known_bytes, plan.unknown_sizes) == (sum(r["size"] for r in rows), 0)


def test_shards_are_cut_greedily_by_bytes_and_by_count() -> None:
    def one_by_one(sizes: Sequence[int], shard_bytes: int, max_samples: int) -> list[int]:
        stops, used, count = [], 0, 0
        for number, size in enumerate(sizes):
            if count and (used + size > shard_bytes or count == max_samples):
                stops.append(number)
                used = count = 0
            used, count = used + size, count + 1
        return stops

    for length in range(6):
        for sizes in product((0, 1, 2, 5), repeat=length):
            for shard_bytes, most in product((1, 2, 4, 20), (1, 2, 3)):
                found = cut(
                    np.array(sizes, dtype=np.int64), shard_bytes=shard_bytes, max_samples=most
                )

                assert found == one_by_one(sizes, shard_bytes, most), (sizes, shard_bytes, most)


def test_rows_of_unknown_or_future_size_are_cut_by_a_guess(tmp_path: Path) -> None:
    unknown = [row(f"{n}", size=None) for n in range(10)]
    large = [row(f"{n}", size=4000) for n in range(10)]

    def lengths(name: str, rows: list[Row], **changes: int) -> list[int]:
        (tmp_path / name).mkdir()
        found = plan_of(rows, tmp_path / name, **changes)
        return [len(shard) for shard in shards_of(*found)]

    guess = padded_bytes(2**17)
    assert lengths("unknown", unknown, shard_bytes=4 * guess) == [4, 4, 2]
    assert lengths("few", unknown, shard_bytes=4 * guess, max_shard_samples=3) == [3, 3, 3, 1]
    assert lengths("resized", large, shard_bytes=4 * padded_bytes(32 * 32), resize_side=32) == [
        4, 4, 2,
    ]  # fmt: skip
    assert lengths("small already", large, resize_side=256) == lengths("kept", large) == [2] * 5


def test_the_order_is_a_shuffle_that_depends_on_seed_and_name_only(tmp_path: Path) -> None:
    rows = [row(f"{n:04}.jpg") for n in range(60)]

    def order(name: str, rows: list[Row], seed: int) -> list[str]:
        (tmp_path / name).mkdir()
        return names_of(*plan_of(rows, tmp_path / name, seed=seed))

    one = order("1", rows, 1)

    assert one != sorted(one)
    assert one == order("2", [{**r, "size": 77, "etag": "x"} for r in reversed(rows)], 1)
    assert one != order("3", rows, 2)
    fewer = [r for r in rows if r["path"] != one[7]]
    assert order("4", fewer, 1) == [name for name in one if name != one[7]]


def test_of_a_root_only_the_bucket_counts_for_the_order() -> None:
    def key(root: str, path: str = "a/b", member: str | None = None) -> int:
        table = pa.table(
            {"root": [root], "path": [path], "member": pa.array([member], pa.string())}
        )
        return int(shuffle_keys(table, 5)[0])

    assert key("s3://bucket") == xxhash.xxh3_64_intdigest(b"bucket\0a/b", 5)
    assert key("s3://bucket", member="m") == xxhash.xxh3_64_intdigest(b"bucket\0a/b\0m", 5)
    assert key("s3://bucket") != key("s3://other")
    assert key("https://host") != key("https://else")
    for root in ("/some/where", "/else/where", "memory://name", "hf://datasets/one"):
        assert key(root) == xxhash.xxh3_64_intdigest(b"\0a/b", 5)


def test_a_plan_depends_on_neither_row_order_nor_partitions_nor_threads(tmp_path: Path) -> None:
    rng = random.Random(3)
    own = [pa.field("label", pa.string()), pa.field("boxes", pa.list_(pa.int32()))]
    own.append(pa.field("licence", pa.dictionary(pa.int32(), pa.string())))
    rows = [
        row(
            f"{n % 500:04}",
            etag=f"{rng.randrange(300):032x}",
            label=f"class {n % 3}",
            boxes=[n % 7] if n % 11 else None,
            licence=f"licence {n % 5}",
        )
        for n in range(2000)
    ]
    rows += [row(f"listed twice {n % 50}", label=f"{n}", boxes=[n], licence="") for n in range(100)]
    known = [known_of(*((f"s3://bucket/{n:04}", None, 400 + n % 2) for n in range(40)))]
    seen = []

    for number, (partitions, threads) in enumerate([(1, 1), (2, 3), (7, 2), (64, 3)]):
        rng.shuffle(rows)
        make_plan(
            catalog_of(rows, tmp_path / f"catalog{number}", files=1 + number, own=own),
            settings(max_shard_samples=5),
            store=open_store(str(tmp_path / f"{number}")),
            scratch=tmp_path,
            known=known,
            _partitions=partitions,
            _threads=threads,
        )
        seen.append(files_below(tmp_path / f"{number}"))

    assert len(seen[0]) >= 4
    assert all(found == seen[0] for found in seen)


def test_large_shards_are_the_same_bytes_whatever_the_partitions(tmp_path: Path) -> None:
    names = [random.Random(n).randbytes(40).hex() for n in range(20_000)]
    catalog = catalog_of([row(name) for name in names], tmp_path / "catalog")
    seen = []

    for partitions in (1, 7):
        store = open_store(str(tmp_path / f"{partitions}"))
        limits = settings(shard_bytes=2**30, max_shard_samples=15_000)
        make_plan(catalog, limits, store=store, scratch=tmp_path, _partitions=partitions)
        seen.append(files_below(tmp_path / f"{partitions}"))

    assert seen[0] == seen[1]


def expected(
    rows: Sequence[Row], known: Sequence[tuple[str, str | None, int | None]], most: int
) -> tuple[list[Row], int, set[tuple[str, str, str]], list[str]]:
    """The rules, one object at a time, all in memory: kept, already known, left out, superseded."""
    last = {uri: (etag, size) for uri, etag, size in known}

    def is_known(r: Row) -> bool | None:
        if uri_of(r) not in last:
            return None
        etag, size = last[uri_of(r)]
        if etag is not None and r["etag"] is not None:
            return bool(etag == r["etag"])
        return size is None or r["size"] is None or size == r["size"]

    def name(r: Row) -> tuple[str, str, str]:
        return r["root"], r["path"], r["member"] or ""

    def place(r: Row) -> Any:
        bucket = r["root"][5:] if r["root"].startswith(("s3://", "gs://")) else ""
        whole = f"{bucket}\0{r['path']}" + ("" if r["member"] is None else f"\0{r['member']}")
        return xxhash.xxh3_64_intdigest(whole.encode()), r["root"], r["path"], r["member"] or "~"

    def freshness(r: Row) -> Any:
        return (
            -r["modified"].timestamp() if r["modified"] else 0,
            (r["etag"] is None, r["etag"] or ""),
            (r["size"] is None, r["size"] or 0),
        )

    left_out, superseded, already = set(), [], 0
    fresh: dict[Any, Row] = {}
    twice = []
    for r in sorted(rows, key=lambda r: (place(r), freshness(r))):
        if name(r) in fresh:
            twice.append(r)
        else:
            fresh[name(r)] = r
    for r in twice:
        if is_known(r):
            already += 1
        else:
            left_out.add((uri_of(r), "duplicate", "the same object, listed again"))
    rest = []
    for r in fresh.values():
        if is_known(r):
            already += 1
            continue
        if is_known(r) is False:
            superseded.append(uri_of(r))
        if r["size"] == 0:
            left_out.add((uri_of(r), "empty", "0 bytes"))
        elif r["path"].endswith("/") and r["member"] is None:
            left_out.add((uri_of(r), "empty", "a folder's name, no object"))
        elif (r["size"] or 0) > most:
            left_out.add((uri_of(r), "too_large", f"{r['size']} bytes, limit {most}"))
        else:
            rest.append(r)
    first: dict[Any, Row] = {}

    def content(r: Row) -> Any:
        is_told = r["root"].startswith("s3://") and r["size"] is not None and r["member"] is None
        is_md5 = re.fullmatch("[0-9a-f]{32}", r["etag"] or "") is not None
        return (r["size"], r["etag"]) if is_told and is_md5 else uri_of(r)

    for r in sorted(rest, key=name):
        first.setdefault(content(r), r)
    kept = []
    for r in rest:
        if (keeper := first[content(r)]) is r:
            kept.append(r)
        else:
            left_out.add((uri_of(r), "duplicate", f"same bytes as {uri_of(keeper)}"))
    return kept, already, left_out, superseded


def test_the_rules_hold_on_many_small_catalogs(tmp_path: Path) -> None:
    rng = random.Random(0)
    etags = [None, "plain", f"{MD5[:30]}-2", "Z" * 32, MD5, MD5[::-1], MD5[::-1].replace("f", "e")]
    times = [None, *(datetime.datetime(2026, 1, day, tzinfo=datetime.UTC) for day in (1, 2))]

    def draw() -> Row:
        name = rng.choice(["a", "b", "c#d", "d/", "e", "f#g#h", "é\n"])
        return row(
            name,
            root=rng.choice(["s3://x", "s3://y", "gs://x", "/folder", "/folder/c#d", "memory://m"]),
            member=rng.choice([None, None, None, "m", "m#n", "d"]),
            size=rng.choice([None, 0, 1, 2, 2, 6]),
            etag=rng.choice(etags),
            modified=rng.choice(times),
        )

    for case in range(80):
        # A member of this name and a path of this name are one uri: a known one is then both.
        rows = list({uri_of(r): r for r in (draw() for _ in range(rng.randrange(40)))}.values())
        rows += [
            {**r, "size": rng.choice([1, 2]), "etag": rng.choice(etags)}
            for r in rng.sample(rows, len(rows) // 3)
        ]
        known = [
            (uri_of(r), rng.choice([None, r["etag"], MD5]), rng.choice([None, r["size"], 1]))
            for r in rng.choices(rows, k=rng.randrange(10) if rows else 0)
        ]
        batches = [known_of(*known[:4]), known_of(*known[4:])]
        partitions = rng.choice([1, 2, 11])
        kept, already, left_out, superseded = expected(rows, known, 5)
        place = tmp_path / f"{case}"
        place.mkdir()

        plan, store = plan_of(rows, place, known=batches, partitions=partitions, max_object_bytes=5)

        fields = plan_schema(CATALOG).names
        assert list(chain(*shards_of(plan, store))) == [{n: r[n] for n in fields} for r in kept]
        found = left_out_of(plan, store)
        assert {(r["uri"], r["reason"], r["detail"]) for r in found} == left_out
        assert superseded_of(plan, store) == superseded
        assert (plan.already, plan.planned) == (already, len(kept))
        assert len(found) == plan.dropped == len(rows) - already - len(kept)


def test_equal_trusted_etag_and_size_are_kept_once_and_empty_and_huge_objects_never(
    tmp_path: Path,
) -> None:
    rows = [
        row("b/second", etag=MD5),
        row("a/first", etag=MD5),
        row("c/third", etag=MD5),
        row("d/other size", etag=MD5, size=401),
        row("e/in parts", etag=f"{MD5[:30]}-2"),
        row("f/in parts", etag=f"{MD5[:30]}-2"),
        row("g/elsewhere", root="gs://bucket", etag=MD5),
        row("h/in another bucket", root="s3://bucket2", etag=MD5),
        row("i/empty", size=0, etag=MD5),
        row("j/folder/", size=3),
        row("k/huge", size=5001),
        row("l/just fits", size=5000),
    ]

    plan, store = plan_of(rows, tmp_path)

    left_out = {r["uri"]: (r["reason"], r["detail"]) for r in left_out_of(plan, store)}
    assert left_out == {
        "s3://bucket/b/second": ("duplicate", "same bytes as s3://bucket/a/first"),
        "s3://bucket/c/third": ("duplicate", "same bytes as s3://bucket/a/first"),
        "s3://bucket2/h/in another bucket": ("duplicate", "same bytes as s3://bucket/a/first"),
        "s3://bucket/i/empty": ("empty", "0 bytes"),
        "s3://bucket/j/folder/": ("empty", "a folder's name, no object"),
        "s3://bucket/k/huge": ("too_large", "5001 bytes, limit 5000"),
    }
    assert plan.dropped + plan.planned == plan.listed == 12
    assert set(names_of(plan, store)) == {
        "a/first",
        "d/other size",
        "e/in parts",
        "f/in parts",
        "g/elsewhere",
        "l/just fits",
    }


def test_of_an_object_listed_twice_the_newest_is_kept_and_decides_what_it_duplicates(
    tmp_path: Path,
) -> None:
    old, new = (datetime.datetime(2026, 1, day, tzinfo=datetime.UTC) for day in (1, 2))
    rows = [
        row("a", etag=MD5, modified=old),
        row("a", etag="now another", modified=new),
        row("b", etag=MD5, modified=old),
    ]

    plan, store = plan_of(rows, tmp_path)

    assert {(r["path"], r["etag"]) for r in chain(*shards_of(plan, store))} == {
        ("a", "now another"),
        ("b", MD5),
    }
    (again,) = left_out_of(plan, store)
    assert (again["uri"], again["etag"], again["detail"]) == (
        "s3://bucket/a",
        MD5,
        "the same object, listed again",
    )


def test_a_content_under_many_names_leaves_few_traces_on_disk(tmp_path: Path) -> None:
    rows = pa.Table.from_pylist([row(f"{n}", etag=MD5) for n in range(5000)], schema=CATALOG)
    passes = _Passes(CATALOG, seed=0, max_object_bytes=10**6, scratch=tmp_path, partitions=4)

    passes.scatter(rows)

    assert sum(len(passes._contents.take(number)) for number in range(4)) == 2 * 4


def test_what_is_known_is_left_out_and_what_has_changed_is_planned_again(tmp_path: Path) -> None:
    rows = [
        row("same etag", etag="e1", size=None),
        row("other etag", etag="e2"),
        row("no etag, same size"),
        row("no etag, other size", size=401),
        row("nothing to compare", size=None),
        row("new"),
        row("a.tar", member="same#member", etag="e1"),
        row("hash#tag", etag="e1"),
        row("below", root="/some/folder"),
        row("back to the first", etag="e1"),
        row("empty before", etag="e1", size=0),
    ]
    known = [
        known_of(
            ("s3://bucket/same etag", "e1", 399),
            ("s3://bucket/other etag", "e1", 400),
            ("s3://bucket/no etag, same size", "e1", 400),
            ("s3://bucket/no etag, other size", None, 400),
            ("s3://bucket/nothing to compare", None, 400),
            ("s3://bucket/gone", "e1", 400),
            ("s3://bucket/back to the first", "e1", 400),
            ("s3://bucket/empty before", "e1", 0),
        ),
        known_of(
            ("s3://bucket/a.tar#same#member", "e1", 400),
            ("s3://bucket/hash#tag", "e1", 400),
            ("/some/folder/below", None, 400),
            ("s3://bucket/back to the first", "e2", 400),
        ),
    ]

    plan, store = plan_of(rows, tmp_path, known=known, partitions=5)

    again = {"other etag", "no etag, other size", "back to the first"}
    assert set(names_of(plan, store)) == {"new", *again}
    assert set(superseded_of(plan, store)) == {f"s3://bucket/{name}" for name in again}
    assert (plan.already, plan.dropped, plan.planned) == (7, 0, 4)


def test_a_row_group_is_a_shard_across_parts(tmp_path: Path) -> None:
    count = SHARDS_PER_PART + 3

    plan, store = plan_of([row(f"{n}") for n in range(count)], tmp_path, max_shard_samples=1)

    parts = sorted((tmp_path / "out/plan/g0000").glob("part-*.parquet"))
    assert [pq.ParquetFile(part).num_row_groups for part in parts] == [SHARDS_PER_PART, 3]
    assert plan.num_shards == count
    assert len(set(names_of(plan, store))) == count


def test_a_shard_is_read_by_ranges_without_the_others(tmp_path: Path) -> None:
    rows = [row(f"{random.Random(n).randbytes(60).hex()}") for n in range(3000)]
    plan, store = plan_of(rows, tmp_path, max_shard_samples=100, shard_bytes=10**6)
    asked: list[int] = []

    class Counting:
        """A store that reads nothing whole."""

        def read_ranges(
            self, path: str, starts: Sequence[int], ends: Sequence[int]
        ) -> Sequence[Bytes]:
            asked.extend(end - start for start, end in zip(starts, ends, strict=True))
            return store.read_ranges(path, starts, ends)

    counting: Any = Counting()
    whole = [plan.rows(counting, number).to_pylist() for number in range(plan.num_shards)]

    assert whole == shards_of(plan, store)
    (part,) = plan.parts
    assert len(asked) == 1 + plan.num_shards  # the footer once
    assert max(asked[1:]) < part.bytes / 10


def test_the_users_columns_travel_in_the_order_of_their_names(tmp_path: Path) -> None:
    own = [pa.field("label", pa.int32()), pa.field("captions", pa.list_(pa.string()))]
    rows = [row(f"{n}", label=n, captions=[f"photo {n}", None]) for n in range(9)]
    store = open_store(str(tmp_path / "out"))

    plan = make_plan(
        catalog_of(rows, tmp_path / "catalog", own=own),
        settings(),
        store=store,
        scratch=tmp_path,
    )

    (found,) = shards_of(plan, store)
    assert list(found[0]) == [
        "root",
        "path",
        "member",
        "start",
        "size",
        "etag",
        "captions",
        "label",
    ]
    assert {r["path"]: (r["label"], r["captions"]) for r in found} == {
        f"{n}": (n, [f"photo {n}", None]) for n in range(9)
    }


def test_a_saved_plan_is_found_again_and_bound_to_its_settings(tmp_path: Path) -> None:
    plan, store = plan_of([row(f"{n}") for n in range(5)] + [row("5", size=0)], tmp_path)

    assert load_plan(store, settings(), 0) == plan
    assert load_plan(store, settings(), 1) is None
    assert load_plan(open_store(str(tmp_path / "elsewhere")), settings(), 0) is None
    for name, value in {
        "seed": 5,
        "shard_bytes": 77,
        "min_side": 2,
        "resize_side": 256,
        "columns": ("label",),
        "sources": ("memory://another",),
    }.items():
        with pytest.raises(PlanError) as caught:
            load_plan(store, settings(**{name: value}), 0)
        shown = [v if isinstance(v, tuple) else (v,) for v in (value, getattr(settings(), name))]
        for said in (name, *map(str, chain(*shown)), store.url):
            assert said in str(caught.value)


def test_sources_in_another_order_or_with_a_slash_are_the_same_plan() -> None:
    one = settings(sources=("s3://a", "s3://b/c"))
    many = tuple(f"s3://bucket{n:02}" for n in range(20))

    assert settings(sources=many[::-1]).sources == many
    assert one == settings(sources=("s3://b/c/", "s3://a/", "s3://a"))
    assert one != settings(sources=("s3://a",))
    assert settings(sources=("/",)).sources == ("/",)


def test_generations_lie_beside_each_other_and_count_on(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    plan, _ = plan_of([row("1"), row("2")], tmp_path, store=store, max_shard_samples=1)
    catalog = catalog_of([row("3")], tmp_path / "later")

    later = make_plan(
        catalog, settings(), store=store, scratch=tmp_path, generation=1, first_shard=2
    )

    assert load_plan(store, settings(), 1) == later
    assert load_plan(store, settings(max_shard_samples=1), 0) == plan
    assert [r["path"] for r in later.rows(store, 2).to_pylist()] == ["3"]


def test_of_two_planners_at_once_the_first_counts(tmp_path: Path) -> None:
    rows = [row(f"{n}") for n in range(5)]
    plan, store = plan_of(rows, tmp_path)

    second, _ = plan_of([*rows, row("late")], tmp_path, store=store)

    assert second == plan
    assert len(names_of(second, store)) == 5


def test_nothing_to_plan_is_a_plan_without_shards(tmp_path: Path) -> None:
    plan, store = plan_of([row("a", size=0)], tmp_path)

    assert (plan.num_shards, plan.parts, plan.planned, plan.dropped) == (0, (), 0, 1)
    assert load_plan(store, settings(), 0) == plan


def test_a_scratch_folder_that_cannot_be_written_ends_it_with_a_plan_error(tmp_path: Path) -> None:
    catalog = catalog_of([row("a")], tmp_path / "catalog")
    missing = tmp_path / "not there"

    with pytest.raises(PlanError, match=r"not there.*TMPDIR"):
        make_plan(catalog, settings(), store=open_store(str(tmp_path / "out")), scratch=missing)


def test_temporary_files_are_gone_afterwards(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    catalog = catalog_of([row(f"{n}", etag=MD5) for n in range(50)], tmp_path / "catalog")

    make_plan(catalog, settings(), store=open_store(str(tmp_path / "out")), scratch=scratch)

    assert not any(scratch.iterdir())
