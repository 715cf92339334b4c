"""SGD and its learning rate, as a function of the step."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """SGD as in the paper, section 3.3: weight decay on every parameter, BN and biases included."""

    lr: float = 0.03
    """Highest learning rate, for data.global_batch_size as given: it is not scaled."""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters."""
    sgd_momentum: float = 0.9
    """Momentum of SGD; model.momentum is the key encoder's."""
    schedule: Literal["cosine", "step"] = "cosine"
    """How the learning rate falls: by half a cosine (v2), or tenfold at each milestone (v1)."""
    milestones: tuple[int, ...] = (120, 160)
    """Epochs at which the 'step' schedule divides the learning rate by ten."""
    epochs: int = 200
    """Length of the schedule, in passes over the shard set."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to lr."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "sgd_momentum", "lr_warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} must be at least 0, not {getattr(self, name)}")
        if self.sgd_momentum >= 1:
            raise ValueError(f"optim.sgd_momentum must be below 1, not {self.sgd_momentum}")
        if self.epochs < 1:
            raise ValueError(f"optim.epochs must be at least 1, not {self.epochs}")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"optim.milestones must be rising, not {self.milestones}")


def lr_at(step: int, config: OptimConfig, *, steps_per_epoch: int) -> float:
    """Learning rate of a step, counted from 0."""
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    if config.schedule == "step":
        passed = sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
        return float(config.lr * 0.1**passed)
    first, last = config.lr_warmup_steps, config.epochs * steps_per_epoch
    done = min(1.0, (step - first) / max(1, last - first))
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def build_sgd(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.SGD:
    """SGD over all of the query encoder's parameters; the learning rate is set at each step."""
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def set_lr(optimizer: torch.optim.SGD, lr: float) -> None:
    """The learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
