"""Every constant of a published recipe, pinned: a drift of one of them costs a point unnoticed."""

import dataclasses
from typing import Any

import pytest

from moco_scale.config import TrainConfig
from moco_scale.optim import SchedulePosition, lr_at, steps_left
from moco_scale.settings import from_mapping, read_preset

COMMON = {
    "data.view_size": 224,
    "data.min_crop_area_frac": 0.2,
    "data.colour": "exact",
    "model.backbone": "resnet50",
    "model.stem": "imagenet",
    "model.dim": 128,
    "model.dictionary": "queue",
    "model.symmetric": False,
    "model.queue_size": 65_536,
    "model.momentum": 0.999,
    "optim.weight_decay": 1e-4,
    "optim.sgd_momentum": 0.9,
    "optim.lr_warmup_steps": 0,
}
BATCH_256 = {
    "data.global_batch_size": 256,
    "model.bn_sub_batch": 32,
    "model.shuffle_domain": 256,
    "optim.lr": 0.03,
}
V1 = {"data.recipe": "v1", "model.mlp_head": False, "model.temperature": 0.07}
V2 = {
    "data.recipe": "v2",
    "model.mlp_head": True,
    "model.temperature": 0.2,
    "optim.schedule": "cosine",
}

# arXiv 1911.05722, sections 3.3, 4 and 4.1; arXiv 2003.04297, section 2; the published code's
# defaults and flags; of CIFAR its notebook.
PUBLISHED: dict[str, dict[str, Any]] = {
    "moco_v1_r50": COMMON | BATCH_256 | V1 | {
        "optim.schedule": "step",
        "optim.milestones": (120, 160),
        "optim.lr_decay": 0.1,
        "optim.epochs": 200,
    },
    "moco_v2_r50": COMMON | BATCH_256 | V2 | {"optim.epochs": 200},
    "moco_v2_r50_800ep": COMMON | BATCH_256 | V2 | {"optim.epochs": 800},
    "moco_v1_ig1b": COMMON | V1 | {
        "data.global_batch_size": 1_024,
        "model.bn_sub_batch": 16,
        "model.shuffle_domain": 1_024,
        "optim.lr": 0.12,
        "optim.schedule": "step",
        "optim.lr_decay": 0.9,
        "optim.lr_decay_images": 62_500 * 1_024,
        "optim.images": 1_250_000 * 1_024,
    },
    "moco_v2_cifar": COMMON | {
        "data.global_batch_size": 512,
        "data.recipe": "cifar",
        "data.view_size": 32,
        "data.min_crop_area_frac": 0.08,
        "model.backbone": "resnet18",
        "model.stem": "cifar",
        "model.mlp_head": False,
        "model.queue_size": 4_096,
        "model.momentum": 0.99,
        "model.temperature": 0.1,
        "model.bn_sub_batch": 64,
        "model.shuffle_domain": 512,
        "optim.lr": 0.06,
        "optim.weight_decay": 5e-4,
        "optim.schedule": "cosine",
        "optim.epochs": 200,
    },
}  # fmt: skip


def preset(name: str) -> TrainConfig:
    return from_mapping(TrainConfig, read_preset(name))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_constants(name: str) -> None:
    settings = dataclasses.asdict(preset(name))

    found = {
        path: settings[path.partition(".")[0]][path.partition(".")[2]] for path in PUBLISHED[name]
    }

    assert found == PUBLISHED[name]


def at(step: int, *, batch: int) -> SchedulePosition:
    return SchedulePosition(
        step=step, images=step * batch, steps_per_epoch=900_000, global_batch_size=batch
    )


def test_the_rate_of_ig1b_falls_by_a_tenth_every_62_500_steps() -> None:
    optim = preset("moco_v1_ig1b").optim

    def rate(step: int) -> float:
        return lr_at(at(step, batch=1_024), optim)

    assert steps_left(at(0, batch=1_024), optim) == 1_250_000
    assert rate(0) == rate(62_499) == 0.12
    assert rate(62_500) == pytest.approx(0.108)
    assert rate(1_249_999) == pytest.approx(0.12 * 0.9**19)


def test_a_schedule_in_images_keeps_its_images_at_another_batch() -> None:
    optim = preset("moco_v1_ig1b").optim

    assert steps_left(at(0, batch=2_048), optim) == 625_000
    assert lr_at(at(31_250, batch=2_048), optim) == pytest.approx(0.108)
