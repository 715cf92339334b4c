"""The queue of keys."""

import numpy as np
import pytest
import torch

from moco_scale.dictionary import KeyQueue, MemoryBank
from moco_scale.distributed import one_rank
from moco_scale.errors import TrainError

IDS = np.arange(0)


@pytest.mark.parametrize("queue_size", [4, 5, 7, 8, 30])
@pytest.mark.parametrize("keys_per_step", [1, 3, 4])
def test_the_queue_holds_the_newest_keys_at_any_size(queue_size: int, keys_per_step: int) -> None:
    queue = KeyQueue(dim=2, queue_size=queue_size, seed=0)
    seen = []
    for step in range(12):
        numbers = [step * keys_per_step + i for i in range(keys_per_step)]
        seen += numbers
        keys = torch.tensor([[number, -number] for number in numbers], dtype=torch.float32)
        queue.update(keys, keys, IDS, is_finite=torch.tensor(True))

    newest = seen[-queue_size:]
    held = queue.queue[0].tolist()
    assert set(newest) <= set(held)
    assert int(queue.queue_ptr) == len(seen) % queue_size
    assert held[int(queue.queue_ptr) - 1] == seen[-1]


def test_a_step_that_is_not_finite_leaves_the_queue_and_its_pointer() -> None:
    queue = KeyQueue(dim=2, queue_size=5, seed=0)
    before = queue.queue.clone()
    keys = torch.tensor([[float("nan"), 1.0], [0.0, 1.0]])

    queue.update(keys, keys, IDS, is_finite=torch.tensor(False))

    assert torch.equal(queue.queue, before)
    assert int(queue.queue_ptr) == 0


def test_a_sample_without_a_row_in_the_bank_is_named() -> None:
    bank = MemoryBank(dim=2, num_rows=5, num_negatives=3, seed=0, ranks=one_rank())
    q = torch.ones(1, 2)

    with pytest.raises(TrainError, match=r"sample 5 has no row in the memory bank of 5.*grown"):
        bank.loss(q, None, np.array([5]), rows=slice(0, 1), step=0, temperature=0.1)


def test_the_first_content_is_random_unit_vectors_of_the_seed() -> None:
    queue = KeyQueue(dim=3, queue_size=5, seed=4)

    torch.testing.assert_close(queue.queue.norm(dim=0), torch.ones(5))
    assert torch.equal(queue.queue, KeyQueue(dim=3, queue_size=5, seed=4).queue)
    assert not torch.equal(queue.queue, KeyQueue(dim=3, queue_size=5, seed=5).queue)
    assert queue.queue.dtype == torch.float32
