"""InfoNCE: find the positive key among the negatives (paper, equation 1)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK_ELEMENTS = 2**21
"""Cosines of queries and negatives held at a time: 8 MiB in float32, near a core's cache."""


def info_nce(
    q: Tensor, positives: Tensor, negatives: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Mean loss in nats, and lookup accuracy (how often the positive scores highest, 0-1).

    Never holds the N x (1 + K) logits: negatives are gone through once, in pieces, and the
    gradient is made on the way.

    Args:
        q: N x C, unit length.
        positives: N cosines of the queries with their own keys.
        negatives: C x K; constants, no gradient flows into them.
    """
    loss, found = _InfoNce.apply(q, positives, negatives, temperature)
    return loss, found


def info_nce_within_batch(
    q: Tensor, keys: Tensor, columns: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same where the keys are one batch's and the loss flows back through them, too.

    Args:
        q: N x C, unit length.
        keys: M x C: each is one query's positive and all others' negative.
        columns: N numbers of the queries' own keys.
    """
    logits = q @ keys.T / temperature
    with torch.no_grad():
        found = (logits.argmax(dim=1) == columns).to(logits.dtype).mean()
    return functional.cross_entropy(logits, columns), found


class _InfoNce(torch.autograd.Function):
    """See `info_nce`."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, positives: Tensor, negatives: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        scores = positives / temperature
        # So far: the sums of exp(logit - highest), and of the negatives with these weights.
        highest, total, mean = scores, torch.ones_like(scores), torch.zeros_like(q)
        is_found = torch.ones_like(scores, dtype=torch.bool)
        sharp = q / temperature
        for piece in _pieces(negatives, len(q)):
            logits = sharp @ piece
            peak = logits.amax(dim=1)
            is_found &= scores >= peak
            higher = torch.maximum(highest, peak)
            weights = logits.sub_(higher[:, None]).exp_()
            shrink = torch.exp(highest - higher)
            total = total * shrink + weights.sum(dim=1)
            mean = torch.addmm(mean * shrink[:, None], weights, piece.T)
            highest = higher
        normaliser = highest + total.log()
        ctx.save_for_backward(mean / total[:, None], scores - normaliser)
        ctx.temperature = temperature
        found = is_found.to(scores.dtype).mean()
        ctx.mark_non_differentiable(found)
        return (normaliser - scores).mean(), found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        mean, log_share_of_positives = ctx.saved_tensors
        scale = gradients[0] / (len(mean) * ctx.temperature)
        of_positives = (log_share_of_positives.exp() - 1) * scale
        return mean * scale, of_positives, None, None


def _pieces(negatives: Tensor, queries: int) -> tuple[Tensor, ...]:
    return torch.split(negatives, max(1, _CHUNK_ELEMENTS // queries), dim=1)
