import itertools
import time
import tracemalloc

import numpy as np
import pytest

from pipelines.errors import OrderError
from pipelines.order import Order, rank_positions

SETS = {
    "uneven": [100, 7, 64, 65, 1, 63, 128],
    "one-sample shards": [1] * 50,
    "an empty shard among others": [30, 0, 31, 0],
    "a single shard": [200],
    "fewer shards than lanes": [40, 41],
}


def ids(order: Order, samples: list[int], epoch: int, start: int, stop: int) -> np.ndarray:
    first = np.cumsum(samples) - samples
    shard, member = order.samples(epoch, start, stop)
    assert (member < np.asarray(samples)[shard]).all()
    assert (member >= 0).all()
    return first[shard] + member


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("lanes", [1, 3, 8, 30])
@pytest.mark.parametrize("block", [1, 16, 64])
def test_an_epoch_serves_no_sample_twice_and_leaves_fewer_than_the_lanes(
    name: str, lanes: int, block: int
) -> None:
    samples = SETS[name]
    order = Order(np.array(samples), seed=5, lanes=lanes, block=block)

    for epoch in range(3):
        served = ids(order, samples, epoch, 0, order.epoch_length)

        assert len(np.unique(served)) == order.epoch_length == sum(samples) // lanes * lanes


def test_what_one_epoch_leaves_over_another_serves() -> None:
    samples = [50, 57, 20]
    order = Order(np.array(samples), seed=1, lanes=60, block=8)

    served = {i for epoch in range(40) for i in ids(order, samples, epoch, 0, 120).tolist()}

    assert served == set(range(127))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_the_parts_of_all_ranks_are_the_global_batch(world_size: int) -> None:
    samples = SETS["uneven"]
    order = Order(np.array(samples), seed=2, lanes=24, block=16)

    for batch in range(order.epoch_length // 12):
        parts = [
            ids(
                order,
                samples,
                1,
                *rank_positions(batch, global_batch_size=12, rank=r, world_size=world_size),
            )
            for r in range(world_size)
        ]

        whole = ids(order, samples, 1, batch * 12, batch * 12 + 12)
        assert np.concatenate(parts).tolist() == whole.tolist()


def test_any_position_is_computed_without_those_before_it() -> None:
    samples = SETS["uneven"]
    whole = ids(Order(np.array(samples), seed=3, lanes=8, block=16), samples, 4, 0, 424)

    for start, stop in [(0, 1), (13, 14), (100, 250), (423, 424), (9, 9)]:
        fresh = Order(np.array(samples), seed=3, lanes=8, block=16)
        assert ids(fresh, samples, 4, start, stop).tolist() == whole[start:stop].tolist()


def test_seed_and_epoch_each_give_another_order() -> None:
    samples = [64] * 8
    orders = [
        tuple(ids(Order(np.array(samples), seed=seed, lanes=4, block=16), samples, epoch, 0, 512))
        for seed, epoch in itertools.product((0, 1), (0, 1))
    ]

    assert len(set(orders)) == 4


def test_the_order_is_the_same_for_ever() -> None:
    # Resumed runs depend on it: another order needs another name in pipelines.order.ALGORITHM.
    shard, member = Order(np.array([10, 20, 5]), seed=11, lanes=5, block=4).samples(2, 0, 12)

    assert shard.tolist() == [1, 1, 1, 2, 0, 1, 1, 1, 2, 0, 1, 1]
    assert member.tolist() == [11, 13, 7, 1, 2, 8, 3, 5, 0, 3, 10, 1]


def test_a_lane_stays_in_a_block_until_it_is_used_up() -> None:
    samples = [256] * 4
    order = Order(np.array(samples), seed=9, lanes=4, block=32)
    shard, member = order.samples(0, 0, order.epoch_length)

    for lane in range(4):
        blocks = shard[lane::4] * 8 + member[lane::4] // 32
        changes = np.count_nonzero(np.diff(blocks))
        assert changes == 256 // 32 - 1


def test_blocks_and_their_samples_are_shuffled() -> None:
    order = Order(np.array([4096]), seed=0, lanes=1, block=64)
    _, member = order.samples(0, 0, 4096)

    assert (np.diff(member) == 1).mean() < 0.05
    assert (np.diff(member[::64] // 64) == 1).mean() < 0.1


def test_too_few_samples_are_refused_with_both_numbers() -> None:
    with pytest.raises(OrderError, match=r"31 samples.*32 lanes.*lower data.global_batch_size"):
        Order(np.array([30, 1]), seed=0, lanes=32, block=4)


def test_a_world_that_does_not_divide_the_batch_is_told_which_do() -> None:
    with pytest.raises(OrderError, match=r"5 ranks.*12.*one of 1, 2, 3, 4, 6, 12 ranks"):
        rank_positions(0, global_batch_size=12, rank=0, world_size=5)


def test_a_billion_samples_cost_memory_by_shards_only() -> None:
    samples = np.full(100_000, 10_000)

    tracemalloc.start()
    order = Order(samples, seed=0, lanes=256, block=64)
    order.samples(3, 256 * 1_000_000, 256 * 1_000_000 + 256)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()

    assert peak < 32 * 2**20


def test_two_hundred_thousand_shards_are_ready_at_once_anywhere() -> None:
    samples = np.full(200_000, 5_000)

    tracemalloc.start()
    order = Order(samples, seed=0, lanes=4_096, block=64)
    order.samples(3, 0, 1)  # the layout of the epoch
    built = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    times = []
    for step in range(100_000, 100_100):
        began = time.process_time()
        order.samples(3, 4_096 * step, 4_096 * step + 512)
        times.append(time.process_time() - began)

    assert built < 200 * 2**20
    assert times[0] < 0.05
    assert np.median(times[1:]) < 0.005
