"""Batch normalisation over small groups of samples, whatever batch a device holds.

The size of the group is part of MoCo's recipe (32 samples per GPU in the paper, section 3.3), so
it must not change with the number of devices.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that, in training, normalises each `sub_batch` consecutive samples by themselves.

    Parameters and buffers have BatchNorm2d's names; evaluation is BatchNorm2d's. In training the
    running statistics stay as they are: the mean of the groups' statistics waits in `batch_mean`
    and `batch_var` (unbiased) until `commit_statistics`, so that they can be averaged over ranks,
    or dropped.
    """

    def __init__(self, num_features: int, *, sub_batch: int) -> None:
        super().__init__(num_features)
        self.sub_batch = sub_batch
        self.batch_mean: Tensor | None = None
        self.batch_var: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W in, the same out; N a multiple of sub_batch in training."""
        if not self.training:
            return super().forward(x)
        assert len(x) % self.sub_batch == 0, "a rank holds whole BN groups: see check_world"
        assert self.running_mean is not None
        assert self.running_var is not None
        self.batch_mean = torch.zeros_like(self.running_mean)
        self.batch_var = torch.zeros_like(self.running_var)
        # A group's statistics enter with weight 1 / number of groups so far: their mean in the end.
        normalised = [
            functional.batch_norm(
                group,
                self.batch_mean,
                self.batch_var,
                self.weight,
                self.bias,
                training=True,
                momentum=1 / number,
                eps=self.eps,
            )
            for number, group in enumerate(torch.split(x, self.sub_batch), start=1)
        ]
        return normalised[0] if len(normalised) == 1 else torch.cat(normalised)


def batch_statistics(module: nn.Module) -> list[Tensor]:
    """Each layer's mean and variance over the last batch's groups, to be averaged in place."""
    found: list[Tensor] = []
    for layer in _layers(module):
        assert layer.batch_mean is not None, "no batch has been through this layer in training"
        assert layer.batch_var is not None
        found += [layer.batch_mean, layer.batch_var]
    return found


@torch.no_grad()
def commit_statistics(module: nn.Module, *, momentum: float | None = None) -> None:
    """Move the running statistics towards the last batch's, by BN's momentum or the one given."""
    for layer in _layers(module):
        weight = layer.momentum if momentum is None else momentum
        for running, batch in (
            (layer.running_mean, layer.batch_mean),
            (layer.running_var, layer.batch_var),
        ):
            assert running is not None
            assert batch is not None, "no batch has been through this layer in training"
            running.lerp_(batch, weight if weight is not None else 0.1)
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked += 1


@torch.no_grad()
def estimate_bn_statistics(encoder: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics to the mean over these batches, each weighted by its samples.

    What makes a random encoder comparable: fresh running statistics are 0 and 1, which no data has.
    Weights stay; the encoder is in evaluation mode afterwards.

    Args:
        encoder: with GroupBatchNorm2d layers, on the batches' device.
        batches: N x 3 x S x S each; a batch of one sample has no variance and is left out.
    """
    layers = _layers(encoder)
    sub_batches = [layer.sub_batch for layer in layers]
    encoder.train()
    seen = 0
    for batch in batches:
        if len(batch) < 2:
            continue
        for layer in layers:
            layer.sub_batch = len(batch)
        encoder(batch)
        seen += len(batch)
        commit_statistics(encoder, momentum=len(batch) / seen)
    for layer, sub_batch in zip(layers, sub_batches, strict=True):
        layer.sub_batch = sub_batch
    encoder.eval()


def _layers(module: nn.Module) -> list[GroupBatchNorm2d]:
    return [layer for layer in module.modules() if isinstance(layer, GroupBatchNorm2d)]
