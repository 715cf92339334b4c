"""Which sample stands at which position of an epoch: arithmetic, without I/O."""

from bisect import bisect_right
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import OrderError
from pipelines.hashing import hash_words

ALGORITHM = "slot-lanes-1"
"""Name and version of the order; it is part of a saved position."""

_SHARDS, _BLOCKS, _SAMPLES = 1, 2, 3  # what a hash is for, so that no two permutations are related


class Order:
    """Slot lanes: the shards, permuted and laid end to end, cut into equal lanes.

    Position p of an epoch is lane p mod `lanes`, step p div `lanes`. Inside a shard the blocks are
    permuted, then the samples inside each block; a block is `block` consecutive samples, the last
    one of a shard perhaps fewer. What the division leaves over (fewer samples than lanes) is
    another part of the shards in each epoch. Memory is O(shards); any position is computed alone.
    """

    def __init__(
        self, shard_samples: NDArray[np.int64], *, seed: int, lanes: int, block: int
    ) -> None:
        """Args:
            shard_samples: samples of each shard; 0 is allowed.
            lanes: as many as the global batch size, or a multiple of it.
            block: samples that one range request reads.

        Raises:
            OrderError: fewer samples than lanes.
        """
        self._samples = np.asarray(shard_samples, dtype=np.int64)
        self._seed = seed
        self.lanes = lanes
        self.block = block
        total = int(self._samples.sum())
        self._lane_length = total // lanes
        if self._lane_length == 0:
            raise OrderError(
                f"the shard set has {total} samples, fewer than the {lanes} that one step takes "
                "(data.global_batch_size x data.lanes_per_slot); "
                "lower data.global_batch_size or pack more images"
            )
        self.epoch_length = self._lane_length * lanes
        """Positions in an epoch: a multiple of `lanes`, and the same in every epoch."""
        # Per instance, so that a dropped order frees its memory.
        self._layout = lru_cache(maxsize=2)(self._shard_layout)
        self._block_order = lru_cache(maxsize=max(4096, 2 * lanes))(self._permuted_blocks)

    def samples(
        self, epoch: int, start: int, stop: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard, and position in the shard, of the epoch's positions [start, stop)."""
        assert 0 <= start <= stop <= self.epoch_length, "positions lie within one epoch"
        positions = np.arange(start, stop, dtype=np.int64)
        order, ends = self._layout(epoch)
        address = positions % self.lanes * self._lane_length + positions // self.lanes
        slot = np.searchsorted(ends, address, side="right")
        shard = order[slot]
        offset = address - (ends[slot] - self._samples[shard])
        return shard, self._inside(epoch, shard, offset)

    def _inside(
        self, epoch: int, shard: NDArray[np.int64], offset: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """The sample that stands `offset` samples after its shard's beginning in this epoch."""
        number = np.empty_like(offset)
        rest = np.empty_like(offset)
        for place, (one, at) in enumerate(zip(shard.tolist(), offset.tolist(), strict=True)):
            blocks, begins = self._block_order(epoch, one)
            slot = bisect_right(begins, at) - 1
            number[place] = blocks[slot]
            rest[place] = at - begins[slot]
        return number * self.block + self._permuted_in_block(epoch, shard, number, rest)

    def _permuted_in_block(
        self,
        epoch: int,
        shard: NDArray[np.int64],
        number: NDArray[np.int64],
        rest: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Entry `rest` of each block's permutation; only the blocks entered are permuted."""
        entered, which = np.unique(shard << 32 | number, return_inverse=True)
        of_shard, number = entered[:, np.newaxis] >> 32, entered[:, np.newaxis] & 0xFFFFFFFF
        members = np.arange(self.block, dtype=np.int64)[np.newaxis, :]
        keys = hash_words(self._seed, _SAMPLES, epoch, of_shard, number, members)
        # What lies beyond a short block's end sorts last, so it is never taken.
        keys[members >= self._samples[of_shard] - number * self.block] = np.iinfo(np.uint64).max
        return np.argsort(keys, axis=1, kind="stable")[which, rest]

    def _shard_layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's permutation of the shards, and where each ends when laid in a row."""
        keys = hash_words(self._seed, _SHARDS, epoch, np.arange(len(self._samples)))
        order = np.argsort(keys, kind="stable")
        return order, np.cumsum(self._samples[order])

    def _permuted_blocks(self, epoch: int, shard: int) -> tuple[list[int], list[int]]:
        """The shard's blocks in this epoch's order, and the offset at which each begins."""
        samples = int(self._samples[shard])
        count = -(-samples // self.block)
        keys = hash_words(self._seed, _BLOCKS, epoch, shard, np.arange(count))
        blocks = np.argsort(keys, kind="stable")
        sizes = np.minimum(samples - blocks * self.block, self.block)
        return blocks.tolist(), (np.cumsum(sizes) - sizes).tolist()


def rank_positions(
    batch: int, *, global_batch_size: int, rank: int, world_size: int
) -> tuple[int, int]:
    """First and last + 1 of a rank's positions in global batch `batch` of an epoch.

    Raises:
        OrderError: the world does not divide the global batch.
    """
    if world_size < 1 or global_batch_size % world_size:
        allowed = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        raise OrderError(
            f"{world_size} ranks cannot share data.global_batch_size {global_batch_size} equally; "
            f"start one of {', '.join(map(str, allowed))} ranks"
        )
    assert 0 <= rank < world_size, "torchrun numbers ranks from 0"
    share = global_batch_size // world_size
    start = batch * global_batch_size + rank * share
    return start, start + share
