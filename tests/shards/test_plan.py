"""Which object goes into which shard."""

from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo.local_s3 import LocalS3
from shards.errors import PlanError, SourceError
from shards.listing import list_objects
from shards.plan import (
    SHARDS_PER_PART,
    Plan,
    PlanSettings,
    _shuffle_keys,
    load_plan,
    make_plan,
)
from shards.store import Store, open_store
from shards.tar import padded_bytes


def settings(source: Store | str = "memory://x", **changes: int) -> PlanSettings:
    known = {
        "seed": 0,
        "shard_bytes": 10_000,
        "max_shard_samples": 100,
        "max_object_bytes": 5000,
        "max_pixels": 1,
        "min_side": 1,
    }
    url = source if isinstance(source, str) else source.url
    return PlanSettings(source=url, **{**known, **changes})


def plan_of(
    source: Store, tmp_path: Path, destination: Store | None = None, **changes: int
) -> tuple[Plan, Store]:
    catalog = tmp_path / "catalog.parquet"
    list_objects(source, catalog)
    store = destination or open_store(str(tmp_path / "out"))
    return make_plan(catalog, source, settings(source, **changes), store=store), store


def filled(name: str, contents: dict[str, bytes]) -> Store:
    store = open_store(f"memory://{name}")
    for path, content in contents.items():
        store.put(path, content)
    return store


def shards_of(plan: Plan, store: Store) -> list[list[str]]:
    return [plan.rows(store, n).column("path").to_pylist() for n in range(plan.num_shards)]


def distinct(count: int, *, size: int = 400) -> dict[str, bytes]:
    return {f"{n:04}.jpg": f"{n:04}".encode() * (size // 4) for n in range(count)}


def test_every_object_is_in_one_shard_within_the_limits(tmp_path: Path) -> None:
    contents = {f"{n}": bytes([n]) * (n * 37 + 1) for n in range(120)}

    plan, store = plan_of(filled("limits", contents), tmp_path, max_shard_samples=9)

    shards = shards_of(plan, store)
    assert sorted(chain(*shards)) == sorted(contents)
    for names in shards:
        assert 1 <= len(names) <= 9
        assert sum(padded_bytes(len(contents[name])) for name in names) <= 10_000
    assert (plan.listed, plan.dropped) == (120, 0)


def test_the_order_is_a_shuffle_that_depends_on_seed_and_name_only(tmp_path: Path) -> None:
    contents = distinct(60)

    def order(name: str, names: dict[str, bytes], seed: int) -> list[str]:
        place = tmp_path / name
        place.mkdir()
        return list(chain(*shards_of(*plan_of(filled(name, names), place, seed=seed))))

    one = order("shuffle-1", contents, 1)

    assert one != sorted(one)
    assert one == order("shuffle-2", dict(reversed(contents.items())), 1)
    assert one != order("shuffle-3", contents, 2)
    fewer = {name: data for name, data in contents.items() if name != one[7]}
    assert order("shuffle-4", fewer, 1) == [name for name in one if name != one[7]]


def test_a_bucket_and_a_prefix_of_it_shuffle_alike() -> None:
    def keys(source: str, paths: list[str]) -> list[int]:
        return list(_shuffle_keys(pa.table({"path": paths}), settings(source)))

    assert keys("s3://bucket", ["a/b/1", "a/b/2"]) == keys("s3://bucket/a/b", ["1", "2"])
    assert keys("s3://bucket", ["a"]) != keys("s3://other", ["a"])
    assert keys("/some/where", ["a"]) == keys("/else/where", ["a"])


def test_equal_bytes_are_kept_once_and_empty_and_huge_objects_never(tmp_path: Path) -> None:
    contents = {
        "a/first": b"same bytes",
        "b/second": b"same bytes",
        "c/third": b"same bytes",
        "d/same size": b"other byte",
        "e/empty": b"",
        "f/empty too": b"",
        "g/huge": b"x" * 5001,
        "h/just fits": b"x" * 5000,
    }

    source = filled("duplicates", contents)
    plan, store = plan_of(source, tmp_path)

    left_out = {row["path"]: row for row in plan.left_out(store).to_pylist()}
    assert {path: row["reason"] for path, row in left_out.items()} == {
        "b/second": "duplicate",
        "c/third": "duplicate",
        "e/empty": "empty",
        "f/empty too": "empty",
        "g/huge": "too_large",
    }
    assert left_out["c/third"]["detail"] == f"same bytes as {source.uri('a/first')}"
    packed = list(chain(*shards_of(plan, store)))
    assert len(packed) + plan.dropped == plan.listed == 8
    assert set(packed) == {"a/first", "d/same size", "h/just fits"}


@pytest.mark.s3
def test_trusted_etags_tell_duplicates_without_a_read(s3: LocalS3, tmp_path: Path) -> None:
    bucket = s3.make_bucket("etags")
    for name, data in {"a": b"same", "b": b"same", "c": b"diff"}.items():
        open_store(bucket).put(name, data)

    class Unreadable:
        """A store that lists and never reads."""

        def __init__(self, inner: Store) -> None:
            self.url, self.list, self.uri = inner.url, inner.list, inner.uri

    plan, store = plan_of(Unreadable(open_store(bucket)), tmp_path)  # type: ignore[arg-type]

    assert plan.left_out(store).column("path").to_pylist() == ["b"]


def test_a_row_group_is_a_shard_across_parts(tmp_path: Path) -> None:
    count = SHARDS_PER_PART + 3

    plan, store = plan_of(filled("parts", distinct(count)), tmp_path, max_shard_samples=1)

    parts = sorted((tmp_path / "out" / "plan").glob("part-*.parquet"))
    assert [pq.ParquetFile(part).num_row_groups for part in parts] == [SHARDS_PER_PART, 3]
    assert plan.num_shards == count
    assert len(set(chain(*shards_of(plan, store)))) == count


def test_a_saved_plan_is_found_again_and_bound_to_its_settings(tmp_path: Path) -> None:
    source = filled("saved", distinct(5))
    plan, store = plan_of(source, tmp_path)

    assert load_plan(store, settings(source)) == plan
    assert load_plan(open_store(str(tmp_path / "elsewhere")), settings(source)) is None
    for name, value in {"seed": 5, "shard_bytes": 77, "min_side": 2}.items():
        with pytest.raises(PlanError) as caught:
            load_plan(store, settings(source, **{name: value}))
        for said in (name, str(value), str(getattr(plan.settings, name)), store.url):
            assert said in str(caught.value)
    with pytest.raises(PlanError, match="memory://another"):
        load_plan(store, settings("memory://another"))


def test_of_two_planners_at_once_the_first_counts(tmp_path: Path) -> None:
    early = filled("race", distinct(5))
    plan, store = plan_of(early, tmp_path)
    early.put("late", b"came after the first listing")

    second, _ = plan_of(early, tmp_path, store)

    assert second == plan
    assert len(list(chain(*shards_of(second, store)))) == 5


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="memory://nothing"):
        list_objects(open_store("memory://nothing"), tmp_path / "catalog.parquet")
