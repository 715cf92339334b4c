"""InfoNCE: find the positive key among the negatives (paper, equation 1)."""

import torch
from torch import Tensor
from torch.nn import functional


def info_nce(logits: Tensor, labels: Tensor, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Mean loss in nats, and lookup accuracy (how often the positive scores highest, 0-1).

    Args:
        logits: N x (1 + K) cosines.
        labels: N columns of the positives.
    """
    loss = functional.cross_entropy(logits / temperature, labels)
    with torch.no_grad():
        found = (logits.argmax(dim=1) == labels).to(loss.dtype).mean()
    return loss, found
