"""SGD and its learning rate, as a function of the place in the schedule."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
    max_skipped_frac: float = 0.01
    """Part of all steps that may be so; max_skipped_steps of them may in any case."""
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
        if not 0 <= self.max_skipped_frac <= 1:
            raise ValueError(f"optim.max_skipped_frac must be 0 to 1, not {self.max_skipped_frac}")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"optim.milestones must be rising, not {self.milestones}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulePosition:
    """Where a run is in its data; what the schedule follows."""

    step: int
    """Global batches since the start, as if all epochs had been as long as this one."""
    images: int
    """Images since the start, over all ranks."""
    steps_per_epoch: int
    """Of this epoch."""
    global_batch_size: int


def steps_left(at: SchedulePosition, config: OptimConfig) -> int:
    """Steps to the end of the schedule, if the epochs to come are as long as this one."""
    if config.images:
        return max(0, -(-(config.images - at.images) // at.global_batch_size))
    return max(0, config.epochs * at.steps_per_epoch - at.step)


def lr_at(at: SchedulePosition, config: OptimConfig) -> float:
    """Learning rate of the step that begins here."""
    if at.step < config.lr_warmup_steps:
        return config.lr * (at.step + 1) / config.lr_warmup_steps
    if config.schedule == "step":
        if config.lr_decay_images:
            passed = at.images // config.lr_decay_images
        else:
            passed = sum(at.step >= epoch * at.steps_per_epoch for epoch in config.milestones)
        return float(config.lr * config.lr_decay**passed)
    first = config.lr_warmup_steps
    if config.images:
        here, first, last = at.images, first * at.global_batch_size, config.images
    else:
        here, last = at.step, config.epochs * at.steps_per_epoch
    done = min(1.0, (here - first) / max(1, last - first))
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


def load_sgd(optimizer: torch.optim.SGD, saved: Mapping[str, Any]) -> None:
    """Take the momentum out of a saved state; the settings stay this run's.

    (The optimizer's own load_state_dict would bring the saved settings back, and the saved layout
    in memory, which the fused step takes for that of the weights.)
    """
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    for index, of_parameter in saved["state"].items():
        parameter = parameters[index]
        momentum = torch.empty_like(parameter).copy_(of_parameter["momentum_buffer"])
        optimizer.state[parameter]["momentum_buffer"] = momentum


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
