"""MoCo's settings, names and reproducibility; its arithmetic is in test_step.py."""

import dataclasses

import pytest
import torch

from moco_scale.batch_shuffle import key_order
from moco_scale.distributed import one_rank
from moco_scale.encoders import build_encoder
from moco_scale.errors import CheckpointError, ConfigError
from moco_scale.model import MoCo, ModelConfig

SMALL = ModelConfig(
    backbone="resnet18", dim=8, queue_size=32, bn_sub_batch=4, shuffle_domain=8, mlp_head=False
)


def build(
    config: ModelConfig = SMALL, *, seed: int = 0, autocast: torch.dtype | None = None
) -> MoCo:
    encoder = build_encoder(config, seed=seed)
    return MoCo(encoder, config, seed=seed, ranks=one_rank(), autocast=autocast)


def test_state_dict_has_the_published_names_and_loads_again() -> None:
    model, other = build(), build(seed=1)

    state = model.state_dict()

    heads = {name.partition(".")[0] for name in state}
    assert heads == {"encoder_q", "encoder_k", "queue", "queue_ptr"}
    assert state["queue"].shape == (8, 32)
    assert state["queue_ptr"].shape == (1,)
    assert state["queue_ptr"].dtype == torch.long
    assert not torch.equal(other.queue, model.queue)
    other.load_state_dict(state)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name])
    with pytest.raises(RuntimeError, match="queue"):
        other.load_state_dict({n: t for n, t in state.items() if n != "queue"})


def test_the_key_encoder_starts_as_the_query_encoder_and_takes_no_gradient() -> None:
    model = build()

    for q, k in zip(model.encoder_q.parameters(), model.encoder_k.parameters(), strict=True):
        assert torch.equal(q, k)
        assert q.requires_grad
        assert not k.requires_grad
        assert q.data_ptr() != k.data_ptr()


def test_key_and_query_groups_share_few_samples() -> None:
    """What the shuffle is for: a key's group says little about its query's."""
    shared = []
    for step in range(500):
        order = key_order(seed=0, step=step, global_batch_size=256, shuffle_domain=256)
        shared.append((order.reshape(8, 32) // 32 == torch.arange(8)[:, None].numpy()).mean())

    assert sum(shared) / len(shared) == pytest.approx(1 / 8, abs=0.002)


@pytest.mark.parametrize("domain", [4, 6, 2])
def test_a_domain_that_shuffles_nothing_is_refused(domain: int) -> None:
    config = ModelConfig(backbone="resnet18", bn_sub_batch=4, shuffle_domain=domain)

    with pytest.raises(ConfigError, match=r"model\.shuffle_domain"):
        build(config)


def test_an_unknown_backbone_is_refused_with_the_known_ones() -> None:
    for name in ("resnet9", "timm/resnet9"):
        with pytest.raises(ConfigError, match=rf"model\.backbone '{name}' is not known.*resnet"):
            ModelConfig(backbone=name)


@pytest.mark.parametrize(
    ("name", "value"),
    [("dim", 0), ("queue_size", 0), ("bn_sub_batch", -1), ("momentum", 1.0), ("temperature", 0.0)],
)
def test_settings_out_of_range_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"model\.{name} .*{value}"):
        ModelConfig(**{name: value})


def test_bf16_encoders_give_full_precision_embeddings_and_queue() -> None:
    model = build(autocast=torch.bfloat16)
    views = torch.randn(8, 3, 16, 16)

    output = model.backward(views, views, sample_ids=torch.arange(8).numpy(), step=0)
    model.update(output, is_finite=torch.tensor(True))

    assert output.loss.dtype == output.keys.dtype == torch.float32
    torch.testing.assert_close(output.keys.norm(dim=1), torch.ones(8))
    assert torch.equal(model.queue[:, :8], output.keys.T)


def test_a_run_begins_with_a_published_checkpoint_one_moving_average_ahead() -> None:
    published = {name: tensor.clone() for name, tensor in build(seed=1).state_dict().items()}
    for name, tensor in published.items():
        if name.startswith("encoder_q.") and tensor.is_floating_point():
            tensor += 1
    model = build()

    model.begin_with(published, where="x", is_behind=True)

    state = model.state_dict()
    assert torch.equal(state["encoder_q.conv1.weight"], published["encoder_q.conv1.weight"])
    assert torch.equal(state["queue"], published["queue"])
    torch.testing.assert_close(
        state["encoder_k.conv1.weight"], published["encoder_k.conv1.weight"] + 0.001
    )
    model.begin_with(published, where="x", is_behind=False)
    assert torch.equal(
        model.state_dict()["encoder_k.conv1.weight"], published["encoder_k.conv1.weight"]
    )


def test_weights_of_another_architecture_are_refused_by_name() -> None:
    other = build(dataclasses.replace(SMALL, dim=4)).state_dict()

    with pytest.raises(CheckpointError, match=r"x: encoder_q\.fc\.weight is \(4, 512\)"):
        build().begin_with(other, where="x", is_behind=False)
