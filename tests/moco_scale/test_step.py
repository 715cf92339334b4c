"""The whole step against the paper's Algorithm 1 with shuffled BN, written out plainly."""

import dataclasses
import uuid
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moco_scale.batch_shuffle import key_order
from moco_scale.distributed import Ranks, one_rank
from moco_scale.group_norm import GroupBatchNorm2d
from moco_scale.model import MoCo, ModelConfig
from moco_scale.optim import OptimConfig
from moco_scale.trainer import RunConfig, Trainer
from pipelines.config import DataConfig
from pipelines.hashing import hash_words
from tests.support.distributed import run_distributed
from tests.support.fake_loader import FakeLoader

STEPS, BATCH, GROUP, DIM = 20, 16, 4, 6
# 20 steps of 16 keys go round a queue of 40 eight times, mostly past its end.
MODEL = ModelConfig(
    dim=DIM, queue_size=40, momentum=0.9, temperature=0.2, bn_sub_batch=GROUP, shuffle_domain=8
)
OPTIM = OptimConfig(lr=0.1, weight_decay=0.01, sgd_momentum=0.8, schedule="step", epochs=10)
SEED = 5
NUM_IDS = 64  # of the fake loader: its epochs have four steps


def small_encoder() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            GroupBatchNorm2d(4, sub_batch=GROUP),
            nn.ReLU(),
            nn.Conv2d(4, 5, 3, stride=2, bias=False),
            GroupBatchNorm2d(5, sub_batch=GROUP),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(5, DIM),
        )


def train(
    ranks: Ranks, model: ModelConfig, channels_last: bool = True, accumulation: int = 1
) -> dict[str, Any]:
    """Twenty steps with the real trainer, in float64."""
    loader = FakeLoader(ranks, global_batch_size=BATCH, dtype=torch.float64)
    losses = []
    trainer = Trainer(
        data=DataConfig(global_batch_size=BATCH),
        model=model,
        optim=dataclasses.replace(OPTIM, accumulation=accumulation),
        run=RunConfig(
            url=f"memory://{uuid.uuid4()}",
            seed=SEED,
            log_every=1,
            max_steps=STEPS,
            channels_last=channels_last,
        ),
        loader=loader,
        ranks=ranks,
        progress=lambda metrics: losses.append(metrics.loss),
        encoder=small_encoder(),
    )
    trainer.model.double()
    trainer.run()
    return {**trainer.model.state_dict(), "losses": torch.tensor(losses, dtype=torch.float64)}


def algorithm_1(model: ModelConfig) -> dict[str, Any]:
    """The same steps for the whole batch at once, as plain arithmetic."""
    state = initial_state(model)
    f_q = {n.removeprefix("encoder_q."): t for n, t in state.items() if n.startswith("encoder_q")}
    f_k = {name: tensor.clone() for name, tensor in f_q.items()}
    queue, losses = state["queue"], []
    sgd = Sgd(f_q)
    loader = FakeLoader(one_rank(), global_batch_size=BATCH, dtype=torch.float64)
    for step in range(STEPS):
        batch = next(loader)
        sgd.begin()
        halves = [(batch.view_q, batch.view_k), (batch.view_k, batch.view_q)]
        loss, enqueued, notes_q, notes_k = 0.0, [], [], []
        for half, (view_q, view_k) in enumerate(halves if model.symmetric else halves[:1]):
            q = encode(f_q, view_q, notes_q)
            order = shuffled(model, step, half)
            k = torch.empty(BATCH, DIM, dtype=torch.float64)
            with torch.no_grad():
                k[order] = encode(f_k, view_k[order], notes_k)
            l_pos = torch.einsum("nc,nc->n", q, k)[:, None]
            l_neg = torch.einsum("nc,ck->nk", q, queue)
            loss = loss + cross_entropy(torch.cat([l_pos, l_neg], dim=1), 0, model)
            enqueued += list(k)
        losses.append(loss.item() / (2 if model.symmetric else 1))
        sgd.step(loss)
        commit(f_q, notes_q)
        commit(f_k, notes_k)
        for name in sgd.names:
            f_k[name] = model.momentum * f_k[name] + (1 - model.momentum) * f_q[name]
        for number, key in enumerate(enqueued):
            queue[:, (step * len(enqueued) + number) % model.queue_size] = key
    return {
        **{f"encoder_q.{name}": tensor for name, tensor in f_q.items()},
        **{f"encoder_k.{name}": tensor for name, tensor in f_k.items()},
        "queue": queue,
        "queue_ptr": torch.tensor([STEPS * len(enqueued) % model.queue_size]),
        "losses": torch.tensor(losses, dtype=torch.float64),
    }


