"""The id stream, pure: several sets, versions between epochs, every world, any place to begin."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipelines.errors import OrderError, StalledError, StateError
from pipelines.mixture import Mixture, Place, interleave, share_lanes
from shards import ShardSet
from shards.manifest import ShardRecord, publish
from shards.store import open_store

WORLDS = [*range(1, 11), 12, 14, 15, 16, 48]  # all divide 5,040

SETS = {
    "uneven": [3_000, 7, 6_400, 65, 1, 963, 1_280],
    "one-sample shards": [1] * 6_000,
    "empty shards among others": [5_030, 0, 0, 1_031, 0],
    "a single shard": [11_000],
    "more lanes than samples in any shard": [300] * 40,
}


def bare_set(url: str, samples: Sequence[int], *, version: int = 1) -> ShardSet:
    """A set that has a manifest and nothing else: enough to know the order."""
    records = [
        ShardRecord(
            name=f"{number:05}-{count}.tar",
            index=f"index/{number:05}.parquet",
            generation=0 if number < 3 else 1,
            slots=count,
            samples=count,
            live=count,
            bytes=100 * count,
            sha256="0" * 64,
            tombstones=None,
        )
        for number, count in enumerate(samples)
    ]
    about = [{"generation": 0, "listed": 0, "packed": 0, "already": 0, "rejected": {}}]
    metadata = {
        "sources": "[]", "rejected": "{}", "dead": "{}", "generations": json.dumps(about),
        "set_id": f"the set at {url}",
    }  # fmt: skip
    publish(open_store(url), records, metadata, version=version)
    return ShardSet.open(url)


def mixed(
    sets: Sequence[ShardSet],
    *,
    lanes: int,
    weights: Sequence[float] = (),
    block: int = 64,
    follow: bool = False,
) -> Mixture:
    return Mixture(sets, weights=weights, seed=3, lanes=lanes, block=block, follow=follow)


def ids(mixture: Mixture, place: Place, start: int, stop: int) -> list[tuple[int, int]]:
    """Set and sample id of what stands there."""
    need = mixture.need(place, start, stop)
    found = []
    for source, shard, member in zip(need.sources, need.shards, need.members, strict=True):
        one = mixture.sources[int(source)]
        assert 0 <= member < one.shard_set.samples[shard]
        found.append((one.first_id >> 40, int(one.shard_set.first_ordinal[shard] + member)))
    return found


def stream(
    mixture: Mixture, place: Place, *, steps: int, batch: int
) -> tuple[list[list[tuple[int, int]]], Place]:
    taken = []
    for _ in range(steps):
        taken.append(ids(mixture, place, 0, batch))
        place = mixture.after(place, batch)
    return taken, place


@pytest.mark.parametrize("name", SETS)
@pytest.mark.timeout(120)
def test_every_world_sees_the_same_global_batches(name: str, tmp_path: Path) -> None:
    shard_set = bare_set(str(tmp_path), SETS[name])
    mixture = mixed([shard_set], lanes=5_040)
    whole, _ = stream(mixture, mixture.start(), steps=4, batch=5_040)

    for world_size in WORLDS:
        ranks = [mixed([shard_set], lanes=5_040) for _ in range(world_size)]
        share = 5_040 // world_size
        place = mixture.start()
        for step in range(4):
            parts = [
                ids(mine, place, rank * share, (rank + 1) * share)
                for rank, mine in enumerate(ranks)
            ]
            assert [one for part in parts for one in part] == whole[step]
            place = mixture.after(place, 5_040)


@pytest.mark.timeout(120)
def test_a_run_killed_anywhere_goes_on_with_the_same_samples_in_any_world(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = list(SETS)
    sets = [bare_set(str(tmp_path / name), SETS[name]) for name in names]
    whole = {}
    for name, one in zip(names, sets, strict=True):
        mixture = mixed([one], lanes=240, block=16)
        whole[name], _ = stream(mixture, mixture.start(), steps=120, batch=240)
    mixture = mixed(sets, lanes=240, weights=[5, 1, 1, 2, 3], block=16)
    whole["mixed"], _ = stream(mixture, mixture.start(), steps=120, batch=240)

    for _ in range(200):
        name = [*names, "mixed"][rng.integers(len(names) + 1)]
        killed = int(rng.integers(0, 115))
        chosen = sets if name == "mixed" else [sets[names.index(name)]]
        weights = [5, 1, 1, 2, 3] if name == "mixed" else []
        before = mixed(chosen, lanes=240, weights=weights, block=16)
        place = before.start()
        for _ in range(killed):
            place = before.after(place, 240)
        saved = json.loads(json.dumps(before.state_dict(place)))

        world_size = int(rng.choice([1, 2, 3, 4, 5, 6, 8, 10, 12, 16]))
        share = 240 // world_size
        parts = []
        for rank in range(world_size):
            mine = mixed(chosen, lanes=240, weights=weights, block=16)
            again = Place(
                position=place.position,
                epoch=place.epoch,
                epoch_began=place.epoch_began,
                epoch_length=place.epoch_length,
                sets=mine.load_state_dict(saved),
            )
            assert again == place
            steps = []
            for _ in range(4):
                steps.append(ids(mine, again, rank * share, (rank + 1) * share))
                again = mine.after(again, 240)
            parts.append(steps)

        joined = [[one for part in parts for one in part[step]] for step in range(4)]
        assert joined == whole[name][killed : killed + 4]


def test_of_one_set_an_epoch_of_the_stream_is_an_epoch_of_the_set(tmp_path: Path) -> None:
    mixture = mixed([bare_set(str(tmp_path), [50, 57])], lanes=10, block=8)

    taken, place = stream(mixture, mixture.start(), steps=10, batch=10)

    assert (place.epoch, place.sets[0].epoch, place.epoch_length) == (1, 1, 100)
    assert len({one for batch in taken for one in batch}) == 100


def test_every_batch_holds_the_sets_in_the_proportion_of_their_weights(tmp_path: Path) -> None:
    sets = [bare_set(str(tmp_path / str(n)), [200, 100 * n]) for n in range(1, 4)]
    mixture = mixed(sets, lanes=64, weights=[4, 3, 1])
    assert mixture.lanes_of == [32, 24, 8]

    taken, place = stream(mixture, mixture.start(), steps=30, batch=64)

    for batch in taken:
        assert np.bincount([number for number, _ in batch]).tolist() == [32, 24, 8]
        for quarter in range(4):  # a rank of four
            part = np.bincount([one for one, _ in batch[quarter * 16 : quarter * 16 + 16]])
            assert np.abs(part - [8, 6, 2]).max() <= 1
    # 300 of 32 lanes, 400 of 24, 500 of 8: each set goes through its own epochs.
    assert [one.epoch for one in place.sets] == [3, 1, 0]
    first = [one for batch in taken[:9] for one in batch if one[0] == 0]
    assert len(set(first)) == len(first) == 9 * 32


def test_without_weights_sets_are_mixed_by_their_samples(tmp_path: Path) -> None:
    sets = [bare_set(str(tmp_path / str(n)), [n]) for n in (300, 100)]

    mixture = mixed(sets, lanes=16)

    assert mixture.lanes_of == [12, 4]
    assert mixture.start().epoch_length == 400


def test_two_sets_of_the_same_shape_are_ordered_differently(tmp_path: Path) -> None:
    sets = [bare_set(str(tmp_path / str(n)), [500, 500]) for n in range(2)]
    mixture = mixed(sets, lanes=10)

    taken, _ = stream(mixture, mixture.start(), steps=20, batch=10)

    of_each = [[i for batch in taken for number, i in batch if number == n] for n in (0, 1)]
    assert of_each[0] != of_each[1]


def test_a_set_whose_share_is_no_lane_is_refused(tmp_path: Path) -> None:
    sets = [bare_set(str(tmp_path / str(n)), [1_000]) for n in range(2)]

    with pytest.raises(OrderError, match=r"none of the 8 lanes.*data\.weights"):
        mixed(sets, lanes=8, weights=[1_000, 1])


def test_a_weight_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OrderError, match=r"data\.weights must be above 0"):
        mixed([bare_set(str(tmp_path), [100])], lanes=8, weights=[0])


def test_another_version_enters_when_an_epoch_begins(tmp_path: Path) -> None:
    old = bare_set(str(tmp_path), [40, 40])
    mixture = mixed([old], lanes=8, follow=True)
    place = mixture.start()
    for _ in range(9):
        place = mixture.after(place, 8)
    grown = bare_set(str(tmp_path), [40, 40, 24], version=2)

    assert mixture.undecided(place, within=7) == []
    assert mixture.undecided(place, within=8) == [(0, 1)]
    mixture.decide({(0, 1): 2})
    assert mixture.undecided(place, within=8 + 104 - 1) == []
    assert mixture.undecided(place, within=8 + 104) == [(0, 2)]
    saved = mixture.state_dict(place)
    last, after = stream(mixture, place, steps=1, batch=8)
    mixture.decide({(0, 2): 2})
    taken, end = stream(mixture, after, steps=13, batch=8)

    assert (saved[0]["version"], saved[0]["next_versions"]) == (1, [2])
    assert after.sets[0].version == 2
    assert (after.epoch, after.epoch_length) == (1, 104)
    served = {number for batch in taken for _, number in batch}
    assert served == set(range(104))
    # Who resumes between the decision and the epoch's beginning sees the same.
    resumed = mixed([grown], lanes=8, follow=True)
    sets = resumed.load_state_dict(json.loads(json.dumps(saved)))
    again = Place(position=72, epoch=0, epoch_began=0, epoch_length=80, sets=sets)
    served_last, again = stream(resumed, again, steps=1, batch=8)
    assert served_last == last
    resumed.decide({(0, 2): 2})
    assert stream(resumed, again, steps=13, batch=8) == (taken, end)


def test_versions_that_nothing_needs_any_more_are_let_go(tmp_path: Path) -> None:
    mixture = mixed([bare_set(str(tmp_path), [16])], lanes=8, follow=True)
    place = mixture.start()

    for version in range(2, 7):
        bare_set(str(tmp_path), [16] * version, version=version)
        mixture.decide({(0, place.sets[0].epoch + 1): version})
        while place.sets[0].version < version:
            mixture.need(place, 0, 8)
            place = mixture.after(place, 8)
        mixture.forget_before(place)
        assert len(mixture.sources) == 1

    assert mixture.need(place, 0, 8).sources.tolist() == [max(mixture.sources)] * 8


def test_an_epoch_whose_version_nobody_decides_stalls_instead_of_guessing(tmp_path: Path) -> None:
    mixture = mixed([bare_set(str(tmp_path), [8])], lanes=8, follow=True)

    with pytest.raises(StalledError, match=r"which version epoch 1"):
        mixture.after(mixture.start(), 8, timeout_s=0.05)


def test_a_position_among_other_sets_is_refused_with_both_values(tmp_path: Path) -> None:
    sets = [bare_set(str(tmp_path / str(n)), [100]) for n in range(2)]
    both = mixed(sets, lanes=8, weights=[3, 1])
    saved = both.state_dict(both.start())

    with pytest.raises(StateError, match=r"2 shard sets, this run has 1"):
        mixed(sets[:1], lanes=8).load_state_dict(saved)
    with pytest.raises(StateError, match=r"set_id 'the set at .*0', this run has 'the set at .*1'"):
        mixed(sets[::-1], lanes=8, weights=[3, 1]).load_state_dict(saved)
    with pytest.raises(StateError, match=r"6 lanes for .*, this run has 4: keep data\.weights"):
        mixed(sets, lanes=8, weights=[1, 1]).load_state_dict(saved)
    saved[0]["version"] = 7
    with pytest.raises(StateError, match=r"version 7, this run has 1.*no such version"):
        both.load_state_dict(saved)


def test_without_weights_a_resumed_run_keeps_its_lanes_though_a_set_has_grown(
    tmp_path: Path,
) -> None:
    sets = [bare_set(str(tmp_path / str(n)), [100]) for n in range(2)]
    before = mixed(sets, lanes=8)
    saved = before.state_dict(before.start())
    sets[0] = bare_set(str(tmp_path / "0"), [100, 500], version=2)

    after = mixed(sets, lanes=8)
    after.load_state_dict(saved)

    assert after.lanes_of == before.lanes_of == [4, 4]


@pytest.mark.parametrize("weights", [[1.0], [1, 1, 1], [0.2, 0.3, 0.5], [1e6, 1, 1]])
@pytest.mark.parametrize("lanes", [1, 7, 256, 5_040])
def test_shares_add_up_and_are_as_near_as_whole_lanes_can_be(
    weights: list[float], lanes: int
) -> None:
    shares = share_lanes(lanes, weights)

    assert sum(shares) == lanes
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - lanes * weight / sum(weights)) < 1


def test_interleaving_spreads_evenly() -> None:
    row = interleave([6, 3, 1])

    assert np.bincount(row).tolist() == [6, 3, 1]
    assert np.abs(np.cumsum(row == 0) - 0.6 * np.arange(1, 11)).max() < 1
    assert np.abs(np.cumsum(row == 1) - 0.3 * np.arange(1, 11)).max() < 1


def test_without_weights_no_set_is_left_out_however_small(tmp_path: Path) -> None:
    sets = [bare_set(str(tmp_path / str(n)), [count]) for n, count in enumerate((100_000, 40, 30))]

    assert mixed(sets, lanes=16).lanes_of == [14, 1, 1]


def test_a_version_that_was_decided_is_the_last_until_another_is(tmp_path: Path) -> None:
    mixture = mixed([bare_set(str(tmp_path), [16])], lanes=8, follow=True)
    place = mixture.start()
    bare_set(str(tmp_path), [24], version=2)

    assert mixture.last_decided(place, 0) == 1
    mixture.decide({(0, 1): 1, (0, 2): 2})

    assert mixture.last_decided(place, 0) == 2
