"""Duplicates after packing: the same bytes, and nearly the same picture."""

from pathlib import Path

import numpy as np
import pytest

from shards import PackConfig, ShardSet, dedup, pack, tombstones
from shards.dedup import DedupProgress, bury_duplicates, find_duplicates
from shards.dedup import dedup as dedup_set
from shards.errors import ShardError
from tests.support.images import jpeg
from tests.support.made_sets import Made, make_set, plain_set, uris


def details(shard_set: ShardSet) -> dict[str, str]:
    """Detail of each tombstone by the shard's number and position."""
    rows = tombstones.dead_rows(
        shard_set.store, shard_set.names, [record.tombstones for record in shard_set.records()]
    )
    return {f"{r['shard']}:{r['position']}": r["detail"] for r in rows.to_pylist()}


def run(url: str, scratch: Path, *, distance: int, dry_run: bool = False) -> dedup.DedupReport:
    return dedup_set(url, distance=distance, dry_run=dry_run, scratch=scratch)


def test_of_equal_bytes_the_lowest_id_is_kept(tmp_path: Path) -> None:
    one, two = b"same", b"also the same"
    shard_set = make_set(
        "memory://equal",
        [
            [Made(uri="raw/a", data=one), Made(uri="raw/b", data=b"alone")],
            [Made(uri="raw/c", data=two), Made(uri="raw/d", data=one)],
            [Made(uri="raw/e", data=one), Made(uri="raw/f", data=two)],
        ],
    )

    after = bury_duplicates(shard_set, scratch=tmp_path)

    assert uris(after) == {0: "raw/a", 1: "raw/b", 2: "raw/c"}
    assert details(after) == {
        "1:1": "same bytes as raw/a",
        "2:0": "same bytes as raw/a",
        "2:1": "same bytes as raw/c",
    }
    assert bury_duplicates(after, scratch=tmp_path).version == after.version == 2
    assert list(tmp_path.iterdir()) == []


def test_a_kept_one_that_died_leaves_the_next_in_its_place(tmp_path: Path) -> None:
    shard_set = make_set("memory://next", [[Made(uri=f"raw/{n}", data=b"same") for n in range(3)]])
    rows = {"shard": [0], "position": [0], "reason": ["superseded"], "detail": [""]}
    shard_set = shard_set.bury(tombstones.DEAD.empty_table().from_pydict(rows, tombstones.DEAD))

    assert uris(bury_duplicates(shard_set, scratch=tmp_path)) == {1: "raw/1"}


def test_a_packed_folder_with_copies_under_other_names(tmp_path: Path) -> None:
    raw, scratch = tmp_path / "raw", tmp_path / "scratch"
    raw.mkdir()
    scratch.mkdir()
    for n in range(30):
        (raw / f"{n:02}.jpg").write_bytes(jpeg(n % 12))
    pack(str(raw), str(tmp_path / "set"), PackConfig(workers=1, max_shard_samples=4))
    packed = ShardSet.open(str(tmp_path / "set"))

    after = bury_duplicates(packed, scratch=scratch)

    kept = uris(after)
    assert after.num_samples == len(kept) == 12
    assert kept.items() <= uris(packed).items()
    contents = {Path(uri).read_bytes() for uri in kept.values()}
    assert len(contents) == 12


@pytest.mark.parametrize("rows_per_part", [1 << 21, 16])
def test_many_samples_in_many_parts(
    rows_per_part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "_ROWS_PER_PART", rows_per_part)
    monkeypatch.setattr(dedup, "_AT_ONCE", rows_per_part)
    for module in (tombstones, dedup):
        monkeypatch.setattr(module, "SHARDS_PER_PART", 2)
    rng = np.random.default_rng(0)
    numbers = rng.integers(0, 60, size=(9, 20))
    shards = [
        [Made(uri=f"raw/{s}-{p}", data=b"%d" % number) for p, number in enumerate(row)]
        for s, row in enumerate(numbers)
    ]
    shard_set = make_set(f"memory://parts-{rows_per_part}", shards)

    after = bury_duplicates(shard_set, scratch=tmp_path)

    _, first = np.unique(numbers.ravel(), return_index=True)
    assert sorted(uris(after)) == sorted(first.tolist())
    assert after.version == 2
    for place, detail in details(after).items():
        shard, position = map(int, place.split(":"))
        kept = int(np.flatnonzero(numbers.ravel() == numbers[shard, position])[0])
        assert detail == f"same bytes as raw/{kept // 20}-{kept % 20}"


