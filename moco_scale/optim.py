"""SGD and its learning rate, as a function of the place in the schedule."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn


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
    """How the learning rate falls: by half a cosine (v2), or in steps (v1)."""
    lr_decay: float = 0.1
    """What each step of the 'step' schedule multiplies the learning rate by."""
    milestones: tuple[int, ...] = (120, 160)
    """Epochs at which the 'step' schedule does so."""
    lr_decay_images: int = 0
    """Images after which the 'step' schedule does so, again and again; instead of milestones."""
    epochs: int = 200
    """Length of the schedule, in passes over the shard set."""
    images: int = 0
    """Length of the schedule in images, instead of epochs; for sets too large for many passes."""
    accumulation: int = 1
    """Parts that a rank's batch goes through the encoders in; the step is the same, the memory
    smaller."""
    max_skipped_steps: int = 10
    """Steps in a row that may be without effect, because something in them was not finite."""
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0 to lr."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "sgd_momentum", "lr_warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} must be at least 0, not {getattr(self, name)}")
        if self.sgd_momentum >= 1:
            raise ValueError(f"optim.sgd_momentum must be below 1, not {self.sgd_momentum}")
        for name in ("epochs", "accumulation", "max_skipped_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"optim.{name} must be at least 1, not {getattr(self, name)}")
        for name in ("images", "lr_decay_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name} must be at least 0, not {getattr(self, name)}")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"optim.milestones must be rising, not {self.milestones}")


def schedule_steps(config: OptimConfig, *, steps_per_epoch: int, global_batch_size: int) -> int:
    """Length of the schedule in steps."""
    if config.images:
        return -(-config.images // global_batch_size)
    return config.epochs * steps_per_epoch


def lr_at(step: int, config: OptimConfig, *, steps_per_epoch: int, global_batch_size: int) -> float:
    """Learning rate of a step, counted from 0."""
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    if config.schedule == "step":
        if config.lr_decay_images:
            passed = step * global_batch_size // config.lr_decay_images
        else:
            passed = sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
        return float(config.lr * config.lr_decay**passed)
    first = config.lr_warmup_steps
    last = schedule_steps(
        config, steps_per_epoch=steps_per_epoch, global_batch_size=global_batch_size
    )
    done = min(1.0, (step - first) / max(1, last - first))
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def build_sgd(parameters: Iterable[nn.Parameter], config: OptimConfig) -> torch.optim.SGD:
    """SGD over all of the query encoder's parameters; the learning rate is set at each step.

    Fused, because only that can be told on the device not to make a step (see `step_if`).
    """
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.sgd_momentum,
        weight_decay=config.weight_decay,
        fused=True,
    )


def step_if(is_finite: Tensor, optimizer: torch.optim.SGD) -> None:
    """Make a step if a tensor of one bool is true, without the host knowing."""
    if not optimizer.state:
        # Else the first step would make them of garbage, though it may be one that does not count.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    optimizer.found_inf = (~is_finite).to(torch.float32)  # type: ignore[attr-defined]  # torch's own way for AMP
    optimizer.step()


def set_lr(optimizer: torch.optim.SGD, lr: float) -> None:
    """The learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
