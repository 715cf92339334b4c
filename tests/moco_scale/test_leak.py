"""Batch normalisation must not tell which key is a query's own, by whom both are normalised with.

The paper shuffles for this alone (section 3.3). Here: a query and its key are in one group, and
have the same group-mates, as often as chance has it and no oftener; in every recipe, and, as the
groups are the same, at every world size.
"""

import dataclasses
import math
from collections.abc import Callable
from importlib import resources

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from moco_scale.batch_shuffle import key_order
from moco_scale.config import TrainConfig
from moco_scale.distributed import Ranks, allowed_worlds, one_rank
from moco_scale.group_norm import GroupBatchNorm2d
from moco_scale.model import MoCo, ModelConfig
from moco_scale.settings import from_mapping, read_preset
from tests.support.distributed import run_distributed

PRESETS = sorted(
    path.name.removesuffix(".toml")
    for path in (resources.files("moco_scale") / "presets").iterdir()
    if path.name.endswith(".toml")
)
STEPS = 2000
ALPHA = 1e-3
"""Of a thousand sound orders at most one would fail a check; of this one it is settled for good."""

Integers = NDArray[np.int64]
KeyOrder = Callable[..., Integers]
Groups = set[frozenset[int]]


def preset(name: str) -> TrainConfig:
    return from_mapping(TrainConfig, read_preset(name))


class ToldByBatchNorm(nn.Module):
    """An encoder that learns from its normalisation's output alone who was normalised with whom.

    An image shows the position of its sample. Each position has a channel of its own, 1 for that
    sample and 0 for all others: normalised, it differs from 0 in the group with the sample alone.
    """

    def __init__(self, *, positions: int, dim: int, sub_batch: int) -> None:
        super().__init__()
        self.norm = GroupBatchNorm2d(positions, sub_batch=sub_batch)
        self.head = nn.Linear(positions, dim)
        self.groups: Groups = set()

    def forward(self, views: Tensor) -> Tensor:
        """N x 3 x 1 x 1 in, N x dim out."""
        positions = views[:, 0, 0, 0].long()
        one_hot = functional.one_hot(positions, self.norm.num_features).to(views.dtype)
        normalised = self.norm(one_hot[:, :, None, None])[:, :, 0, 0]
        is_with = normalised.detach() != 0
        assert bool(is_with[torch.arange(len(views)), positions].all()), "it is in its own group"
        for row in is_with.unique(dim=0):
            self.groups.add(frozenset(row.nonzero()[:, 0].tolist()))
        embedded: Tensor = self.head(normalised)
        return embedded


def images_of(positions: Integers) -> Tensor:
    return torch.from_numpy(positions)[:, None, None, None].expand(-1, 3, 1, 1).float()


def groups_of(order: Integers, sub_batch: int) -> Groups:
    """By definition: consecutive samples."""
    return {frozenset(group) for group in order.reshape(-1, sub_batch).tolist()}


