"""The measures of shuffling: known orders give the figures that arithmetic gives."""

import numpy as np
import pytest

from pipelines.order import Order
from pipelines.shuffle_quality import (
    WEBDATASET_WORKERS,
    Batches,
    ByOrder,
    Epochs,
    Mixing,
    Neighbours,
    Recorded,
    Sequential,
    Served,
    Uniform,
    mixing,
    over_epochs,
    webdataset_epoch,
)

pytestmark = pytest.mark.timeout(60)

# The set of the table in the design's reference: 1,024 shards of 1,024, 64 ranks of 64.
SHARDS = np.full(1024, 1024, dtype=np.int64)
COUNT = int(SHARDS.sum())
BATCHES = Batches(global_batch_size=4096, world_size=64, queue_size=65_536)
BLOCK = 256


def measured(served: Served) -> tuple[Mixing, Epochs]:
    found = over_epochs(served, SHARDS, BATCHES, block=BLOCK, epochs=2)
    assert found is not None
    return mixing(served, Neighbours.of_shards(SHARDS), BATCHES, epochs=2), found


def lanes(count: int) -> Served:
    return ByOrder(Order(SHARDS, seed=0, lanes=count, block=BLOCK), SHARDS)


def test_a_lane_for_each_place_of_the_batch_mixes_as_the_reference_says() -> None:
    mixed, epochs = measured(lanes(4096))

    assert mixed.pairs_global == pytest.approx(0.75, abs=0.005)
    assert mixed.groups_global == 1024
    assert mixed.pairs_queue == pytest.approx(1, abs=0.02)
    assert epochs.mates == pytest.approx(1, abs=0.02)
    assert epochs.reach == pytest.approx(0.99, abs=0.01)
    assert epochs.live_shards == 1024
    assert epochs.read_amplification == 1
    assert epochs.live_blocks == 64


def test_fewer_lanes_than_shards_bring_neighbours_together() -> None:
    mixed, epochs = measured(lanes(256))

    assert mixed.pairs_global == pytest.approx(3.75, abs=0.01)
    assert epochs.live_shards == 256
    # 16 of a block stand in one batch, and so again in the next epoch: 15 of 255 others meet.
    same_block = 15 / 4095
    assert epochs.mates == pytest.approx(1 - same_block + same_block * 15 / 255 * 256, abs=0.02)


def test_storage_order_keeps_all_neighbours_together() -> None:
    mixed, epochs = measured(Sequential(COUNT, epoch_length=COUNT))

    assert mixed.pairs_global == pytest.approx(256, rel=0.001)
    assert epochs.mates == pytest.approx(256, rel=0.001)
    assert (mixed.groups_global, mixed.groups_rank) == (4, 1)
    assert mixed.lag_1 == pytest.approx(1, abs=0.001)
    assert mixed.chi_square == pytest.approx(4096, rel=0.001)
    assert (epochs.reach, epochs.live_shards) == (0.5, 1)
    assert epochs.read_amplification == 4  # a rank takes 64 samples of a block of 256


def test_a_uniform_permutation_is_the_measure_of_all() -> None:
    mixed, epochs = measured(Uniform(COUNT, epoch_length=COUNT, seed=3))

    for excess in (mixed.pairs_global, mixed.pairs_rank, mixed.pairs_queue, epochs.mates):
        assert excess == pytest.approx(1, abs=0.02)
    assert mixed.groups_rank == pytest.approx(62.0, abs=0.2)
    assert mixed.groups_global == pytest.approx(1005, abs=1)
    assert mixed.chi_square == pytest.approx(1, abs=0.05)
    assert mixed.lag_1 == pytest.approx(0, abs=0.01)
    assert epochs.read_amplification == pytest.approx(62.9, abs=0.1)


def test_of_a_large_set_windows_are_looked_at_and_whole_epochs_are_not() -> None:
    shards = np.full(20_000, 1000, dtype=np.int64)
    served = ByOrder(Order(shards, seed=0, lanes=4096, block=64), shards)

    mixed = mixing(served, Neighbours.of_shards(shards), BATCHES, epochs=2)

    assert mixed.pairs_global is not None
    assert mixed.pairs_global < 4
    assert over_epochs(served, shards, BATCHES, block=64, epochs=2) is None


def test_neighbours_in_the_bucket_are_those_with_the_next_uris() -> None:
    places = np.array([3, 0, 4, 1, 2])  # of samples 0 to 4

    rows = Neighbours.in_rows_of(2, places)

    assert rows.group(np.arange(5)).tolist() == [1, 0, 2, 0, 1]
    assert rows.chance() == pytest.approx(2 * 2 / (5 * 4))


def test_uneven_and_empty_shards_are_measured() -> None:
    shards = np.array([5, 0, 1, 30, 12], dtype=np.int64)
    batches = Batches(global_batch_size=8, world_size=2, queue_size=16)
    served = ByOrder(Order(shards, seed=0, lanes=8, block=4), shards)

    mixed = mixing(served, Neighbours.of_shards(shards), batches, epochs=2)
    epochs = over_epochs(served, shards, batches, block=4, epochs=2)

    assert mixed.pairs_global is not None
    assert epochs is not None
    assert 1 <= epochs.read_amplification <= 4
    assert 0 < epochs.reach <= 1


def test_samples_that_never_have_a_neighbour_have_no_excess() -> None:
    shards = np.ones(32, dtype=np.int64)
    batches = Batches(global_batch_size=8, world_size=8, queue_size=8)

    mixed = mixing(Sequential(32, epoch_length=32), Neighbours.of_shards(shards), batches, epochs=1)

    assert (mixed.pairs_global, mixed.pairs_rank, mixed.pairs_queue) == (None, None, None)


def test_mates_that_meet_in_every_epoch_are_counted() -> None:
    first = np.array([0, 1, 2, 3, 4, 5, 6, 7])
    second = np.array([1, 0, 2, 4, 3, 5, 7, 6])  # only 0 and 1, and 6 and 7, stay together

    epochs = over_epochs(
        Recorded([first, second], num_samples=8),
        np.array([8]),
        Batches(global_batch_size=2, world_size=1, queue_size=2),
        block=8,
        epochs=2,
    )

    assert epochs is not None
    assert epochs.mates == pytest.approx((2 / 4) / (1 / 7))


def test_webdataset_deals_the_same_shards_to_a_rank_in_every_epoch() -> None:
    shards = np.full(2 * WEBDATASET_WORKERS, 40, dtype=np.int64)
    batches = Batches(global_batch_size=16, world_size=2, queue_size=16)

    found = [webdataset_epoch(shards, batches, seed=0, epoch=epoch) for epoch in range(2)]

    for numbers in found:
        assert numbers is not None
        assert len(np.unique(numbers)) == len(numbers) == shards.sum()
        ranks = numbers.reshape(-1, 2, 8)
        assert set((ranks[:, 0] // 40 % 2).ravel()) == {0}
    assert not np.array_equal(*found)


def test_with_fewer_shards_than_ranks_webdataset_serves_nothing() -> None:
    batches = Batches(global_batch_size=4, world_size=2, queue_size=4)

    assert webdataset_epoch(np.array([100]), batches, seed=0, epoch=0) is None
