import pytest
import torch

from pipelines import DataConfig, StateError, SyntheticLoader


def loader(*, rank: int = 0, world_size: int = 1, seed: int = 1) -> SyntheticLoader:
    return SyntheticLoader(
        DataConfig(global_batch_size=8, view_size=16),
        seed=seed,
        rank=rank,
        world_size=world_size,
        device_index=None,
    )


def test_views_have_the_shapes_of_real_ones_and_differ() -> None:
    batch = next(loader())

    assert batch.view_q.shape == batch.view_k.shape == (8, 3, 16, 16)
    assert batch.view_q.dtype == torch.float32
    assert batch.view_q.is_contiguous(memory_format=torch.channels_last)
    assert not torch.equal(batch.view_q, batch.view_k)
    assert not torch.equal(batch.view_q[0], batch.view_q[1])


def test_ranks_share_a_batch_and_a_resumed_loader_continues() -> None:
    whole = loader()
    next(whole)
    saved = whole.state_dict()
    second = next(whole)

    parts = [loader(rank=rank, world_size=2) for rank in (0, 1)]
    for part in parts:
        part.load_state_dict(saved)

    assert torch.equal(torch.cat([next(part).view_q for part in parts]), second.view_q)


def test_a_state_of_another_seed_is_refused() -> None:
    with pytest.raises(StateError, match="seed 1, this run has 2"):
        loader(seed=2).load_state_dict(loader().state_dict())
