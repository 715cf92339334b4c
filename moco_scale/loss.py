"""InfoNCE: find the positive key among the negatives (paper, equation 1)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK_ELEMENTS = 2**22
"""Cosines of queries and negatives that are held at a time: 16 MiB in float32."""


def info_nce(
    q: Tensor, positives: Tensor, negatives: Tensor, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Mean loss in nats, and lookup accuracy (how often the positive scores highest, 0-1).

    Never holds the N x (1 + K) logits: negatives are gone through in pieces, forward and, computed
    anew, backward.

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
        highest, total = scores, torch.ones_like(scores)  # sum of exp(logit - highest) so far
        is_found = torch.ones_like(scores, dtype=torch.bool)
        for piece in _pieces(negatives, len(q)):
            logits = (q @ piece).div_(temperature)
            peak = logits.amax(dim=1)
            is_found &= scores >= peak
            higher = torch.maximum(highest, peak)
            here = logits.sub_(higher[:, None]).exp_().sum(dim=1)
            total = total * torch.exp(highest - higher) + here
            highest = higher
        normaliser = highest + total.log()
        ctx.save_for_backward(q, negatives, scores, normaliser)
        ctx.temperature = temperature
        found = is_found.to(scores.dtype).mean()
        ctx.mark_non_differentiable(found)
        return (normaliser - scores).mean(), found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, negatives, scores, normaliser = ctx.saved_tensors
        scale = gradients[0] / (len(q) * ctx.temperature)
        of_q = torch.zeros_like(q)
        for piece in _pieces(negatives, len(q)):
            softmax = (q @ piece).div_(ctx.temperature).sub_(normaliser[:, None]).exp_()
            of_q.addmm_(softmax, piece.T)
        of_positives = (torch.exp(scores - normaliser) - 1) * scale
        return of_q * scale, of_positives, None, None


def _pieces(negatives: Tensor, queries: int) -> tuple[Tensor, ...]:
    return torch.split(negatives, max(1, _CHUNK_ELEMENTS // queries), dim=1)
