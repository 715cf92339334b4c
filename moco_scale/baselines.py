"""What needs no learning, and an encoder must beat: pixels, colours and edges as features."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from pipelines import IMAGE_MEAN, IMAGE_STD
from pipelines.views import LUMA

VERSION = 1
"""Of these features: part of the key that cached ones are found by."""

_LEVELS = 8
_SIDE, _CELL, _ORIENTATIONS = 64, 8, 9
_CLIP = 0.2


def pixels(images: Tensor) -> Tensor:
    """N x 768: the view averaged down to 16 x 16 pixels.

    Args:
        images: N x 3 x S x S, normalised as views are; here and below.
    """
    return functional.adaptive_avg_pool2d(images, 16).flatten(1)


def colour_histogram(images: Tensor) -> Tensor:
    """N x 512: square roots of how often each of 8 x 8 x 8 colours occurs.

    Their dot product is the Bhattacharyya coefficient of two histograms.
    """
    levels = (_unit_rgb(images) * _LEVELS).long().clamp(0, _LEVELS - 1).flatten(2)
    colours = (levels[:, 0] * _LEVELS + levels[:, 1]) * _LEVELS + levels[:, 2]
    counts = images.new_zeros(len(images), _LEVELS**3)
    counts.scatter_add_(1, colours, torch.ones_like(colours, dtype=counts.dtype))
    return (counts / colours.shape[1]).sqrt()


def hog(images: Tensor) -> Tensor:
    """N x 1764: histograms of oriented gradients (Dalal and Triggs 2005) of the view at 64 pixels.

    Luma; 9 unsigned orientations in cells of 8 x 8 pixels, each gradient shared by the two
    orientations next to it; blocks of 2 x 2 cells, normalised by L2-Hys.
    """
    luma = (_unit_rgb(images) * images.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)
    luma = functional.interpolate(luma, (_SIDE, _SIDE), mode="bilinear", antialias=True)
    padded = functional.pad(luma, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2])[:, 0]
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1])[:, 0]
    strength = torch.hypot(across, down)
    place = torch.atan2(down, across).remainder(math.pi) * (_ORIENTATIONS / math.pi) - 0.5
    lower = place.floor()
    upper_part = place - lower
    votes = images.new_zeros(len(images), _ORIENTATIONS, _SIDE, _SIDE)
    for step, part in ((0, 1 - upper_part), (1, upper_part)):
        orientation = (lower.long() + step).remainder(_ORIENTATIONS)
        votes.scatter_add_(1, orientation[:, None], (strength * part)[:, None])
    cells = functional.avg_pool2d(votes, _CELL)
    blocks = functional.unfold(cells, 2)  # N x 36 x 49
    blocks = _unit(_unit(blocks).clamp(max=_CLIP))
    return blocks.transpose(1, 2).flatten(1)


def _unit(blocks: Tensor) -> Tensor:
    # The floor keeps the noise of flat blocks from becoming edges: gradients are 0-1 here.
    return blocks / (blocks.square().sum(1, keepdim=True) + 1e-5).sqrt()


def _unit_rgb(images: Tensor) -> Tensor:
    std, mean = (images.new_tensor(v)[:, None, None] for v in (IMAGE_STD, IMAGE_MEAN))
    return (images * std + mean).clamp(0, 1)
