"""Burying samples: versions, parts, races; ids that stay."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards import ShardSet, tombstones
from shards.errors import FormatError, PlanError
from shards.manifest import MANIFEST, SHARD_LIST, publish, version_path
from shards.store import Store, open_store
from tests.support.made_sets import plain_set, uris


def dead(rows: Sequence[tuple[int, int]], *, reason: str = "duplicate") -> pa.Table:
    """Positions to bury, as (shard, position)."""
    columns = [
        [shard for shard, _ in rows],
        [position for _, position in rows],
        [reason] * len(rows),
        [f"why {row}" for row in rows],
    ]
    return pa.table(columns, schema=None, names=tombstones.DEAD.names).cast(tombstones.DEAD)


def counts(shard_set: ShardSet) -> dict[str, int]:
    return dict(json.loads(shard_set.metadata["dead"]))


def test_the_dead_are_not_served_and_the_others_keep_their_ids() -> None:
    before = plain_set("memory://bury", [3, 4, 2])

    after = before.bury(dead([(1, 0), (1, 2), (2, 1)]))

    assert uris(after) == {n: uri for n, uri in uris(before).items() if n not in (3, 5, 8)}
    assert after.num_samples == 6
    assert after.samples.tolist() == [3, 2, 1]
    assert after.slots.tolist() == [3, 4, 2]
    assert after.first_ordinal.tolist() == before.first_ordinal.tolist() == [0, 3, 7]
    assert after.index(1).position.tolist() == [1, 3]
    assert after.dead(1).tolist() == [0, 2]
    assert after.dead(0).tolist() == []
    assert (after.version, after.set_id) == (2, before.set_id)
    assert counts(after) == {"duplicate": 3}
    assert uris(before)[3] == "raw/1-0", "a reader of the earlier version reads on"


def test_nothing_new_makes_no_version_and_no_file() -> None:
    url = "memory://nothing-new"
    shard_set = plain_set(url, [3, 3])
    once = shard_set.bury(dead([(0, 1), (1, 2)]))

    def paths() -> list[str]:
        return sorted(p for page in once.store.list() for p in page["path"].to_pylist())

    before = paths()

    assert once.bury(dead([(0, 1)], reason="near_duplicate")).version == 2
    assert once.bury(dead([])).version == 2
    assert once.bury([]).version == 2
    assert paths() == before
    assert counts(ShardSet.open(url)) == {"duplicate": 2}


def test_the_first_reason_stays_unless_it_is_a_take_down() -> None:
    shard_set = plain_set("memory://reasons", [4]).bury(dead([(0, 1), (0, 2)]))

    shard_set = shard_set.bury(dead([(0, 1), (0, 3)], reason="near_duplicate"))
    assert counts(shard_set) == {"duplicate": 2, "near_duplicate": 1}
    shard_set = shard_set.bury(dead([(0, 2), (0, 3)], reason="takedown"))
    assert counts(shard_set) == {"duplicate": 1, "takedown": 2}
    assert shard_set.version == 4
    assert shard_set.bury(dead([(0, 2)])).version == 4
    assert uris(shard_set) == {0: "raw/0-0"}


def test_positions_given_twice_or_in_any_order_count_once() -> None:
    shard_set = plain_set("memory://twice", [5, 5])

    shard_set = shard_set.bury(dead([(1, 4), (0, 3), (1, 0), (0, 3), (1, 4)]))

    assert [shard_set.dead(0).tolist(), shard_set.dead(1).tolist()] == [[3], [0, 4]]
    assert counts(shard_set) == {"duplicate": 3}
    assert shard_set.samples.tolist() == [4, 3]


def test_shards_move_between_parts_and_every_count_stays_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tombstones, "SHARDS_PER_PART", 2)
    rng = np.random.default_rng(0)
    sizes = [7, 1, 5, 9, 3]
    shard_set = plain_set("memory://parts", sizes)
    everyone = [(shard, n) for shard, size in enumerate(sizes) for n in range(size)]
    expected: dict[tuple[int, int], str] = {}

    for _ in range(12):
        rows = [everyone[n] for n in rng.choice(len(everyone), size=3)]
        reason = str(rng.choice(["duplicate", "near_duplicate", "superseded"]))
        for row in rows:
            expected.setdefault(row, reason)
        shard_set = shard_set.bury(dead(rows, reason=reason))

        for shard, size in enumerate(sizes):
            alive = [n for n in range(size) if (shard, n) not in expected]
            assert shard_set.index(shard).position.tolist() == alive
            assert shard_set.samples[shard] == len(alive)
        reasons = list(expected.values())
        assert counts(shard_set) == {reason: reasons.count(reason) for reason in sorted({*reasons})}
        assert len(shard_set.table(["key"])) == shard_set.num_samples


def test_tables_in_the_order_of_the_shards_are_one_version() -> None:
    shard_set = plain_set("memory://streamed", [3, 3, 3])

    after = shard_set.bury(iter([dead([(0, 1)]), dead([]), dead([(2, 2), (1, 0)])]))

    assert (after.version, after.samples.tolist()) == (2, [2, 2, 2])
    with pytest.raises(AssertionError, match="order of the shards"):
        after.bury([dead([(1, 1)]), dead([(1, 2)])])
    with pytest.raises(AssertionError, match="has not"):
        after.bury(dead([(0, 0), (0, 1), (0, 2), (0, 3)]))


def test_a_set_whose_every_sample_is_dead_is_still_a_set() -> None:
    sizes = [2, 3]
    shard_set = plain_set("memory://all-dead", sizes)

    shard_set = shard_set.bury(dead([(s, n) for s, size in enumerate(sizes) for n in range(size)]))

    assert shard_set.num_samples == 0
    assert len(shard_set.index(1).format) == 0
    assert len(shard_set.table()) == 0
    assert shard_set.describe().num_samples == 0
    assert dict(shard_set.describe().rows())["tombstoned"] == "duplicate 5"


def test_an_earlier_version_opens_as_it_was() -> None:
    url = "memory://old-version"
    shard_set = plain_set(url, [3]).bury(dead([(0, 0)])).bury(dead([(0, 1)]))

    assert shard_set.version == 3
    assert [ShardSet.open(url, version=v).num_samples for v in (1, 2, 3)] == [3, 2, 1]
    assert uris(ShardSet.open(url, version=2)) == {1: "raw/0-1", 2: "raw/0-2"}
    with pytest.raises(FormatError, match="no version 4; open the newest"):
        ShardSet.open(url, version=4)


def test_burying_from_an_old_version_is_refused_and_hides_nothing() -> None:
    url = "memory://stale"
    first = plain_set(url, [4])
    first.bury(dead([(0, 0)])).bury(dead([(0, 1)]))

    with pytest.raises(PlanError, match="made version 2 meanwhile; run this command again"):
        first.bury(dead([(0, 3)]))

    newest = ShardSet.open(url)
    assert newest.version == 3
    assert uris(newest) == {2: "raw/0-2", 3: "raw/0-3"}
    assert manifest_version(first.store) == 3


def manifest_version(store: Store) -> int:
    table = pq.read_table(pa.BufferReader(bytes(store.read(MANIFEST))))
    return int(table.schema.metadata[b"version"])


def test_of_two_at_once_one_wins_and_its_tombstones_are_its_own() -> None:
    url = "memory://race"
    plain_set(url, [4, 4])
    one, other = ShardSet.open(url), ShardSet.open(url)

    winner = one.bury(dead([(0, 0), (1, 3)]))
    with pytest.raises(PlanError, match="meanwhile"):
        other.bury(dead([(0, 2), (1, 1)]))

    for shard_set in (winner, ShardSet.open(url)):
        fresh = ShardSet.open(url, version=shard_set.version)
        assert [fresh.dead(0).tolist(), fresh.dead(1).tolist()] == [[0], [3]]
        assert len(fresh.table(["uri"])) == 6


def test_two_that_bury_the_same_both_succeed() -> None:
    url = "memory://same"
    plain_set(url, [4])
    one, other = ShardSet.open(url), ShardSet.open(url)

    versions = [each.bury(dead([(0, 2)])).version for each in (one, other)]

    assert versions == [2, 2]
    assert ShardSet.open(url).num_samples == 3


class DyingStore:
    """A store that is gone after some writes, as the process of its user would be."""

    def __init__(self, inner: Store, *, writes: int) -> None:
        self.inner, self.writes = inner, writes
        self.url = inner.url

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def put(self, *args: Any, **kwargs: Any) -> str:
        if self.writes == 0:
            raise KeyboardInterrupt
        self.writes -= 1
        return self.inner.put(*args, **kwargs)


@pytest.mark.parametrize("writes", range(5))
def test_killed_at_any_write_the_set_is_whole_and_the_next_run_goes_on(writes: int) -> None:
    url = f"memory://killed-{writes}"
    shard_set = plain_set(url, [3, 3])
    shard_set.store = DyingStore(shard_set.store, writes=writes)

    # A part, the version, shards.txt, manifest.parquet.
    if writes < 4:
        with pytest.raises(KeyboardInterrupt):
            shard_set.bury(dead([(0, 1), (1, 2)]))
    else:
        shard_set.bury(dead([(0, 1), (1, 2)]))

    found = ShardSet.open(url)
    assert found.num_samples == len(found.table()) == (4 if writes >= 2 else 6)
    again = found.bury(dead([(0, 1), (1, 2)]))
    assert again.version == 2
    more = again.bury(dead([(0, 0)]))
    assert (more.version, more.num_samples, manifest_version(more.store)) == (3, 3, 3)


def test_a_manifest_written_late_by_a_slow_process_hides_nothing() -> None:
    url = "memory://slow"
    shard_set = plain_set(url, [4])
    late = bytes(shard_set.store.read(MANIFEST))
    shard_set.bury(dead([(0, 0)])).bury(dead([(0, 1)]))

    open_store(url).put(MANIFEST, late)

    assert ShardSet.open(url).version == 3
    assert uris(ShardSet.open(url)) == {2: "raw/0-2", 3: "raw/0-3"}


def test_publishing_again_what_is_there_repairs_what_follows_it() -> None:
    url = "memory://again"
    first = plain_set(url, [2])
    store = first.store
    store.delete([MANIFEST, SHARD_LIST])

    publish(store, first.records(), first.metadata, version=1)

    assert bytes(store.read(MANIFEST)) == bytes(store.read(version_path(1)))
    assert bytes(store.read(SHARD_LIST)).decode().split() == first.names
