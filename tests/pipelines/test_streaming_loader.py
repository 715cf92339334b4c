import dataclasses
import json
import os
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines import (
    BadDataError,
    Batch,
    DataConfig,
    OrderError,
    StalledError,
    StateError,
    iterate_once,
    open_loader,
)
from pipelines.cpu_loader import CpuViews
from pipelines.order import Order
from pipelines.quarantine import Quarantine, candidates
from pipelines.streaming_loader import StreamingLoader
from shards import ShardSet
from shards.errors import NotFoundError
from shards.tombstones import DEAD
from tests.support.shard_sets import (
    FaultyStore,
    flip_a_byte,
    locate,
    make_shard_set,
    overwrite,
    stored,
    undecodable,
)

dali = pytest.param("dali", marks=pytest.mark.dali)
GLOBAL_BATCH = 12


def settings(
    shard_set: ShardSet, *, loader: Literal["auto", "dali", "cpu"] = "dali", view_size: int = 24
) -> DataConfig:
    return DataConfig(
        shards=(shard_set.url,),
        global_batch_size=GLOBAL_BATCH,
        block_samples=8,
        view_size=view_size,
        loader=loader,
        num_threads=1,
        wait_timeout_s=30,
        max_bad_frac=0.5,
    )


@contextmanager
def opened(
    config: DataConfig, *, seed: int = 5, rank: int = 0, world_size: int = 1
) -> Iterator[StreamingLoader]:
    loader = open_loader(config, seed=seed, rank=rank, world_size=world_size, device_index=None)
    assert isinstance(loader, StreamingLoader)
    try:
        yield loader
    finally:
        loader.close()


