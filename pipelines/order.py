"""Which sample stands at which position of an epoch: arithmetic, without I/O."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import OrderError
from pipelines.hashing import hash_words

ALGORITHM = "slot-lanes-1"
"""Name and version of the order; it is part of a saved position."""

_SHARDS, _BLOCKS, _SAMPLES = 1, 2, 3  # what a hash is for, so that no two permutations are related
_LAST = np.iinfo(np.uint64).max
_MOST_KEYS = 2**20


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
                f"the shard set has {total} samples, fewer than its {lanes} lanes: those that one "
                "step takes (data.global_batch_size x data.lanes_per_slot, or its share of them); "
                "lower data.global_batch_size or pack more images"
            )
        self.epoch_length = self._lane_length * lanes
        """Positions in an epoch: a multiple of `lanes`, and the same in every epoch."""
        # Per instance, so that a dropped order frees its memory.
        self._layout = lru_cache(maxsize=2)(self._shard_layout)
        self._entered = _Entered.none(lanes, block)

    def samples(
        self, epoch: int, start: int, stop: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Shard, and position in the shard, of the epoch's positions [start, stop).

        What each lane's block was is remembered, so positions in a row are cheap; not for several
        threads at once.
        """
        assert 0 <= start <= stop <= self.epoch_length, "positions lie within one epoch"
        shards = np.empty(stop - start, dtype=np.int64)
        members = np.empty_like(shards)
        for first in range(start, stop, self.lanes):  # so that no lane comes twice
            last = min(first + self.lanes, stop)
            positions = np.arange(first, last, dtype=np.int64)
            lane, here = positions % self.lanes, slice(first - start, last - start)
            address = lane * self._lane_length + positions // self.lanes
            self._enter(epoch, lane, address)
            entered = self._entered
            shards[here] = entered.shard[lane]
            at = address - entered.begin[lane]
            members[here] = entered.first[lane] + entered.permuted[lane, at]
        return shards, members

    def _enter(self, epoch: int, lane: NDArray[np.int64], address: NDArray[np.int64]) -> None:
        """Bring the lanes that have left their block, or are elsewhere altogether, into another."""
        entered = self._entered
        elsewhere = (
            (entered.epoch[lane] != epoch)
            | (address < entered.begin[lane])
            | (address >= entered.end[lane])
        )
        if not elsewhere.any():
            return
        lane, address = lane[elsewhere], address[elsewhere]
        order, ends = self._layout(epoch)
        slot = np.searchsorted(ends, address, side="right")
        shard = order[slot]
        number, rest = self._block_at(epoch, shard, address - ends[slot] + self._samples[shard])
        first = number * self.block
        size = np.minimum(self._samples[shard] - first, self.block)
        entered.epoch[lane] = epoch
        entered.begin[lane] = address - rest
        entered.end[lane] = address - rest + size
        entered.shard[lane] = shard
        entered.first[lane] = first
        entered.permuted[lane] = self._permuted_members(epoch, shard, number, size)

    def _block_at(
        self, epoch: int, shard: NDArray[np.int64], offset: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The block `offset` samples after its shard's beginning, and the offset in it."""
        number, rest = np.empty_like(offset), np.empty_like(offset)
        one_of_each, which = np.unique(shard, return_inverse=True)
        most = -(-int(self._samples[one_of_each].max()) // self.block)
        rows = max(1, _MOST_KEYS // most)  # at once, so that memory stays small
        for first in range(0, len(one_of_each), rows):
            part = one_of_each[first : first + rows]
            blocks, ends = self._permuted_blocks(epoch, part, most)
            mine = np.flatnonzero((which >= first) & (which < first + rows))
            row = which[mine] - first
            # One search for all rows: each is put behind the one before it.
            apart = np.arange(len(part)) * (int(self._samples[part].max()) + 1)
            at = np.searchsorted(
                (ends + apart[:, None]).ravel(), offset[mine] + apart[row], "right"
            )
            number[mine] = blocks.ravel()[at]
            column = at - row * most
            before = np.where(column > 0, ends[row, column - 1], 0)
            rest[mine] = offset[mine] - before
        return number, rest

    def _permuted_blocks(
        self, epoch: int, shards: NDArray[np.int64], most: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each shard's blocks in this epoch's order, and the offset at which each ends."""
        samples = self._samples[shards][:, np.newaxis]
        numbers = np.arange(most, dtype=np.int64)[np.newaxis, :]
        keys = hash_words(self._seed, _BLOCKS, epoch, shards[:, np.newaxis], numbers)
        keys[numbers >= -(-samples // self.block)] = _LAST  # none: they sort behind the others
        blocks = np.argsort(keys, axis=1, kind="stable")
        return blocks, np.cumsum(np.clip(samples - blocks * self.block, 0, self.block), axis=1)

    def _permuted_members(
        self,
        epoch: int,
        shard: NDArray[np.int64],
        number: NDArray[np.int64],
        size: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """The order of each block's samples; what lies beyond a short one's end comes last."""
        members = np.arange(self.block, dtype=np.int64)[np.newaxis, :]
        keys = hash_words(
            self._seed, _SAMPLES, epoch, shard[:, np.newaxis], number[:, np.newaxis], members
        )
        keys[members >= size[:, np.newaxis]] = _LAST
        return np.argsort(keys, axis=1, kind="stable")

    def _shard_layout(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The epoch's permutation of the shards, and where each ends when laid in a row."""
        keys = hash_words(self._seed, _SHARDS, epoch, np.arange(len(self._samples)))
        order = np.argsort(keys, kind="stable")
        return order, np.cumsum(self._samples[order])


@dataclass(frozen=True, kw_only=True, slots=True)
class _Entered:
    """The block that each lane is in; an entry a lane, changed in place."""

    epoch: NDArray[np.int64]
    """-1: in none yet."""
    begin: NDArray[np.int64]
    """First of the block's addresses in the epoch's row of shards."""
    end: NDArray[np.int64]
    shard: NDArray[np.int64]
    first: NDArray[np.int64]
    """Position in the shard of the block's first sample."""
    permuted: NDArray[np.int32]
    """Lanes x block: the order of the samples."""

    @classmethod
    def none(cls, lanes: int, block: int) -> "_Entered":
        def zeros() -> NDArray[np.int64]:
            return np.zeros(lanes, dtype=np.int64)

        return cls(
            epoch=zeros() - 1,
            begin=zeros(),
            end=zeros(),
            shard=zeros(),
            first=zeros(),
            permuted=np.zeros((lanes, block), dtype=np.int32),
        )


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
