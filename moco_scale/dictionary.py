"""Dictionaries: what a query is compared with, and what a step leaves behind in them."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from moco_scale.distributed import Ranks, all_gather_rows
from moco_scale.errors import TrainError
from moco_scale.loss import info_nce, info_nce_within_batch
from pipelines.hashing import hash_words


class Dictionary(Protocol):
    """One of the mechanisms of the paper's figure 2."""

    needs_key_encoder: bool
    """Whether keys come from a key encoder of their own."""
    keys_need_grad: bool
    """Whether the loss flows back through the keys."""

    def loss(
        self,
        q: Tensor,
        k: Tensor | None,
        sample_ids: NDArray[np.int64],
        *,
        rows: slice,
        step: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """InfoNCE of some queries, and their lookup accuracy.

        Args:
            q: n x C, unit length.
            k: the keys of all ranks in position order, N x C, unit length; None where no view is
                encoded as a key.
            sample_ids: n, of the queries.
            rows: which of `k` are the queries' own.
            step: of the run.
        """

    def update(
        self, q: Tensor, k: Tensor | None, sample_ids: NDArray[np.int64], *, is_finite: Tensor
    ) -> None:
        """What this step leaves in the dictionary; the last thing that a step does.

        Args:
            q: n x C, this rank's.
            k: the keys of all ranks in position order.
            sample_ids: n, this rank's.
            is_finite: a tensor of one bool; where it is false, the dictionary stays as it is.
        """


class KeyQueue(nn.Module):
    """The keys of the last steps, first in, first out; O(K) memory however many images there are.

    Buffers, under their published names: `queue`, dim x K, and `queue_ptr`, the next column to
    be replaced. Both are the same on every rank.
    """

    needs_key_encoder = True
    keys_need_grad = False
    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, *, dim: int, queue_size: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("queue", _random_directions(dim, queue_size, seed=seed))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def loss(
        self,
        q: Tensor,
        k: Tensor | None,
        sample_ids: NDArray[np.int64],  # noqa: ARG002  the Dictionary's signature
        *,
        rows: slice,
        step: int,  # noqa: ARG002  the Dictionary's signature
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        """Against the queue as it is."""
        assert k is not None, "the queue needs a key encoder"
        positives = (q * k[rows]).sum(dim=1)
        return info_nce(q, positives, self.queue, temperature=temperature)

    @torch.no_grad()
    def update(
        self,
        q: Tensor,  # noqa: ARG002  the Dictionary's signature
        k: Tensor | None,
        sample_ids: NDArray[np.int64],  # noqa: ARG002  the Dictionary's signature
        *,
        is_finite: Tensor,
    ) -> None:
        """Replace the oldest keys by `k`, going round at the end, whatever K is."""
        assert k is not None, "the queue needs a key encoder"
        queue_size = self.queue.shape[1]
        assert len(k) <= queue_size, "a step's keys fit into the queue: checked with the settings"
        # The pointer stays on the device: reading it would wait for the step.
        columns = (self.queue_ptr + torch.arange(len(k), device=k.device)) % queue_size
        keys = torch.where(is_finite, k.to(self.queue.dtype).T, self.queue[:, columns])
        self.queue.index_copy_(1, columns, keys)
        self.queue_ptr.copy_((self.queue_ptr + len(k) * is_finite) % queue_size)


class MemoryBank(nn.Module):
    """A row for every image: the mean of its last queries (Wu et al. 2018, arXiv 1805.01978).

    The positive is the image's own row, the negatives K rows drawn anew each step. N x dim memory:
    512 GB in float32 for 1e9 images of 128 numbers, on every rank.
    """

    needs_key_encoder = False
    keys_need_grad = False
    bank: Tensor

    def __init__(
        self, *, dim: int, num_rows: int, num_negatives: int, seed: int, ranks: Ranks
    ) -> None:
        """
        Args:
            num_rows: N; sample ids are below it.
            num_negatives: K.
        """
        super().__init__()
        self.register_buffer("bank", _random_directions(dim, num_rows, seed=seed).T.contiguous())
        self._num_negatives = num_negatives
        self._seed = seed
        self._ranks = ranks

    def loss(
        self,
        q: Tensor,
        k: Tensor | None,  # noqa: ARG002  the Dictionary's signature
        sample_ids: NDArray[np.int64],
        *,
        rows: slice,  # noqa: ARG002  the Dictionary's signature
        step: int,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        positives = (q * self.bank[self._rows_of(sample_ids)]).sum(dim=1)
        words = hash_words(self._seed, _NEGATIVES, step, np.arange(self._num_negatives))
        drawn = (words % np.uint64(len(self.bank))).astype(np.int64)
        negatives = self.bank[torch.from_numpy(drawn).to(q.device, non_blocking=True)].T
        return info_nce(q, positives, negatives, temperature=temperature)

    @torch.no_grad()
    def update(
        self,
        q: Tensor,
        k: Tensor | None,  # noqa: ARG002  the Dictionary's signature
        sample_ids: NDArray[np.int64],
        *,
        is_finite: Tensor,
    ) -> None:
        """Each row half way towards its new query, on every rank."""
        rows = all_gather_rows(self._rows_of(sample_ids), self._ranks)
        queries = all_gather_rows(q.to(self.bank.dtype), self._ranks)
        before = self.bank[rows]
        after = functional.normalize(
            _BANK_MOMENTUM * before + (1 - _BANK_MOMENTUM) * queries, dim=1
        )
        self.bank.index_copy_(0, rows, torch.where(is_finite, after, before))

    def _rows_of(self, sample_ids: NDArray[np.int64]) -> Tensor:
        if sample_ids.max() >= len(self.bank):
            raise TrainError(
                f"sample {sample_ids.max()} has no row in the memory bank of {len(self.bank)}: the "
                "shard set has grown since the run began; start a new run, or use "
                "model.dictionary queue, which does not depend on their number"
            )
        return torch.from_numpy(sample_ids).to(self.bank.device, non_blocking=True)


class EndToEnd(nn.Module):
    """No memory: the keys are those of the batch itself, and the loss flows through them.

    As many negatives as the batch has samples, less one.
    """

    needs_key_encoder = False
    keys_need_grad = True

    def loss(
        self,
        q: Tensor,
        k: Tensor | None,
        sample_ids: NDArray[np.int64],  # noqa: ARG002  the Dictionary's signature
        *,
        rows: slice,
        step: int,  # noqa: ARG002  the Dictionary's signature
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        assert k is not None, "the batch's own keys"
        columns = torch.arange(rows.start, rows.stop, device=q.device)
        return info_nce_within_batch(q, k, columns, temperature=temperature)

    def update(
        self, q: Tensor, k: Tensor | None, sample_ids: NDArray[np.int64], *, is_finite: Tensor
    ) -> None:
        """There is nothing to keep."""


# What the hashes are for, so that these numbers differ from others drawn from the same seed.
_DIRECTIONS, _NEGATIVES = 0x9E, 0x9F
_BANK_MOMENTUM = 0.5


def _random_directions(dim: int, count: int, *, seed: int) -> Tensor:
    """dim x count, each column of unit length."""
    generator = torch.Generator().manual_seed(int(hash_words(seed, _DIRECTIONS)[0] >> 1))
    return functional.normalize(torch.randn(dim, count, generator=generator), dim=0)
