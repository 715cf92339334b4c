"""The learning rate as a function of the step."""

import math
from typing import Literal

import pytest
import torch

from moco_scale.optim import OptimConfig, SchedulePosition, build_sgd, load_sgd, lr_at, steps_left


def at(step: int, *, steps_per_epoch: int = 10, batch: int = 4) -> SchedulePosition:
    return SchedulePosition(
        step=step, images=step * batch, steps_per_epoch=steps_per_epoch, global_batch_size=batch
    )


def test_cosine_falls_from_the_peak_to_zero() -> None:
    config = OptimConfig(lr=0.03, epochs=2)

    rates = [lr_at(at(step), config) for step in range(21)]

    assert rates[0] == 0.03
    assert rates[10] == pytest.approx(0.015)
    assert rates[5] == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[20] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


def test_step_divides_by_ten_at_each_milestone() -> None:
    config = OptimConfig(lr=1.0, schedule="step", milestones=(2, 3), epochs=4)

    rates = [lr_at(at(step, steps_per_epoch=5), config) for step in (0, 9, 10, 14, 15, 19)]

    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_rises_to_the_peak() -> None:
    config = OptimConfig(lr=0.4, lr_warmup_steps=4, epochs=3)

    rates = [lr_at(at(step, steps_per_epoch=8), config) for step in range(5)]

    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


@pytest.mark.parametrize("schedule", ["cosine", "step"])
def test_a_schedule_in_images_follows_the_images_however_long_epochs_are(
    schedule: Literal["cosine", "step"],
) -> None:
    config = OptimConfig(lr=1.0, schedule=schedule, images=400, lr_decay_images=100)
    # 200 images seen, of which a shard set that has since grown would make 7 or 300 steps.
    places = [
        SchedulePosition(step=step, images=200, steps_per_epoch=9, global_batch_size=4)
        for step in (7, 50, 300)
    ]

    assert {lr_at(place, config) for place in places} == {lr_at(at(50), config)}
    assert {steps_left(place, config) for place in places} == {50}
    assert lr_at(places[0], config) == pytest.approx(0.5 if schedule == "cosine" else 0.01)


def test_the_last_step_of_a_schedule_in_images_may_take_more_than_is_left() -> None:
    assert steps_left(at(99), OptimConfig(images=399)) == 1
    assert steps_left(at(100), OptimConfig(images=399)) == 0


def test_saved_momentum_takes_the_weights_layout_and_this_runs_settings() -> None:
    saved_weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3))
    saved = build_sgd([saved_weight], OptimConfig(sgd_momentum=0.5, weight_decay=0.3))
    saved_weight.square().sum().backward()
    saved.step()
    weight = torch.nn.Parameter(
        saved_weight.detach().clone().contiguous(memory_format=torch.channels_last)
    )
    optimizer = build_sgd([weight], OptimConfig(sgd_momentum=0.9, weight_decay=0.1))

    load_sgd(optimizer, saved.state_dict())

    momentum = optimizer.state[weight]["momentum_buffer"]
    assert torch.equal(momentum, saved.state[saved_weight]["momentum_buffer"])
    assert momentum.stride() == weight.stride()
    assert (optimizer.defaults["momentum"], optimizer.param_groups[0]["momentum"]) == (0.9, 0.9)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    weight.grad = torch.ones_like(weight)
    expected = weight.detach() - 0.03 * (0.9 * momentum + 1 + 0.1 * weight.detach())
    optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("weight_decay", -0.1),
        ("sgd_momentum", 1.0),
        ("epochs", 0),
        ("max_skipped_frac", 1.5),
        ("milestones", (3, 2)),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"optim\.{name}"):
        OptimConfig(**{name: value})
