"""Encoders and the published names of their weights."""

import pytest
import timm
import torch
import torchvision
from torch import nn

from moco_scale.encoders import build_encoder, check_encoder, pooled_features
from moco_scale.errors import ConfigError
from moco_scale.group_norm import GroupBatchNorm2d
from moco_scale.model import ModelConfig


def test_weights_have_the_published_names() -> None:
    published = torchvision.models.resnet18(weights=None, num_classes=16).state_dict()

    v1 = build_encoder(ModelConfig(backbone="resnet18", dim=16, mlp_head=False), seed=0)
    v2 = build_encoder(ModelConfig(backbone="resnet18", dim=16), seed=0)

    assert list(v1.state_dict()) == list(published)
    head = {name: tuple(t.shape) for name, t in v2.state_dict().items() if name.startswith("fc")}
    assert head == {
        "fc.0.weight": (512, 512),
        "fc.0.bias": (512,),
        "fc.2.weight": (16, 512),
        "fc.2.bias": (16,),
    }


def test_weights_are_a_function_of_the_seed_and_leave_the_callers_randomness_alone() -> None:
    config = ModelConfig(backbone="resnet18", dim=16)
    torch.manual_seed(1)
    first = build_encoder(config, seed=7)
    drawn = torch.rand(1)
    torch.manual_seed(1)

    assert torch.equal(drawn, torch.rand(1))
    again, other = build_encoder(config, seed=7), build_encoder(config, seed=8)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert not torch.equal(first.state_dict()["fc.2.weight"], other.state_dict()["fc.2.weight"])


def test_pooled_features_are_what_enters_the_head() -> None:
    encoder = build_encoder(ModelConfig(backbone="resnet18", dim=16), seed=0)
    images = torch.randn(3, 3, 32, 32)

    features = pooled_features(encoder, images)

    assert features.shape == (3, 512)
    assert encoder.training
    encoder.eval()
    torch.testing.assert_close(encoder.get_submodule("fc")(features), encoder(images))


def test_the_small_stem_keeps_resolution() -> None:
    encoder = build_encoder(ModelConfig(backbone="resnet18", dim=16, stem="cifar"), seed=0)
    conv = encoder.get_submodule("conv1")

    assert isinstance(conv, nn.Conv2d)
    assert conv(torch.zeros(1, 3, 32, 32)).shape[-1] == 32
    assert isinstance(encoder.get_submodule("maxpool"), nn.Identity)
    encoder.eval()
    assert encoder(torch.zeros(2, 3, 16, 16)).shape == (2, 16)


@pytest.mark.parametrize(
    ("name", "width"), [("resnext50_32x4d", 2048), ("wide_resnet50_2", 2048), ("resnet34", 512)]
)
def test_other_backbones_have_their_width(name: str, width: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder(ModelConfig(backbone=name, dim=8, mlp_head=False), seed=0)

    assert encoder.get_submodule("fc").in_features == width


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v3_small",
        "convnext_tiny",
        "timm/resnet26d",
        "timm/efficientnet_b0",
        "timm/convnext_atto",
    ],
)
@pytest.mark.parametrize("mlp_head", [False, True])
def test_backbones_of_both_libraries_encode_in_bn_groups(name: str, mlp_head: bool) -> None:
    config = ModelConfig(backbone=name, dim=24, mlp_head=mlp_head, bn_sub_batch=2)
    encoder = build_encoder(config, seed=0)
    images = torch.randn(4, 3, 64, 64)

    encoder.eval()
    whole = encoder(images)
    features = pooled_features(encoder, images)
    head = encoder.get_submodule(encoder.head_path)
    encoder.train()
    encoder(images).sum().backward()

    assert whole.shape == (4, 24)
    torch.testing.assert_close(head(features), whole)
    assert isinstance(head, nn.Sequential) == mlp_head
    layers = [one for one in encoder.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(one, GroupBatchNorm2d) and one.num_groups == 2 for one in layers)


def test_a_timm_layer_with_its_activation_is_what_timm_computes() -> None:
    plain = timm.create_model("efficientnet_b0", num_classes=24).eval()
    encoder = build_encoder(
        ModelConfig(backbone="timm/efficientnet_b0", dim=24, mlp_head=False), seed=0
    ).eval()
    encoder.load_state_dict(plain.state_dict())
    images = torch.randn(2, 3, 64, 64)

    torch.testing.assert_close(encoder(images), plain(images))


@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
@pytest.mark.parametrize(
    ("backbone", "view_size", "expected"),
    [
        ("vit_b_16", 64, r"'vit_b_16' does not take views of data\.view_size 64"),
        ("googlenet", 224, r"'googlenet' gives GoogLeNetOutputs in training"),
        ("resnet18", 64, ""),
        ("timm/vit_tiny_patch16_224", 96, r"data\.view_size 96"),
        ("timm/resnet18", 33, ""),
    ],
)
def test_a_backbone_that_cannot_take_the_views_is_refused_at_once(
    backbone: str, view_size: int, expected: str
) -> None:
    config = ModelConfig(backbone=backbone, dim=16, bn_sub_batch=4)
    encoder = build_encoder(config, seed=0)

    if not expected:
        check_encoder(encoder, config, view_size=view_size)
        return
    with pytest.raises(ConfigError, match=expected) as said:
        check_encoder(encoder, config, view_size=view_size)
    assert "\n" not in str(said.value)


def test_a_stem_that_is_not_there_is_not_replaced() -> None:
    config = ModelConfig(backbone="convnext_tiny", stem="cifar")

    with pytest.raises(ConfigError, match=r"'convnext_tiny' has not.*model\.stem imagenet"):
        build_encoder(config, seed=0)
