"""Dictionaries: what a query is compared with, and what a step leaves behind in them."""

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from pipelines.hashing import hash_words

# Keeps these numbers apart from the encoder's weights, which are drawn from the same seed.
_QUEUE = 0x9E


class Dictionary(Protocol):
    """One of the mechanisms of the paper's figure 2."""

    needs_key_encoder: bool
    """Whether keys come from a key encoder."""
    keys_need_grad: bool
    """Whether the loss flows back through the keys."""

    def logits(
        self, q: Tensor, k: Tensor | None, sample_ids: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        """Cosines N x (1 + K) of this rank's queries, and the N columns of their positives.

        Args:
            q: N x C, unit length.
            k: N x C, the same samples' keys, unit length; None without a key encoder.
            sample_ids: N.
        """

    def update(self, q: Tensor, k: Tensor | None, sample_ids: NDArray[np.int64]) -> None:
        """What this step leaves in the dictionary; the last thing that a step does.

        Args:
            q: N x C, this rank's.
            k: the keys of all ranks in position order; None without a key encoder.
            sample_ids: N, this rank's.
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
        generator = torch.Generator().manual_seed(int(hash_words(seed, _QUEUE)[0] >> 1))
        noise = torch.randn(dim, queue_size, generator=generator)
        self.register_buffer("queue", functional.normalize(noise, dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def logits(
        self,
        q: Tensor,
        k: Tensor | None,
        sample_ids: NDArray[np.int64],  # noqa: ARG002  the Dictionary's signature
    ) -> tuple[Tensor, Tensor]:
        """Column 0 is the positive, the others are the queue as it is."""
        assert k is not None, "the queue needs a key encoder"
        positives = (q * k).sum(dim=1, keepdim=True)
        cosines = torch.cat([positives, q @ self.queue], dim=1)
        return cosines, torch.zeros(len(q), dtype=torch.long, device=q.device)

    @torch.no_grad()
    def update(
        self,
        q: Tensor,  # noqa: ARG002  the Dictionary's signature
        k: Tensor | None,
        sample_ids: NDArray[np.int64],  # noqa: ARG002  the Dictionary's signature
    ) -> None:
        """Replace the oldest keys by `k`, going round at the end, whatever K is."""
        assert k is not None, "the queue needs a key encoder"
        queue_size = self.queue.shape[1]
        assert len(k) <= queue_size, "a step's keys fit into the queue: checked with the settings"
        # The pointer stays on the device: reading it would wait for the step.
        columns = (self.queue_ptr + torch.arange(len(k), device=k.device)) % queue_size
        self.queue.index_copy_(1, columns, k.to(self.queue.dtype).T)
        self.queue_ptr.copy_((self.queue_ptr + len(k)) % queue_size)
