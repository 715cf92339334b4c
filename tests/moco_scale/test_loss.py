"""InfoNCE in pieces, against the definition."""

import pytest
import torch
from torch.nn import functional

from moco_scale import loss as module
from moco_scale.loss import info_nce


def unit(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return functional.normalize(drawn, dim=-1)


@pytest.mark.parametrize("held", [1, 7, 40, 10_000])
@pytest.mark.parametrize("temperature", [0.07, 0.2, 1e-3])
def test_pieces_give_the_loss_accuracy_and_gradients_of_the_whole(
    held: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", held)
    q, k, negatives = unit(8, 5, seed=0), unit(8, 5, seed=1), unit(30, 5, seed=2).T
    k[:3] = functional.normalize(q[:3] + 0.1 * k[:3], dim=1)  # some are found
    q, k = q.requires_grad_(), k.requires_grad_()

    loss, accuracy = info_nce(q, (q * k).sum(1), negatives, temperature=temperature)
    gradients = torch.autograd.grad(loss, (q, k))

    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives], dim=1) / temperature
    expected = functional.cross_entropy(logits, torch.zeros(8, dtype=torch.long))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, (q, k)))
    assert float(accuracy) == (logits.argmax(1) == 0).double().mean()
    assert 0 < float(accuracy) < 1


def test_a_number_that_is_not_finite_makes_the_loss_so() -> None:
    q, k, negatives = unit(8, 5, seed=0), unit(8, 5, seed=1), unit(30, 5, seed=2).T
    q[3, 2] = float("nan")

    loss, _ = info_nce(q, (q * k).sum(1), negatives, temperature=0.1)

    assert not loss.isfinite()


def test_the_logits_are_never_held_at_once() -> None:
    q = unit(256, 16, seed=0).float().requires_grad_()
    negatives = unit(65_536, 16, seed=2).T.float()

    with torch.profiler.profile(profile_memory=True) as profile:
        loss, _ = info_nce(q, q.detach().square().sum(1), negatives, temperature=0.1)
        loss.backward()

    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 2**20 < largest <= 4 * module._CHUNK_ELEMENTS  # bytes: a quarter of the logits