def end_to_end(model: ModelConfig) -> dict[str, Any]:
    """Figure 2 (a): the other samples' keys are the negatives, and the loss flows through all."""
    state = initial_state(model)
    f_q = {n.removeprefix("encoder_q."): t for n, t in state.items()}
    sgd, losses = Sgd(f_q), []
    loader = FakeLoader(one_rank(), global_batch_size=BATCH, dtype=torch.float64)
    for step in range(STEPS):
        batch = next(loader)
        sgd.begin()
        notes: Notes = []
        order = shuffled(model, step, 0)
        k = encode(f_q, batch.view_k[order], notes)[torch.argsort(order)]
        q = encode(f_q, batch.view_q, notes)
        loss = cross_entropy(q @ k.T, torch.arange(BATCH), model)
        losses.append(loss.item())
        sgd.step(loss)
        commit(f_q, notes)
    return {
        **{f"encoder_q.{name}": tensor for name, tensor in f_q.items()},
        "losses": torch.tensor(losses, dtype=torch.float64),
    }


def memory_bank(model: ModelConfig) -> dict[str, Any]:
    """Figure 2 (b): the positive is the sample's own row, negatives are rows drawn at random."""
    state = initial_state(model)
    bank = state.pop("bank")
    f_q = {n.removeprefix("encoder_q."): t for n, t in state.items()}
    sgd, losses = Sgd(f_q), []
    loader = FakeLoader(one_rank(), global_batch_size=BATCH, dtype=torch.float64)
    for step in range(STEPS):
        batch = next(loader)
        sgd.begin()
        notes: Notes = []
        q = encode(f_q, batch.view_q, notes)
        words = hash_words(SEED, 0x9F, step, np.arange(model.queue_size))
        negatives = bank[(words % np.uint64(NUM_IDS)).astype(np.int64)]
        l_pos = (q * bank[batch.sample_ids]).sum(1, keepdim=True)
        loss = cross_entropy(torch.cat([l_pos, q @ negatives.T], dim=1), 0, model)
        losses.append(loss.item())
        sgd.step(loss)
        commit(f_q, notes)
        for place, row in enumerate(batch.sample_ids):
            bank[row] = (bank[row] + q[place].detach()) / 2
            bank[row] /= bank[row].norm()
    return {
        **{f"encoder_q.{name}": tensor for name, tensor in f_q.items()},
        "bank": bank,
        "losses": torch.tensor(losses, dtype=torch.float64),
    }


def initial_state(model: ModelConfig) -> dict[str, Tensor]:
    moco = MoCo(small_encoder(), model, seed=SEED, ranks=one_rank(), num_ids=NUM_IDS).double()
    return {name: tensor.clone() for name, tensor in moco.state_dict().items()}


def shuffled(model: ModelConfig, step: int, half: int) -> Tensor:
    order = key_order(
        seed=SEED,
        step=step,
        half=half,
        global_batch_size=BATCH,
        shuffle_domain=model.shuffle_domain,
    )
    return torch.from_numpy(order)


def cross_entropy(logits: Tensor, columns: Tensor | int, model: ModelConfig) -> Tensor:
    logits = logits / model.temperature
    positives = logits[torch.arange(len(logits)), columns]
    return (torch.logsumexp(logits, dim=1) - positives).mean()


class Sgd:
    """SGD with momentum and weight decay, on the weights among a network's tensors."""

    def __init__(self, network: dict[str, Tensor]) -> None:
        self.network = network
        self.names = [name for name in network if name.endswith(("weight", "bias"))]
        self.velocity: dict[str, Tensor] = {}

    def begin(self) -> None:
        for name in self.names:
            self.network[name].requires_grad_(True)

    def step(self, loss: Tensor) -> None:
        gradients = torch.autograd.grad(loss, [self.network[name] for name in self.names])
        for name, gradient in zip(self.names, gradients, strict=True):
            weight = self.network[name].detach()
            pushed = gradient + OPTIM.weight_decay * weight
            self.velocity[name] = OPTIM.sgd_momentum * self.velocity.get(name, 0) + pushed
            self.network[name] = weight - OPTIM.lr * self.velocity[name]