def test_duplicates_are_found_without_being_buried(tmp_path: Path) -> None:
    shard_set = plain_set("memory://found", [3, 3])

    assert sum(len(table) for table in find_duplicates(shard_set, scratch=tmp_path)) == 0


def near_set(name: str) -> ShardSet:
    """Hashes in a chain: 0 bits, 3 bits, 6 bits, 9 bits; and one far away, and one without."""
    return make_set(
        f"memory://near-{name}",
        [
            [
                Made(uri="raw/0", phash=0b0),
                Made(uri="raw/3", phash=0b111),
                Made(uri="raw/none"),
            ],
            [
                Made(uri="raw/6", phash=0b111111),
                Made(uri="raw/far", phash=2**64 - 1),
                Made(uri="raw/9", phash=0b111111111),
            ],
        ],
    )


def test_near_ones_fall_to_one_that_is_kept_never_through_a_chain(tmp_path: Path) -> None:
    before = near_set("chain")

    report = run("memory://near-chain", tmp_path, distance=3)

    after = ShardSet.open("memory://near-chain")
    assert uris(after) == {0: "raw/0", 2: "raw/none", 3: "raw/6", 4: "raw/far"}
    assert details(after) == {"0:1": "3 bits from raw/0", "1:2": "3 bits from raw/6"}
    assert uris(ShardSet.open("memory://near-chain", version=1)) == uris(before)
    assert (report.images, report.without_hash, report.groups, report.buried) == (5, 1, 2, 2)
    assert report.group_sizes == {"2 or 3": 2}
    assert {(group.kept, group.size, group.dead) for group in report.largest} == {
        ("raw/0", 2, (("raw/3", 3),)),
        ("raw/6", 2, (("raw/9", 3),)),
    }


def test_again_finds_nothing_and_a_larger_distance_more(tmp_path: Path) -> None:
    near_set("again")

    assert run("memory://near-again", tmp_path, distance=3).buried == 2
    assert run("memory://near-again", tmp_path, distance=3).buried == 0
    assert ShardSet.open("memory://near-again").version == 2
    more = run("memory://near-again", tmp_path, distance=6)
    assert (more.buried, more.version) == (1, 3)
    assert sorted(uris(ShardSet.open("memory://near-again")).values()) == [
        "raw/0",
        "raw/far",
        "raw/none",
    ]


def test_a_dry_run_tells_the_same_and_changes_nothing(tmp_path: Path) -> None:
    near_set("dry")

    would = run("memory://near-dry", tmp_path, distance=3, dry_run=True)

    assert ShardSet.open("memory://near-dry").version == 1
    did = run("memory://near-dry", tmp_path, distance=3)
    assert (would.buried, would.groups, would.largest) == (did.buried, did.groups, did.largest)
    assert dict(would.rows())["would be buried"] == dict(did.rows())["buried"] == "2"


def test_the_larger_picture_is_kept_then_the_lower_id(tmp_path: Path) -> None:
    make_set(
        "memory://larger",
        [
            [
                Made(uri="raw/small", phash=5),
                Made(uri="raw/wide", phash=5, width=300, height=10),
                Made(uri="raw/large", phash=7, width=200, height=200),
                Made(uri="raw/as large", phash=4, width=400, height=100),
            ]
        ],
    )

    report = run("memory://larger", tmp_path, distance=2)

    assert uris(ShardSet.open("memory://larger")) == {2: "raw/large"}
    assert report.largest[0].dead == (("raw/small", 1), ("raw/wide", 1), ("raw/as large", 2))


