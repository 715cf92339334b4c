"""Batch normalisation in groups, against nn.BatchNorm2d on each group."""

import pytest
import torch
from torch import nn

from moco_scale.group_norm import (
    GroupBatchNorm2d,
    batch_statistics,
    commit_statistics,
    estimate_bn_statistics,
)


def images(count: int, *, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, 5, 4, generator=generator, dtype=torch.float64) * 2 + 1


@pytest.mark.parametrize("count", [4, 8, 12])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_group_is_normalised_as_batch_norm_would(
    count: int, layout: torch.memory_format
) -> None:
    grouped, plain = GroupBatchNorm2d(3, sub_batch=4).double(), nn.BatchNorm2d(3).double()
    x = images(count).contiguous(memory_format=layout).requires_grad_()
    upstream = images(count, seed=1)

    expected = torch.cat([plain(group) for group in x.split(4)])
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), x)
    found = grouped(x)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), x)

    torch.testing.assert_close(found, expected, check_stride=False)
    torch.testing.assert_close(gradient, expected_gradient, check_stride=False)
    assert found.is_contiguous(memory_format=layout)


def test_names_and_evaluation_are_batch_norms() -> None:
    grouped, plain = GroupBatchNorm2d(3, sub_batch=4), nn.BatchNorm2d(3)
    plain(images(9).float())
    grouped.load_state_dict(plain.state_dict())
    grouped.eval()
    plain.eval()

    assert grouped.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(grouped(images(5).float()), plain(images(5).float()))


def test_running_statistics_wait_for_the_commit_and_are_the_mean_over_groups() -> None:
    layer = GroupBatchNorm2d(3, sub_batch=4).double()
    x = images(12)

    layer(x)
    before = layer.running_mean.clone(), layer.running_var.clone()
    mean, var = batch_statistics(layer)
    commit_statistics(layer)

    groups = x.split(4)
    expected_mean = torch.stack([g.mean(dim=(0, 2, 3)) for g in groups]).mean(dim=0)
    expected_var = torch.stack([g.var(dim=(0, 2, 3)) for g in groups]).mean(dim=0)
    assert torch.equal(before[0], torch.zeros(3).double())
    assert torch.equal(before[1], torch.ones(3).double())
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(var, expected_var)
    torch.testing.assert_close(layer.running_mean, 0.1 * expected_mean)
    torch.testing.assert_close(layer.running_var, 0.9 + 0.1 * expected_var)
    assert layer.num_batches_tracked == 1


def test_estimated_statistics_are_those_of_all_batches_and_change_nothing_else() -> None:
    encoder = nn.Sequential(nn.Conv2d(3, 4, 1), GroupBatchNorm2d(4, sub_batch=32)).double()
    weights = {name: tensor.clone() for name, tensor in encoder.named_parameters()}
    batches = [images(6, seed=1), images(6, seed=2), images(3, seed=3), images(1, seed=4)]

    estimate_bn_statistics(encoder, batches)

    with torch.no_grad():
        means = [encoder[0](batch).mean(dim=(0, 2, 3)) for batch in batches[:3]]
    torch.testing.assert_close(
        encoder[1].running_mean, (6 * means[0] + 6 * means[1] + 3 * means[2]) / 15
    )
    assert encoder[1].sub_batch == 32
    assert not encoder.training
    for name, tensor in encoder.named_parameters():
        assert torch.equal(tensor, weights[name])
