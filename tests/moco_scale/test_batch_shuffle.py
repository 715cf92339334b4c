"""The order of the keys, and the images that cross ranks for it."""

import numpy as np
import pytest
import torch

from moco_scale.batch_shuffle import key_order, shuffle_rows, unshuffle_keys
from moco_scale.distributed import Ranks, one_rank
from tests.support.distributed import run_distributed


@pytest.mark.parametrize("domain", [8, 16, 48])
def test_keys_stay_in_their_domain_and_each_has_one_slot(domain: int) -> None:
    order = key_order(seed=1, step=3, global_batch_size=48, shuffle_domain=domain)

    for start in range(0, 48, domain):
        assert sorted(order[start : start + domain]) == list(range(start, start + domain))


def test_the_order_is_new_each_step_and_for_each_seed_and_domain() -> None:
    def order(seed: int, step: int) -> list[int]:
        return key_order(seed=seed, step=step, global_batch_size=64, shuffle_domain=32).tolist()

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)
    assert order(-1, 2) != order(1, 2)
    assert order(1, 2)[:32] != [slot - 32 for slot in order(1, 2)[32:]]


def test_the_order_is_uniform_and_steps_are_unrelated() -> None:
    orders = np.stack(
        [
            key_order(seed=7, step=step, global_batch_size=8, shuffle_domain=8)
            for step in range(4000)
        ]
    )

    counts = np.stack([(orders == sample).sum(axis=0) for sample in range(8)])
    same_as_before = (orders[1:] == orders[:-1]).mean()
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert chi_square < 90  # 49 degrees of freedom: exceeded once in some 3000 seeds
    assert abs(same_as_before - 1 / 8) < 0.01


def test_the_order_never_changes_between_versions() -> None:
    order = key_order(seed=0, step=0, global_batch_size=8, shuffle_domain=8)

    assert order.tolist() == [7, 2, 4, 6, 5, 1, 0, 3]


def shuffled(ranks: Ranks, batch: int, domain: int, dtype: torch.dtype) -> tuple[list[float], bool]:
    """One value an image, as this rank's key encoder sees them; and whether unshuffling works."""
    order = key_order(seed=3, step=5, global_batch_size=batch, shuffle_domain=domain)
    part = batch // ranks.world_size
    numbers = torch.arange(ranks.rank * part, (ranks.rank + 1) * part)
    rows = numbers[:, None, None, None].expand(part, 3, 2, 2).to(dtype)
    for layout in (torch.contiguous_format, torch.channels_last):
        laid = rows.contiguous(memory_format=layout)
        taken = shuffle_rows(laid, order, shuffle_domain=domain, ranks=ranks)
        assert taken.shape == rows.shape
        assert taken.is_contiguous(memory_format=layout)
        assert bool((taken == taken[:, :1, :1, :1]).all())
    keys = unshuffle_keys(taken[:, :, 0, 0].contiguous(), order, ranks=ranks)
    right = torch.equal(keys[:, 0].long(), torch.arange(batch))
    return taken[:, 0, 0, 0].tolist(), right


@pytest.mark.parametrize(
    ("world_size", "domain", "dtype"),
    [
        (1, 12, torch.float32),
        (2, 12, torch.float32),
        (2, 24, torch.bfloat16),
        (3, 12, torch.float32),
        (3, 24, torch.float32),
    ],
    ids=["alone", "inside a rank", "over both", "across borders", "over three"],
)
def test_images_and_keys_find_their_way(world_size: int, domain: int, dtype: torch.dtype) -> None:
    found = (
        [shuffled(one_rank(), 24, domain, dtype)]
        if world_size == 1
        else run_distributed(shuffled, world_size, 24, domain, dtype)
    )

    order = key_order(seed=3, step=5, global_batch_size=24, shuffle_domain=domain)
    assert [number for numbers, _ in found for number in numbers] == order.tolist()
    assert all(right for _, right in found)