def test_distance_zero_is_equal_hashes(tmp_path: Path) -> None:
    make_set("memory://zero", [[Made(uri=f"raw/{n}", phash=n % 3) for n in range(7)]])

    report = run("memory://zero", tmp_path, distance=0)

    assert sorted(uris(ShardSet.open("memory://zero"))) == [0, 1, 2]
    assert report.largest[0].size == 3


def test_thousands_of_black_images_are_one_group(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    others = rng.integers(2**63, 2**64, 200, dtype=np.uint64).tolist()
    hashes = [0] * 6000 + [1] * 6000 + others
    order = rng.permutation(len(hashes)).tolist()
    shards = [
        [Made(uri=f"raw/{n}", phash=hashes[n]) for n in order[s : s + 1000]]
        for s in range(0, len(order), 1000)
    ]
    make_set("memory://black", shards)

    report = run("memory://black", tmp_path, distance=4)

    assert (report.groups, report.buried, report.largest[0].size) == (1, 11_999, 12_000)
    assert report.group_sizes == {"8192 to 16383": 1}
    assert ShardSet.open("memory://black").num_samples == 201


@pytest.mark.parametrize("rows", [1 << 20, 64])
def test_what_is_left_is_the_same_whatever_the_parts(
    rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dedup, "_ROWS_PER_PART", rows)
    monkeypatch.setattr(dedup, "_AT_ONCE", rows)
    rng = np.random.default_rng(4)
    base = rng.integers(0, 2**64, 100, dtype=np.uint64)
    hashes = rng.choice(base, 700)
    for _ in range(3):
        hashes = hashes ^ (np.uint64(1) << rng.integers(0, 64, 700, dtype=np.uint64))
    sides = rng.integers(50, 53, 700).tolist()
    made = [
        Made(uri=f"raw/{n}", phash=one, width=sides[n]) for n, one in enumerate(hashes.tolist())
    ]
    make_set(f"memory://parts-of-near-{rows}", [made[n : n + 100] for n in range(0, 700, 100)])

    run(f"memory://parts-of-near-{rows}", tmp_path, distance=4)

    kept: list[int] = []
    for n in sorted(range(700), key=lambda n: (-made[n].width, n)):
        if not (np.bitwise_count(hashes[kept] ^ hashes[n]) <= 4).any():
            kept.append(n)
    assert sorted(uris(ShardSet.open(f"memory://parts-of-near-{rows}"))) == sorted(kept)


def test_names_are_escaped_where_they_are_shown(tmp_path: Path) -> None:
    name = "raw/\x1b[2J\nevil \u202e.jpg"
    make_set("memory://evil", [[Made(uri=name, phash=1), Made(uri=name + "2", phash=1)]])

    report = run("memory://evil", tmp_path, distance=1)

    assert report.largest[0].kept == name
    text = "".join(value for row in report.rows() for value in row)
    assert text.isprintable()
    assert "\\x1b[2J\\nevil" in text


def test_what_cannot_be_done_is_refused_in_one_line(tmp_path: Path) -> None:
    plain_set("memory://no-hashes", [2])

    with pytest.raises(ShardError, match="no sample has a perceptual hash"):
        run("memory://no-hashes", tmp_path, distance=3)
    for distance in (-1, 17):
        with pytest.raises(ShardError, match=f"from 0 to 16 bits, not {distance}"):
            run("memory://no-hashes", tmp_path, distance=distance)


def test_progress_ends_where_it_said(tmp_path: Path) -> None:
    near_set("progress")
    told: list[DedupProgress] = []

    dedup_set(
        "memory://near-progress", distance=3, dry_run=True, scratch=tmp_path, progress=told.append
    )

    last = {one.stage: one for one in told}
    assert last.keys() == {"reading", "comparing"}
    assert all(one.done == one.total for one in last.values())