Notes = list[tuple[str, Tensor, Tensor]]
"""Of each BN group that a batch has: layer, mean, unbiased variance."""


def encode(f: dict[str, Tensor], x: Tensor, notes: Notes) -> Tensor:
    x = torch.relu(normalise(f, "1", nn.functional.conv2d(x, f["0.weight"], padding=1), notes))
    x = torch.relu(normalise(f, "4", nn.functional.conv2d(x, f["3.weight"], stride=2), notes))
    x = x.mean(dim=(2, 3)) @ f["8.weight"].T + f["8.bias"]
    return x / x.norm(dim=1, keepdim=True)


def normalise(f: dict[str, Tensor], layer: str, x: Tensor, notes: Notes) -> Tensor:
    """Each group of four by itself."""
    out = []
    for start in range(0, BATCH, GROUP):
        group = x[start : start + GROUP]
        mean, var = group.mean(dim=(0, 2, 3)), group.var(dim=(0, 2, 3), correction=0)
        shaped = (group - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None]
        out.append(shaped * f[f"{layer}.weight"][:, None, None] + f[f"{layer}.bias"][:, None, None])
        count = group.numel() // group.shape[1]
        notes.append((layer, mean.detach(), var.detach() * count / (count - 1)))
    return torch.cat(out)


def commit(f: dict[str, Tensor], notes: Notes) -> None:
    """Running statistics follow the mean over all groups of the step."""
    for layer in ("1", "4"):
        for place, kind in ((1, "running_mean"), (2, "running_var")):
            mean = torch.stack([note[place] for note in notes if note[0] == layer]).mean(dim=0)
            f[f"{layer}.{kind}"] = 0.9 * f[f"{layer}.{kind}"] + 0.1 * mean
        f[f"{layer}.num_batches_tracked"] = f[f"{layer}.num_batches_tracked"] + 1


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name].contiguous(), tensor.contiguous(), rtol=1e-9, atol=1e-11, msg=name
        )


@pytest.mark.parametrize("shuffle_domain", [8, 16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_a_step_is_algorithm_1_with_shuffled_bn(shuffle_domain: int, channels_last: bool) -> None:
    model = dataclasses.replace(MODEL, shuffle_domain=shuffle_domain)

    found = train(one_rank(), model, channels_last)

    assert_equal(found, algorithm_1(model))


@pytest.mark.parametrize("accumulation", [2, 4])
def test_a_step_in_parts_is_the_same_step(accumulation: int) -> None:
    assert_equal(train(one_rank(), MODEL, accumulation=accumulation), algorithm_1(MODEL))


def test_a_symmetric_step_has_both_losses_against_the_old_queue() -> None:
    model = dataclasses.replace(MODEL, symmetric=True)

    assert_equal(train(one_rank(), model, accumulation=2), algorithm_1(model))


PLAIN = {"queue": algorithm_1, "end_to_end": end_to_end, "memory_bank": memory_bank}


@pytest.mark.parametrize("mechanism", ["end_to_end", "memory_bank"])
def test_the_other_mechanisms_of_figure_2(mechanism: str) -> None:
    model = dataclasses.replace(MODEL, dictionary=mechanism)

    assert_equal(train(one_rank(), model), PLAIN[mechanism](model))


@pytest.mark.parametrize(
    ("world_size", "changes", "accumulation"),
    # Domains inside a rank; one over two ranks; one over four; and all else that ranks share.
    [
        (2, {"shuffle_domain": 8}, 1),
        (2, {"shuffle_domain": 16}, 2),
        (4, {"shuffle_domain": 16}, 1),
        (2, {"symmetric": True, "shuffle_domain": 16}, 1),
        (2, {"dictionary": "end_to_end", "shuffle_domain": 16}, 1),
        (4, {"dictionary": "memory_bank"}, 1),
    ],
)
def test_every_world_size_makes_the_same_step(
    world_size: int, changes: dict[str, Any], accumulation: int
) -> None:
    model = dataclasses.replace(MODEL, **changes)

    states = run_distributed(train, world_size, model, True, accumulation)

    expected = PLAIN[model.dictionary](model)
    for rank, state in enumerate(states):
        losses = state.pop("losses")
        if rank == 0:
            torch.testing.assert_close(losses, expected["losses"], rtol=1e-9, atol=1e-11)
        assert_equal(state, {n: t for n, t in expected.items() if n != "losses"})
