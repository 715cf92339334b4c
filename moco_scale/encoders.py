"""Encoders: any image classifier of torchvision or timm, its last layer replaced by MoCo's head.

The names of weights are the library's own, which for ResNets are the published ones.
"""

import copy
import difflib
import importlib.util
from typing import TYPE_CHECKING

import torch
import torchvision
from torch import Tensor, nn

from moco_scale.errors import ConfigError
from moco_scale.group_norm import group_batch_norm

if TYPE_CHECKING:  # model.py builds encoders; here its settings are only named
    from moco_scale.model import ModelConfig

TIMM = "timm/"
"""Before the names of timm's models; others are torchvision's."""


def build_encoder(config: "ModelConfig", *, seed: int) -> nn.Module:
    """An encoder from N x 3 x S x S to N x dim, its weights a function of the seed alone.

    The head, which is `fc` in a ResNet, is Linear (MoCo v1), or Linear, ReLU, Linear (v2, arXiv
    2003.04297).

    Raises:
        ConfigError: the backbone has batch normalisation that cannot be grouped, or no last linear
            layer to replace; or the small stem is not for it.
    """
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
        torch.manual_seed(seed)
        encoder = _plain(config.backbone, num_classes=config.dim)
        if config.stem == "cifar":
            _replace_stem(encoder, config.backbone)
        group_batch_norm(encoder, sub_batch=config.bn_sub_batch)
        path = _last_linear(encoder, config)
        if config.mlp_head:
            last = encoder.get_submodule(path)
            assert isinstance(last, nn.Linear)
            width = last.in_features
            encoder.set_submodule(path, nn.Sequential(nn.Linear(width, width), nn.ReLU(), last))
    encoder.head_path = path  # type: ignore[assignment]  # torch types attributes as tensors and modules
    return encoder


def build_headless(config: "ModelConfig") -> nn.Module:
    """The backbone as its library makes it, with nothing where the head was; weights are random.

    N x 3 x S x S to N x D, the features that enter the head.
    """
    with torch.random.fork_rng(devices=[]):
        model = _plain(config.backbone, num_classes=config.dim)
        if config.stem == "cifar":
            _replace_stem(model, config.backbone)
    model.set_submodule(_last_linear(model, config), nn.Identity())
    return model


def check_encoder(encoder: nn.Module, config: "ModelConfig", *, view_size: int) -> None:
    """Let the shape of a batch go through a copy without memory: nothing is computed.

    Raises:
        ConfigError: the backbone does not take views of this size, or gives more than embeddings.
    """
    shape = (config.bn_sub_batch, 3, view_size, view_size)
    try:
        found = copy.deepcopy(encoder).to("meta").train()(torch.empty(shape, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as err:
        raise ConfigError(
            f"model.backbone {config.backbone!r} does not take views of data.view_size {view_size}:"
            f" {str(err).splitlines()[0]}; choose another size, or another backbone"
        ) from err
    if not isinstance(found, Tensor) or found.shape != (config.bn_sub_batch, config.dim):
        raise ConfigError(
            f"model.backbone {config.backbone!r} gives {type(found).__name__} in training, not one "
            "embedding an image; choose another"
        )


def check_backbone(name: str) -> None:
    """Refuse a name that neither library has.

    Raises:
        ConfigError: with the names that are near.
    """
    if name.startswith(TIMM):
        if importlib.util.find_spec("timm") is None:
            raise ConfigError(
                f"model.backbone {name!r} needs timm: pip install 'moco-scale[timm]', or choose "
                "one of torchvision, such as resnet50"
            )
        import timm  # deferred: an extra, and slow to import

        bare, known = name.removeprefix(TIMM), timm.list_models()
    else:
        bare, known = name, torchvision.models.list_models(module=torchvision.models)
    if bare not in known:
        near = difflib.get_close_matches(bare, known, n=3) or known[:3]
        before = TIMM if name.startswith(TIMM) else ""
        raise ConfigError(
            f"model.backbone {name!r} is not known; near it: "
            f"{', '.join(before + one for one in near)} (torchvision's names; timm's: timm/NAME)"
        )


def pooled_features(encoder: nn.Module, images: Tensor) -> Tensor:
    """N x D: what enters the head, in evaluation mode; D is 512 or 2048 in ResNets.

    Args:
        encoder: from `build_encoder`; left in the mode it was in.
        images: N x 3 x S x S, normalised.
    """
    entered: list[Tensor] = []
    head = encoder.get_submodule(str(encoder.head_path))
    hook = head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    was_training = encoder.training
    encoder.eval()
    try:
        # Compiled code would not know of the hook.
        with torch.compiler.set_stance("force_eager"):
            encoder(images)
    finally:
        hook.remove()
        encoder.train(was_training)
    return entered[0].flatten(1)


def _plain(name: str, *, num_classes: int) -> nn.Module:
    if name.startswith(TIMM):
        import timm  # deferred: an extra, and slow to import

        found: nn.Module = timm.create_model(name.removeprefix(TIMM), num_classes=num_classes)
        return found
    model: nn.Module = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    return model


def _last_linear(encoder: nn.Module, config: "ModelConfig") -> str:
    layers: list[str] = [
        name
        for name, layer in encoder.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == config.dim
    ]
    if not layers:
        raise ConfigError(
            f"model.backbone {config.backbone!r} has no last linear layer that a head could "
            "replace; choose another"
        )
    return layers[-1]


def _replace_stem(encoder: nn.Module, name: str) -> None:
    """Small images keep their resolution: 3x3 convolution of stride 1, no pooling."""
    first = getattr(encoder, "conv1", None)
    if not isinstance(first, nn.Conv2d) or not hasattr(encoder, "maxpool"):
        raise ConfigError(
            f"model.stem cifar replaces a ResNet's first layers, which {name!r} has not; "
            "leave model.stem imagenet"
        )
    conv = nn.Conv2d(3, first.out_channels, kernel_size=3, stride=1, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    encoder.add_module("conv1", conv)
    encoder.add_module("maxpool", nn.Identity())
