"""Batch normalisation over small groups of samples, whatever batch a device holds.

The size of the group is part of MoCo's recipe (32 samples per GPU in the paper, section 3.3), so
it must not change with the number of devices.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from moco_scale.errors import ConfigError


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d that, in training, normalises each `sub_batch` consecutive samples by themselves.

    Parameters and buffers have BatchNorm2d's names; evaluation is BatchNorm2d's. In training the
    running statistics stay as they are: the mean of the statistics of all groups since
    `begin_statistics` waits in `batch_mean` and `batch_var` (unbiased) for `commit_statistics`, so
    that they can be averaged over ranks, or dropped.
    """

    def __init__(
        self, num_features: int, *, sub_batch: int, eps: float = 1e-5, momentum: float = 0.1
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.sub_batch = sub_batch
        self.batch_mean: Tensor | None = None
        self.batch_var: Tensor | None = None
        self.num_groups = 0

    def forward(self, x: Tensor) -> Tensor:
        """N x C x H x W in, the same out; N a multiple of sub_batch in training."""
        if not self.training:
            return super().forward(x)
        assert len(x) % self.sub_batch == 0, "a rank holds whole BN groups: see check_world"
        assert self.running_mean is not None
        assert self.running_var is not None
        if self.batch_mean is None or self.num_groups == 0:
            self.batch_mean = torch.zeros_like(self.running_mean)
            self.batch_var = torch.zeros_like(self.running_var)
        # A group's statistics enter with weight 1 / number of groups so far: their mean in the end.
        first = self.num_groups + 1
        groups = torch.split(x, self.sub_batch)
        self.num_groups += len(groups)
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
            for number, group in enumerate(groups, start=first)
        ]
        return normalised[0] if len(normalised) == 1 else torch.cat(normalised)


class GroupBatchNormAct2d(GroupBatchNorm2d):
    """The same with dropout and activation behind it, as timm has them in one layer."""

    def __init__(self, plain: nn.BatchNorm2d, *, sub_batch: int) -> None:
        super().__init__(plain.num_features, sub_batch=sub_batch, eps=plain.eps)
        self.momentum = plain.momentum
        self.drop = plain.get_submodule("drop")
        self.act = plain.get_submodule("act")

    def forward(self, x: Tensor) -> Tensor:
        acted: Tensor = self.act(self.drop(super().forward(x)))
        return acted


def group_batch_norm(module: nn.Module, *, sub_batch: int) -> None:
    """Put grouped layers in the place of a fresh network's BatchNorm2d; their weights are kept.

    Raises:
        ConfigError: batch normalisation of a kind that has no grouped form.
    """
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            continue
        grouped: GroupBatchNorm2d
        if type(layer) is nn.BatchNorm2d:
            grouped = GroupBatchNorm2d(layer.num_features, sub_batch=sub_batch, eps=layer.eps)
            grouped.momentum = layer.momentum
        elif isinstance(layer, nn.BatchNorm2d) and hasattr(layer, "act") and hasattr(layer, "drop"):
            grouped = GroupBatchNormAct2d(layer, sub_batch=sub_batch)
        else:
            raise ConfigError(
                f"the backbone's layer {name} is a {type(layer).__name__}, which cannot normalise "
                "in groups; choose a backbone with BatchNorm2d, or without batch normalisation"
            )
        grouped.load_state_dict(layer.state_dict())
        module.set_submodule(name, grouped)


def begin_statistics(module: nn.Module) -> None:
    """Forget the groups so far: a new batch begins."""
    for layer in _layers(module):
        layer.num_groups = 0


def batch_statistics(module: nn.Module) -> list[Tensor]:
    """Each layer's mean and variance over the batch's groups, to be averaged in place."""
    found: list[Tensor] = []
    for layer in _layers(module):
        assert layer.batch_mean is not None, "no batch has been through this layer in training"
        assert layer.batch_var is not None
        found += [layer.batch_mean, layer.batch_var]
    return found


@torch.no_grad()
def commit_statistics(
    module: nn.Module, *, momentum: float | None = None, is_finite: Tensor | None = None
) -> None:
    """Move the running statistics towards the batch's, by BN's momentum or the one given.

    Args:
        is_finite: a tensor of one bool: where it is false, nothing moves.
    """
    for layer in _layers(module):
        weight = layer.momentum if momentum is None else momentum
        for running, batch in (
            (layer.running_mean, layer.batch_mean),
            (layer.running_var, layer.batch_var),
        ):
            assert running is not None
            assert batch is not None, "no batch has been through this layer in training"
            target = batch if is_finite is None else torch.where(is_finite, batch, running)
            running.lerp_(target, weight if weight is not None else 0.1)
        assert layer.num_batches_tracked is not None
        layer.num_batches_tracked += 1 if is_finite is None else is_finite


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
        begin_statistics(encoder)
        encoder(batch)
        seen += len(batch)
        commit_statistics(encoder, momentum=len(batch) / seen)
    for layer, sub_batch in zip(layers, sub_batches, strict=True):
        layer.sub_batch = sub_batch
    encoder.eval()


def _layers(module: nn.Module) -> list[GroupBatchNorm2d]:
    return [layer for layer in module.modules() if isinstance(layer, GroupBatchNorm2d)]