def take(loader: StreamingLoader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def without_decisions(state: dict[str, Any]) -> dict[str, Any]:
    """A position; ranks that cannot agree decide on no versions to come."""
    return {**state, "sets": [{**one, "next_versions": []} for one in state["sets"]]}


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert one.positions.tolist() == other.positions.tolist()
        assert one.sample_ids.tolist() == other.sample_ids.tolist()
        assert torch.equal(one.view_q, other.view_q)
        assert torch.equal(one.view_k, other.view_k)


def joined(parts: list[Batch]) -> Batch:
    return Batch(
        view_q=torch.cat([part.view_q for part in parts]),
        view_k=torch.cat([part.view_k for part in parts]),
        sample_ids=np.concatenate([part.sample_ids for part in parts]),
        positions=np.concatenate([part.positions for part in parts]),
        replaced=tuple(one for part in parts for one in part.replaced),
    )


@pytest.mark.parametrize("kind", [dali, "cpu"])
def test_epochs_follow_each_other_in_the_order_of_order(
    shard_set: ShardSet, kind: Literal["dali", "cpu"]
) -> None:
    order = Order(shard_set.samples, seed=5, lanes=GLOBAL_BATCH, block=8)
    with opened(settings(shard_set, loader=kind)) as loader:
        steps = loader.steps_per_epoch
        batches = take(loader, 2 * steps + 1)

    assert steps == 12
    assert np.concatenate([b.positions for b in batches]).tolist() == list(range(25 * GLOBAL_BATCH))
    for epoch in (0, 1):
        shards, members = order.samples(epoch, 0, order.epoch_length)
        served = np.concatenate(
            [b.sample_ids for b in batches[epoch * steps : (epoch + 1) * steps]]
        )
        assert served.tolist() == (shard_set.first_ordinal[shards] + members).tolist()
    for batch in batches:
        assert batch.view_q.shape == batch.view_k.shape == (GLOBAL_BATCH, 3, 24, 24)
        assert batch.view_q.dtype == torch.float32
        assert batch.view_q.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.dali
@pytest.mark.parametrize("taken", [0, 1, 7, 12, 17])
def test_a_resumed_loader_gives_the_very_pixels(shard_set: ShardSet, taken: int) -> None:
    with opened(settings(shard_set)) as loader:
        take(loader, taken)
        saved = json.dumps(loader.state_dict())
        expected = take(loader, 8)

    with opened(settings(shard_set)) as loader:
        loader.load_state_dict(json.loads(saved))
        assert loader.state_dict() == json.loads(saved)
        assert_same(take(loader, 8), expected)


@pytest.mark.dali
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_parts_are_the_one_rank_batch_to_the_pixel(
    shard_set: ShardSet, world_size: int
) -> None:
    with opened(settings(shard_set)) as loader:
        whole = take(loader, 14)
        state = loader.state_dict()

    parts = []
    for rank in range(world_size):
        with opened(settings(shard_set), rank=rank, world_size=world_size) as loader:
            parts.append(take(loader, 14))
            assert without_decisions(loader.state_dict()) == without_decisions(state)

    assert_same([joined(list(step)) for step in zip(*parts, strict=True)], whole)


@pytest.mark.dali
def test_a_run_of_two_ranks_continues_as_three(shard_set: ShardSet) -> None:
    with opened(settings(shard_set)) as loader:
        expected = take(loader, 15)[9:]
    with opened(settings(shard_set), rank=1, world_size=2) as loader:
        take(loader, 9)
        saved = loader.state_dict()

    parts = []
    for rank in range(3):
        with opened(settings(shard_set), rank=rank, world_size=3) as loader:
            loader.load_state_dict(saved)
            parts.append(take(loader, 6))

    assert_same([joined(list(step)) for step in zip(*parts, strict=True)], expected)


def test_the_position_is_that_of_the_batches_taken_not_of_those_read_ahead(
    shard_set: ShardSet,
) -> None:
    with opened(settings(shard_set, loader="cpu")) as loader:
        take(loader, 3)
        state = loader.state_dict()

    assert (state["epoch"], state["position"]) == (0, 36)


def test_a_state_of_another_stream_is_refused_with_both_values(shard_set: ShardSet) -> None:
    with opened(settings(shard_set, loader="cpu")) as loader:
        state = loader.state_dict()
        for name, other in [
            ("algorithm", "older"), ("seed", 6), ("lanes", 24), ("block", 64), ("format", 0),
        ]:  # fmt: skip
            with pytest.raises(
                StateError, match=rf"{name} '?{other}'?, this run has '?{state[name]}"
            ):
                loader.load_state_dict({**state, name: other})
        other_set = [{**state["sets"][0], "set_id": "abc"}]
        with pytest.raises(StateError, match=r"set_id 'abc', this run has"):
            loader.load_state_dict({**state, "sets": other_set})
        loader.load_state_dict(state)


def test_a_new_version_enters_at_an_epochs_start_and_a_resumed_run_agrees(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path, count=60, shard_samples=16)  # an epoch: 5 batches of 12
    config = settings(shard_set, loader="cpu")
    row = {"shard": 0, "position": 1, "reason": "takedown", "detail": ""}
    with opened(config) as loader:
        assert loader.steps_per_epoch == 5
        first = next(loader)  # decides on all epochs that may be read soon
        saved = loader.state_dict()
        shard_set.bury(pa.Table.from_pylist([row], schema=DEAD))
        following = take(loader, 4 + 9 * 5)  # the first epochs were decided on by then
        assert (loader.epoch, loader.steps_per_epoch) == (10, 4)
        eleventh = take(loader, 4)

    assert saved["sets"][0]["next_versions"] == [1] * 9
    served = [
        np.concatenate([b.sample_ids for b in part]) for part in ([first, *following], eleventh)
    ]
    assert 1 in served[0]
    assert 1 not in served[1]
    with opened(config) as loader:
        loader.load_state_dict(saved)
        assert loader.state_dict() == saved
        assert_same(take(loader, 53), following + eleventh)


def test_a_new_version_enters_where_memory_is_short_and_a_step_takes_few_of_the_lanes(
    tmp_path: Path,
) -> None:
    shard_set = make_shard_set(tmp_path, count=240, shard_samples=40)
    config = dataclasses.replace(
        settings(shard_set, loader="cpu"),
        lanes_per_slot=16, block_samples=4, buffer_bytes=500_000,
    )  # fmt: skip
    row = {"shard": 0, "position": 1, "reason": "takedown", "detail": ""}
    with opened(config) as loader:
        next(loader)
        shard_set.bury(pa.Table.from_pylist([row], schema=DEAD))
        while loader.state_dict()["sets"][0]["version"] == 1 or loader.epoch < 12:
            next(loader)


def test_ranks_take_the_version_that_rank_0_found(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path, count=40, shard_samples=16)
    row = {"shard": 0, "position": 1, "reason": "takedown", "detail": ""}
    config = settings(shard_set, loader="cpu")
    said: list[object] = []

    def rank_0(value: object) -> object:
        said.append(value)
        return value

    first = open_loader(config, seed=5, rank=0, world_size=2, device_index=None, agree=rank_0)
    shard_set.bury(pa.Table.from_pylist([row], schema=DEAD))
    heard = iter(said)
    second = open_loader(
        config, seed=5, rank=1, world_size=2, device_index=None, agree=lambda _: next(heard)
    )
    try:
        assert first.state_dict() == second.state_dict()
        parts: list[list[Batch]] = [[], []]
        for _ in range(60):
            for rank, loader in enumerate((first, second)):
                parts[rank].append(next(loader))
        assert first.state_dict() == second.state_dict()
        assert first.state_dict()["sets"][0]["version"] == 2
    finally:
        first.close()
        second.close()
    for epoch in range(20):
        ids = np.concatenate(
            [part[step].sample_ids for part in parts for step in range(3 * epoch, 3 * epoch + 3)]
        )
        assert len(set(ids.tolist())) == 36


def test_a_world_that_cannot_agree_stays_with_its_version(tmp_path: Path) -> None:
    shard_set = make_shard_set(tmp_path, count=40, shard_samples=16)
    row = {"shard": 0, "position": 1, "reason": "takedown", "detail": ""}
    with opened(settings(shard_set, loader="cpu"), rank=0, world_size=2) as loader:
        next(loader)
        shard_set.bury(pa.Table.from_pylist([row], schema=DEAD))
        take(loader, 60)

        assert loader.state_dict()["sets"][0]["version"] == 1


def test_several_sets_are_mixed_by_weight(tmp_path: Path) -> None:
    sets = [make_shard_set(tmp_path / str(n), count=40, shard_samples=16) for n in range(2)]
    config = dataclasses.replace(
        settings(sets[0], loader="cpu"), shards=tuple(one.url for one in sets), weights=(2.0, 1.0)
    )
    with opened(config) as loader:
        assert loader.steps_per_epoch == 6
        batches = take(loader, 14)
        saved = loader.state_dict()
        following = take(loader, 3)

    for batch in batches:
        assert np.bincount(batch.sample_ids >> 40).tolist() == [8, 4]
    with opened(config) as loader:
        loader.load_state_dict(json.loads(json.dumps(saved)))
        assert_same(take(loader, 3), following)


def test_neither_threads_nor_prefetch_nor_memory_change_what_is_served(
    shard_set: ShardSet,
) -> None:
    config = settings(shard_set, loader="cpu")
    with opened(config) as loader:
        expected = take(loader, 14)

    for changes in (
        {"num_threads": 3}, {"prefetch_batches": 1}, {"prefetch_batches": 6},
        {"buffer_bytes": 40_000}, {"buffer_bytes": 1},
    ):  # fmt: skip
        with opened(dataclasses.replace(config, **changes)) as loader:
            assert_same(take(loader, 14), expected)


def test_one_batch_is_handed_out_for_ever_in_headspace_mode(shard_set: ShardSet) -> None:
    config = dataclasses.replace(settings(shard_set, loader="cpu"), mode="headspace")
    real = settings(shard_set, loader="cpu")
    with opened(real) as loader:
        first = next(loader)

    headspace = open_loader(config, seed=5, rank=0, world_size=1, device_index=None)
    batches = [next(headspace) for _ in range(3)]
    headspace.close()

    assert [int(batch.positions[0]) for batch in batches] == [0, 12, 24]
    for batch in batches:
        assert torch.equal(batch.view_q, first.view_q)


def test_no_shard_set_is_needed_in_synthetic_mode() -> None:
    config = DataConfig(mode="synthetic", global_batch_size=8, view_size=16, view_dtype="uint8")

    batch = next(open_loader(config, seed=5, rank=1, world_size=2, device_index=None))

    assert batch.view_q.shape == (4, 3, 16, 16)
    assert batch.view_q.dtype == torch.uint8
    assert batch.positions.tolist() == [4, 5, 6, 7]


def test_the_global_batch_may_change_to_a_divisor_of_the_lanes(shard_set: ShardSet) -> None:
    config = settings(shard_set, loader="cpu")
    with opened(config) as loader:
        take(loader, 3)
        state = loader.state_dict()
        following = take(loader, 2)
    smaller = dataclasses.replace(config, global_batch_size=6, lanes_per_slot=2)

    with opened(smaller) as loader:
        loader.load_state_dict(state)
        served = np.concatenate([batch.sample_ids for batch in take(loader, 4)])

    assert served.tolist() == np.concatenate([batch.sample_ids for batch in following]).tolist()


def test_a_position_between_two_global_batches_is_refused(shard_set: ShardSet) -> None:
    config = dataclasses.replace(
        settings(shard_set, loader="cpu"), global_batch_size=6, lanes_per_slot=2
    )
    with opened(config) as loader:
        take(loader, 1)
        state = loader.state_dict()

    with (
        opened(settings(shard_set, loader="cpu")) as loader,
        pytest.raises(StateError, match=r"6 samples.*global_batch_size 12"),
    ):
        loader.load_state_dict(state)


def test_a_world_that_cannot_share_the_batch_is_refused(shard_set: ShardSet) -> None:
    with pytest.raises(OrderError, match="one of 1, 2, 3, 4, 6, 12 ranks"):
        open_loader(settings(shard_set), seed=0, rank=0, world_size=8, device_index=None)


def test_too_few_samples_for_one_batch_are_refused(shard_set: ShardSet) -> None:
    config = dataclasses.replace(settings(shard_set), global_batch_size=256)

    with pytest.raises(OrderError, match=r"150 samples, fewer than its 256 lanes"):
        open_loader(config, seed=0, rank=0, world_size=1, device_index=None)


@pytest.mark.parametrize("kind", [dali, "cpu"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_only_the_decoder_finds_bad_is_replaced_alike_in_every_world(
    own_shard_set: ShardSet, kind: Literal["dali", "cpu"], world_size: int
) -> None:
    png = next(i for i in range(60) if stored(own_shard_set, i).startswith(b"\x89PNG"))
    broken = overwrite(own_shard_set, png, undecodable(own_shard_set, png), fix_checksum=True)

    parts, records = [], []
    for rank in range(world_size):
        with opened(settings(broken, loader=kind), rank=rank, world_size=world_size) as loader:
            parts.append(take(loader, loader.steps_per_epoch))
            records += [one for one in loader.quarantined() if one.position < 60]
            assert loader.stats().replaced == sum(b.num_replaced for b in parts[-1])
    whole = [joined(list(step)) for step in zip(*parts, strict=True)]

    (record,) = records
    served = np.concatenate([batch.sample_ids for batch in whole])
    assert [one for batch in whole for one in batch.replaced] == [record]
    assert record.sample_id == png
    assert "decode" in record.reason
    assert sum(batch.num_replaced for batch in whole) == 1
    assert png not in served
    order = Order(broken.samples, seed=5, lanes=GLOBAL_BATCH, block=8)
    shards, members = order.samples(0, 0, 60)
    planned = broken.first_ordinal[shards] + members
    assert np.flatnonzero(served != planned).tolist() == [record.position]
    shard, member = locate(broken, png)
    order = candidates(
        record.position, shard, member, shard_samples=broken.samples, block=8, seed=5
    )
    assert served[record.position] == broken.first_ordinal[shard] + next(order)[1]


def test_too_many_bad_samples_stop_the_loader(own_shard_set: ShardSet) -> None:
    broken = own_shard_set
    for number in range(0, 60, 2):
        broken = overwrite(broken, number, flip_a_byte(stored(broken, number)))
    config = dataclasses.replace(settings(broken, loader="cpu"), max_bad_frac=0.01)

    with opened(config) as loader, pytest.raises(BadDataError, match=r"data\.max_bad_frac 0\.01"):
        take(loader, 5)


def test_a_store_error_reaches_the_consumer(own_shard_set: ShardSet) -> None:
    with opened(settings(own_shard_set, loader="cpu")) as loader:
        Path(own_shard_set.url, own_shard_set.names[0]).unlink()

        with pytest.raises(NotFoundError, match=own_shard_set.names[0]):
            take(loader, 5)


def test_a_silent_store_stalls_with_a_message_and_close_returns(own_shard_set: ShardSet) -> None:
    config = dataclasses.replace(settings(own_shard_set, loader="cpu"), wait_timeout_s=0.3)
    with opened(config) as loader:
        faulty = FaultyStore(own_shard_set.store)
        loader._mixture.shard_sets[0].store = faulty
        faulty.hold.clear()

        with pytest.raises(StalledError, match=r"0\.3 s.*(ready|waiting for)"):
            next(loader)
        faulty.hold.set()


def test_the_cores_of_a_machine_are_shared_by_the_ranks_on_it(shard_set: ShardSet) -> None:
    config = dataclasses.replace(settings(shard_set, loader="cpu"), num_threads=0)
    cores = len(os.sched_getaffinity(0))

    for on_this_machine, threads in {
        1: cores,
        2: max(1, cores // 2),
        4: max(1, cores // 4),
    }.items():
        loader = open_loader(
            config,
            seed=5,
            rank=0,
            world_size=4,
            device_index=None,
            local_world_size=on_this_machine,
        )
        assert isinstance(loader, StreamingLoader)
        assert isinstance(loader._maker, CpuViews)
        assert loader._maker._num_threads == threads
        loader.close()


@pytest.mark.parametrize("kind", [dali, "cpu"])
def test_close_leaves_no_thread_and_is_harmless_twice(
    shard_set: ShardSet, kind: Literal["dali", "cpu"]
) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with opened(settings(shard_set, loader=kind)) as loader:
        take(loader, 2)
        loader.close()

    left = {thread.name for thread in threading.enumerate()} - before
    assert not {name for name in left if name.startswith(("stream", "views", "block", "decode"))}


def test_statistics_count_what_was_taken(shard_set: ShardSet) -> None:
    with opened(settings(shard_set, loader="cpu")) as loader:
        assert loader.stats().samples == 0
        take(loader, 5)
        stats = loader.stats()

    assert stats.samples == 60
    assert stats.stream.read_requests > 0
    assert stats.stream.read_bytes >= stats.stream.used_bytes > 60 * 1000
    assert stats.stream.used_samples >= 60
    stream, views = stats.stages
    assert (stream.name, views.name) == ("stream", "views")
    assert stream.batches >= views.batches >= 5
    assert views.work_s > 0
    assert stats.batch_wait_s > 0


@pytest.mark.parametrize("kind", [dali, "cpu"])
def test_iterate_once_gives_every_sample_once_in_order(
    shard_set: ShardSet, kind: Literal["dali", "cpu"]
) -> None:
    parts = list(once(shard_set, loader=kind))

    assert np.concatenate([ids for ids, _ in parts]).tolist() == list(range(150))
    assert [len(ids) for ids, _ in parts] == [32, 32, 32, 32, 22]
    assert all(images.shape == (len(ids), 3, 24, 24) for ids, images in parts)


@pytest.mark.dali
def test_iterate_once_shows_the_same_pixels_by_dali_and_torch(shard_set: ShardSet) -> None:
    ours = torch.cat([images for _, images in once(shard_set, loader="dali")])
    theirs = torch.cat([images for _, images in once(shard_set, loader="cpu")])

    assert (ours - theirs).abs().mean() * 255 * 0.225 < 0.35


def test_iterate_once_takes_given_ordinals(shard_set: ShardSet) -> None:
    parts = list(once(shard_set, loader="cpu", ordinals=np.array([149, 3, 77, 40, 3])))

    (ids, images), = parts  # fmt: skip
    assert ids.tolist() == [3, 40, 77, 149]
    assert len(images) == 4


@pytest.mark.parametrize("kind", [dali, "cpu"])
def test_iterate_once_leaves_out_bad_samples_and_says_so(
    own_shard_set: ShardSet, kind: Literal["dali", "cpu"], caplog: pytest.LogCaptureFixture
) -> None:
    png = next(i for i in range(60) if stored(own_shard_set, i).startswith(b"\x89PNG"))
    broken = overwrite(own_shard_set, png, undecodable(own_shard_set, png), fix_checksum=True)
    broken = overwrite(broken, 59, flip_a_byte(stored(broken, 59)))

    parts = list(once(broken, loader=kind, batch_size=59))

    served = np.concatenate([ids for ids, _ in parts]).tolist()
    assert served == [i for i in range(59) if i != png]
    assert [len(ids) for ids, _ in parts] == [58]
    assert "2 of 60 samples" in caplog.text


def test_iterate_once_gives_whole_shards_one_after_another(own_shard_set: ShardSet) -> None:
    sizes = own_shard_set.slots.tolist()
    assert len(sizes) > 2, "or no shard is left out"
    first = own_shard_set.first_ordinal.tolist()
    bad = first[2] + 1
    broken = overwrite(own_shard_set, bad, flip_a_byte(stored(own_shard_set, bad)))
    quarantine = Quarantine(max_bad_frac=1.0, world_size=1)

    parts = [
        ids.tolist()
        for ids, _ in iterate_once(
            broken,
            ordinals=None,
            shards=[2, 0],
            view_size=24,
            batch_size=7,
            loader="cpu",
            num_threads=1,
            device_index=None,
            quarantine=quarantine,
        )
    ]

    wanted = [first[shard] + place for shard in (2, 0) for place in range(sizes[shard])]
    assert [one for part in parts for one in part] == [one for one in wanted if one != bad]
    for part in parts:
        shards = np.searchsorted(own_shard_set.first_ordinal, part, side="right")
        assert len(set(shards.tolist())) == 1
    assert [one.sample_id for one in quarantine.records()] == [bad]


def test_iterate_once_stopped_early_leaves_no_thread(shard_set: ShardSet) -> None:
    parts = once(shard_set, loader="cpu")
    next(parts)
    parts.close()

    assert not [t.name for t in threading.enumerate() if t.name.startswith(("stream", "decode"))]


def test_iterate_once_waits_longer_than_the_store_of_its_set_tries_again(
    own_shard_set: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.stream._CLOSE_S", 0.2)  # the store is silent for ever
    shard_set = ShardSet.open(own_shard_set.url, deadline_s=0.7)
    faulty = FaultyStore(shard_set.store)
    shard_set.store = faulty
    faulty.hold.clear()

    with pytest.raises(StalledError, match=r"nothing for 1 s|no batch for 1 s"):
        next(once(shard_set, loader="cpu"))
    faulty.hold.set()


def once(
    shard_set: ShardSet,
    *,
    loader: Literal["dali", "cpu"],
    ordinals: np.ndarray | None = None,
    batch_size: int = 32,
) -> Generator[tuple[np.ndarray, torch.Tensor], None, None]:
    return iterate_once(
        shard_set,
        ordinals=ordinals,
        view_size=24,
        batch_size=batch_size,
        loader=loader,
        num_threads=1,
        device_index=None,
    )
