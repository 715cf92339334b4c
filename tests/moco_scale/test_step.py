"""The whole step against the paper's Algorithm 1 with shuffled BN, written out plainly."""

import dataclasses
import uuid
from typing import Any

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
from tests.support.distributed import run_distributed
from tests.support.fake_loader import FakeLoader

STEPS, BATCH, GROUP, DIM = 5, 16, 4, 6
# 5 steps of 16 keys go round a queue of 40 twice, never meeting its end.
MODEL = ModelConfig(
    dim=DIM, queue_size=40, momentum=0.9, temperature=0.2, bn_sub_batch=GROUP, shuffle_domain=8
)
OPTIM = OptimConfig(lr=0.1, weight_decay=0.01, sgd_momentum=0.8, schedule="step", epochs=10)
SEED = 5


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


def train(ranks: Ranks, model: ModelConfig, channels_last: bool = True) -> dict[str, Any]:
    """Five steps with the real trainer, in float64."""
    loader = FakeLoader(ranks, global_batch_size=BATCH, dtype=torch.float64)
    losses = []
    trainer = Trainer(
        data=DataConfig(global_batch_size=BATCH),
        model=model,
        optim=OPTIM,
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
    """The same five steps for the whole batch at once, as plain arithmetic."""
    state = MoCo(small_encoder(), model, seed=SEED, ranks=one_rank()).double().state_dict()
    f_q = {
        n.removeprefix("encoder_q."): t.clone()
        for n, t in state.items()
        if n.startswith("encoder_q")
    }
    f_k = {name: tensor.clone() for name, tensor in f_q.items()}
    parameters = [name for name in f_q if name.endswith(("weight", "bias"))]
    queue, velocity, losses = state["queue"].clone(), {}, []
    loader = FakeLoader(one_rank(), global_batch_size=BATCH, dtype=torch.float64)
    for step in range(STEPS):
        batch = next(loader)
        for name in parameters:
            f_q[name].requires_grad_(True)
        q = encode(f_q, batch.view_q)
        order = torch.from_numpy(
            key_order(
                seed=SEED, step=step, global_batch_size=BATCH, shuffle_domain=model.shuffle_domain
            )
        )
        k = torch.empty(BATCH, DIM, dtype=torch.float64)
        with torch.no_grad():
            k[order] = encode(f_k, batch.view_k[order])
        l_pos = torch.einsum("nc,nc->n", q, k)[:, None]
        l_neg = torch.einsum("nc,ck->nk", q, queue)
        logits = torch.cat([l_pos, l_neg], dim=1) / model.temperature
        loss = (torch.logsumexp(logits, dim=1) - logits[:, 0]).mean()
        gradients = torch.autograd.grad(loss, [f_q[name] for name in parameters])
        losses.append(loss.item())
        with torch.no_grad():
            for name, gradient in zip(parameters, gradients, strict=True):
                f_q[name].requires_grad_(False)
                pushed = gradient + OPTIM.weight_decay * f_q[name]
                velocity[name] = OPTIM.sgd_momentum * velocity.get(name, 0) + pushed
                f_q[name] -= OPTIM.lr * velocity[name]
                f_k[name] = model.momentum * f_k[name] + (1 - model.momentum) * f_q[name]
            for position in range(BATCH):
                queue[:, (step * BATCH + position) % model.queue_size] = k[position]
    return {
        **{f"encoder_q.{name}": tensor for name, tensor in f_q.items()},
        **{f"encoder_k.{name}": tensor for name, tensor in f_k.items()},
        "queue": queue,
        "queue_ptr": torch.tensor([STEPS * BATCH % model.queue_size]),
        "losses": torch.tensor(losses, dtype=torch.float64),
    }


def encode(f: dict[str, Tensor], x: Tensor) -> Tensor:
    x = torch.relu(normalise(f, "1", nn.functional.conv2d(x, f["0.weight"], padding=1)))
    x = torch.relu(normalise(f, "4", nn.functional.conv2d(x, f["3.weight"], stride=2)))
    x = x.mean(dim=(2, 3)) @ f["8.weight"].T + f["8.bias"]
    return x / x.norm(dim=1, keepdim=True)


def normalise(f: dict[str, Tensor], layer: str, x: Tensor) -> Tensor:
    """Each group of four by itself; running statistics follow the mean over all groups."""
    out, means, variances = [], [], []
    for start in range(0, BATCH, GROUP):
        group = x[start : start + GROUP]
        mean, var = group.mean(dim=(0, 2, 3)), group.var(dim=(0, 2, 3), correction=0)
        shaped = (group - mean[:, None, None]) / torch.sqrt(var + 1e-5)[:, None, None]
        out.append(shaped * f[f"{layer}.weight"][:, None, None] + f[f"{layer}.bias"][:, None, None])
        means.append(mean.detach())
        count = group.numel() // group.shape[1]
        variances.append(var.detach() * count / (count - 1))
    for kind, values in (("running_mean", means), ("running_var", variances)):
        f[f"{layer}.{kind}"].mul_(0.9).add_(0.1 * torch.stack(values).mean(dim=0))
    f[f"{layer}.num_batches_tracked"] += 1
    return torch.cat(out)


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


@pytest.mark.parametrize(
    ("world_size", "shuffle_domain"),
    # Domains inside a rank; one over two ranks; one over four.
    [(2, 8), (2, 16), (4, 16)],
)
def test_every_world_size_makes_the_same_step(world_size: int, shuffle_domain: int) -> None:
    model = dataclasses.replace(MODEL, shuffle_domain=shuffle_domain)

    states = run_distributed(train, world_size, model)

    expected = algorithm_1(model)
    for rank, state in enumerate(states):
        losses = state.pop("losses")
        if rank == 0:
            torch.testing.assert_close(losses, expected["losses"], rtol=1e-9, atol=1e-11)
        assert_equal(state, {n: t for n, t in expected.items() if n != "losses"})
