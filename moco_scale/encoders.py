"""Encoders: torchvision's ResNets with MoCo's head, under the published names of their weights."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
import torchvision
from torch import Tensor, nn

from moco_scale.group_norm import GroupBatchNorm2d

if TYPE_CHECKING:  # model.py builds encoders; here its settings are only named
    from moco_scale.model import ModelConfig

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": torchvision.models.resnet18,
    "resnet34": torchvision.models.resnet34,
    "resnet50": torchvision.models.resnet50,
    "resnet101": torchvision.models.resnet101,
    "resnext50_32x4d": torchvision.models.resnext50_32x4d,
    "wide_resnet50_2": torchvision.models.wide_resnet50_2,
}


def build_encoder(config: "ModelConfig", *, seed: int) -> nn.Module:
    """A ResNet from N x 3 x S x S to N x dim, its weights a function of the seed alone.

    The head is `fc`: Linear (MoCo v1), or Linear, ReLU, Linear (v2, arXiv 2003.04297).
    """
    norm_layer = partial(GroupBatchNorm2d, sub_batch=config.bn_sub_batch)
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        encoder = BACKBONES[config.backbone](
            weights=None, num_classes=config.dim, norm_layer=norm_layer
        )
        if config.stem == "cifar":
            _replace_stem(encoder)
        if config.mlp_head:
            last = encoder.get_submodule("fc")
            assert isinstance(last, nn.Linear)
            width = last.in_features
            encoder.add_module("fc", nn.Sequential(nn.Linear(width, width), nn.ReLU(), last))
    return encoder


def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """N x D: what enters the head, in evaluation mode; D is 512 or 2048.

    Args:
        encoder: from `build_encoder`; left in the mode it was in.
        images: N x 3 x S x S, normalised.
    """
    was_training = encoder.training
    encoder.eval()
    features = images
    for name, part in encoder.named_children():  # torchvision's order is the order of its forward
        if name != "fc":
            features = part(features)
    encoder.train(was_training)
    return features.flatten(1)


def _replace_stem(encoder: nn.Module) -> None:
    """Small images keep their resolution: 3x3 convolution of stride 1, no pooling."""
    conv = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    encoder.add_module("conv1", conv)
    encoder.add_module("maxpool", nn.Identity())
