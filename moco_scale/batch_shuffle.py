"""Shuffled batch normalisation: which key shares its BN group with which others (paper, 3.3).

Queries are normalised in batch order; keys in an order that is drawn anew every step, so that the
statistics of a group do not tell which key belongs to which query. The order is a function of
(seed, step) alone, and so is the same at every world size.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moco_scale.distributed import Ranks, all_gather_rows, exchange_rows
from pipelines.hashing import hash_words

# Keeps these numbers apart from others that are drawn from the same seed.
_SHUFFLE = 0x5B


def key_order(
    *, seed: int, step: int, global_batch_size: int, shuffle_domain: int, half: int = 0
) -> NDArray[np.int64]:
    """Which sample of the global batch sits in each slot of the key encoder's batch.

    Every `shuffle_domain` consecutive samples are permuted among themselves.

    Args:
        half: of a symmetric loss: 0 or 1.
    """
    slots = np.arange(global_batch_size)
    drawn = hash_words(seed, _SHUFFLE + half, step, slots).reshape(-1, shuffle_domain)
    starts = np.arange(0, global_batch_size, shuffle_domain, dtype=np.int64)[:, None]
    return (np.argsort(drawn, axis=1, kind="stable") + starts).reshape(-1)


def shuffle_rows(
    rows: Tensor, order: NDArray[np.int64], *, shuffle_domain: int, ranks: Ranks
) -> Tensor:
    """This rank's part of the key encoder's batch.

    Rows cross ranks only if a domain spans ranks, and then only those that must.

    Args:
        rows: n x ..., this rank's n of the order's samples; n x C x H x W may be channels_last.
    """
    count = len(rows)
    slots = order[ranks.rank * count : (ranks.rank + 1) * count]
    if rows.dim() == 4 and rows.is_contiguous(memory_format=torch.channels_last):
        moved = _take(rows.permute(0, 2, 3, 1), order, slots, shuffle_domain, ranks)
        return moved.permute(0, 3, 1, 2)
    return _take(rows.contiguous(), order, slots, shuffle_domain, ranks)


def unshuffle_keys(keys: Tensor, order: NDArray[np.int64], *, ranks: Ranks) -> Tensor:
    """The keys of all ranks in batch order, N x C, from this rank's n x C in the shuffled order.

    Gradients flow back to the rank that encoded a key.
    """
    inverse = np.argsort(order)
    return all_gather_rows(keys, ranks)[_index(inverse, keys.device)]


def _take(
    rows: Tensor,
    order: NDArray[np.int64],
    slots: NDArray[np.int64],
    shuffle_domain: int,
    ranks: Ranks,
) -> Tensor:
    count = len(rows)
    if count % shuffle_domain == 0:  # true on every rank alike: nothing crosses
        return rows[_index(slots - ranks.rank * count, rows.device)]
    owner = order // count  # of the sample in each slot
    home = np.arange(len(order)) // count  # of the slot
    mine = slots // count
    leaving = np.flatnonzero((owner == ranks.rank) & (home != ranks.rank))
    coming = np.flatnonzero(mine != ranks.rank)
    coming = coming[np.argsort(mine[coming], kind="stable")]
    staying = np.flatnonzero(mine == ranks.rank)
    received = exchange_rows(
        rows[_index(order[leaving] - ranks.rank * count, rows.device)],
        send_counts=np.bincount(home[leaving], minlength=ranks.world_size).tolist(),
        receive_counts=np.bincount(mine[coming], minlength=ranks.world_size).tolist(),
        ranks=ranks,
    )
    taken = torch.empty_like(rows)
    taken[_index(staying, rows.device)] = rows[
        _index(slots[staying] - ranks.rank * count, rows.device)
    ]
    taken[_index(coming, rows.device)] = received
    return taken


def _index(numbers: NDArray[np.int64], device: torch.device) -> Tensor:
    # Pageable memory is staged before the call returns, so this neither races nor waits.
    return torch.from_numpy(np.ascontiguousarray(numbers)).to(device, non_blocking=True)