def groups_formed(order: Integers, *, world_size: int, accumulation: int, sub_batch: int) -> Groups:
    """By ranks that encode their rows of this order in parts, as MoCo does."""
    encoder = ToldByBatchNorm(positions=len(order), dim=1, sub_batch=sub_batch)
    for rows in torch.split(images_of(order), len(order) // world_size):
        for part in torch.split(rows, len(rows) // accumulation):
            encoder(part)
    return encoder.groups


@pytest.mark.parametrize("name", PRESETS)
def test_the_groups_are_the_same_sets_at_every_world_size_and_accumulation(name: str) -> None:
    config = preset(name)
    batch, sub_batch = config.data.global_batch_size, config.model.bn_sub_batch
    keys = key_order(
        seed=3, step=17, global_batch_size=batch, shuffle_domain=config.model.shuffle_domain
    )

    tried = set()
    for order in (np.arange(batch), keys):
        for accumulation in range(1, batch // sub_batch + 1):
            for world_size in allowed_worlds(
                global_batch_size=batch, bn_sub_batch=sub_batch, accumulation=accumulation
            ):
                found = groups_formed(
                    order, world_size=world_size, accumulation=accumulation, sub_batch=sub_batch
                )
                assert found == groups_of(order, sub_batch), (world_size, accumulation)
                tried.add((world_size, accumulation))

    assert {(1, 1), (1, 2), (2, 1), (batch // sub_batch, 1), (1, batch // sub_batch)} <= tried


def groups_of_a_step(
    ranks: Ranks, model: ModelConfig, batch: int, accumulation: int, step: int
) -> tuple[Groups, Groups]:
    """Of queries and of keys, as this rank's MoCo forms them."""
    encoder = ToldByBatchNorm(positions=batch, dim=model.dim, sub_batch=model.bn_sub_batch)
    moco = MoCo(encoder, model, seed=0, ranks=ranks)
    keys = moco.encoder_k
    assert isinstance(keys, ToldByBatchNorm)
    mine = np.array_split(np.arange(batch), ranks.world_size)[ranks.rank]
    views = images_of(mine)
    moco.backward(views, views, sample_ids=mine, step=step, accumulation=accumulation)
    return encoder.groups, keys.groups


def assert_as_defined(found: list[tuple[Groups, Groups]], model: ModelConfig, batch: int) -> None:
    """What all ranks formed in step 5, beside the definition."""
    orders = [
        key_order(
            seed=0, step=5, half=half, global_batch_size=batch, shuffle_domain=model.shuffle_domain
        )
        for half in range(1 + model.symmetric)
    ]
    queries, keys = (set().union(*sides) for sides in zip(*found, strict=True))
    assert queries == groups_of(np.arange(batch), model.bn_sub_batch)
    assert keys == set().union(*(groups_of(order, model.bn_sub_batch) for order in orders))
    assert len(keys) == len(orders) * len(queries), "the halves have orders of their own"


@pytest.mark.parametrize("symmetric", [False, True], ids=["one loss", "symmetric"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_step_forms_the_groups_of_the_definition(name: str, symmetric: bool) -> None:
    config = preset(name)
    batch = config.data.global_batch_size
    model = dataclasses.replace(config.model, dim=2, queue_size=2 * batch, symmetric=symmetric)

    for accumulation in (1, 2):
        found = groups_of_a_step(one_rank(), model, batch, accumulation, 5)

        assert_as_defined([found], model, batch)


def groups_by_case(
    ranks: Ranks, cases: list[tuple[ModelConfig, int]]
) -> list[tuple[Groups, Groups]]:
    torch.set_num_threads(1)
    return [groups_of_a_step(ranks, model, 32, accumulation, 5) for model, accumulation in cases]


@pytest.mark.parametrize("world_size", [2, 4])
def test_real_ranks_form_the_groups_of_the_definition(world_size: int) -> None:
    cases = [
        (
            ModelConfig(
                dim=2, queue_size=64, bn_sub_batch=4, shuffle_domain=domain, symmetric=symmetric
            ),
            accumulation,
        )
        for domain in (8, 32)  # inside a rank, and over all of them
        for symmetric in (False, True)
        for accumulation in (1, 2)
    ]

    found = run_distributed(groups_by_case, world_size, cases)

    for (model, _), of_ranks in zip(cases, zip(*found, strict=True), strict=True):
        assert_as_defined(list(of_ranks), model, 32)


def leaks(order: KeyOrder, *, batch: int, model: ModelConfig, seed: int, half: int) -> list[str]:
    """What is more frequent than chance, over STEPS steps; nothing where all is well.

    Chance is that of a uniform permutation of each shuffle domain. Bounds are Chernoff's for the
    binomial: a frequency f of n trials of probability p is exceeded with odds of at most
    exp(-n KL(f || p)). (Mates of one position are drawn without replacement, for which the bound
    holds too: Hoeffding 1963, theorem 4.) Over positions, ALPHA is divided by their number.
    """
    sub_batch, domain = model.bn_sub_batch, model.shuffle_domain
    home = np.arange(batch) // sub_batch  # of each query
    same, mates = np.zeros(batch, dtype=np.int64), np.zeros(batch, dtype=np.int64)
    for step in range(STEPS):
        slots = np.argsort(
            order(seed=seed, step=step, half=half, global_batch_size=batch, shuffle_domain=domain)
        )
        group = slots // sub_batch  # of each key
        same += group == home
        of_mates = group.reshape(-1, sub_batch)  # a row for each group of queries
        shared = (of_mates[:, :, None] == of_mates[:, None, :]).sum(axis=2) - 1
        mates += shared.reshape(-1)
    found = []
    for what, counts, trials, chance in (
        ("the same group", same, STEPS, sub_batch / domain),
        ("the same mates", mates, STEPS * (sub_batch - 1), (sub_batch - 1) / (domain - 1)),
    ):
        # Of mates each pair has been counted from both sides.
        once = 2 if what == "the same mates" else 1
        mean = counts.sum() / (batch * trials)
        if batch * trials / once * divergence(mean, chance) > math.log(2 / ALPHA):
            found.append(f"{what}, over all positions: {mean:.5f}, by chance {chance:.5f}")
        worst = int(counts.argmax())
        frequency = counts[worst] / trials
        is_above = frequency > chance
        if is_above and trials * divergence(frequency, chance) > math.log(batch / ALPHA):
            found.append(f"{what}, position {worst}: {frequency:.5f}, by chance {chance:.5f}")
    return found


def divergence(f: float, p: float) -> float:
    """KL of two coins, in nats."""
    terms = [(f, p), (1 - f, 1 - p)]
    return sum(one * math.log(one / other) for one, other in terms if one > 0)


@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("name", PRESETS)
def test_no_query_and_key_share_a_group_or_mates_more_often_than_chance(
    name: str, half: int
) -> None:
    config = preset(name)

    found = leaks(
        key_order,
        batch=config.data.global_batch_size,
        model=config.model,
        seed=config.run.seed,
        half=half,
    )

    assert found == []


def in_order(*, global_batch_size: int, **_: object) -> Integers:
    """No shuffle."""
    return np.arange(global_batch_size)


def whole_groups(*, seed: int, step: int, global_batch_size: int, **_: object) -> Integers:
    """Groups of 32 change places, each with all its samples."""
    moved = key_order(
        seed=seed, step=step, global_batch_size=global_batch_size // 32, shuffle_domain=8
    )
    return np.arange(global_batch_size).reshape(-1, 32)[moved].reshape(-1)


def one_at_home(**asked: int) -> Integers:
    """A shuffle that puts sample 5 back into its place every other step."""
    order = key_order(**asked)
    if asked["step"] % 2:
        place = int(np.flatnonzero(order == 5)[0])
        order[[5, place]] = order[[place, 5]]
    return order


@pytest.mark.parametrize(
    ("order", "leak"),
    [
        (in_order, ["group, over all", "group, position", "mates, over all", "mates, position"]),
        (whole_groups, ["mates, over all", "mates, position"]),
        (one_at_home, ["group, position 5"]),
    ],
)
def test_an_order_that_leaks_is_caught(order: KeyOrder, leak: list[str]) -> None:
    config = preset("moco_v2_r50")

    found = leaks(order, batch=256, model=config.model, seed=0, half=0)

    assert all(any(what in said for said in found) for what in leak), found
