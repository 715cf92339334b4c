"""The learning rate as a function of the step."""

import math

import pytest

from moco_scale.optim import OptimConfig, lr_at


def test_cosine_falls_from_the_peak_to_zero() -> None:
    config = OptimConfig(lr=0.03, epochs=2)

    rates = [lr_at(step, config, steps_per_epoch=10, global_batch_size=4) for step in range(21)]

    assert rates[0] == 0.03
    assert rates[10] == pytest.approx(0.015)
    assert rates[5] == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert rates[20] == pytest.approx(0)
    assert rates == sorted(rates, reverse=True)


def test_step_divides_by_ten_at_each_milestone() -> None:
    config = OptimConfig(lr=1.0, schedule="step", milestones=(2, 3), epochs=4)

    rates = [
        lr_at(step, config, steps_per_epoch=5, global_batch_size=4)
        for step in (0, 9, 10, 14, 15, 19)
    ]

    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_rises_to_the_peak() -> None:
    config = OptimConfig(lr=0.4, lr_warmup_steps=4, epochs=3)

    rates = [lr_at(step, config, steps_per_epoch=8, global_batch_size=4) for step in range(5)]

    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("weight_decay", -0.1),
        ("sgd_momentum", 1.0),
        ("epochs", 0),
        ("milestones", (3, 2)),
    ],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"optim\.{name}"):
        OptimConfig(**{name: value})
