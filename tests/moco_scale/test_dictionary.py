"""The queue of keys."""

import numpy as np
import pytest
import torch

from moco_scale.dictionary import KeyQueue

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
        queue.update(keys, keys, IDS)

    newest = seen[-queue_size:]
    held = queue.queue[0].tolist()
    assert set(newest) <= set(held)
    assert int(queue.queue_ptr) == len(seen) % queue_size
    assert held[int(queue.queue_ptr) - 1] == seen[-1]


def test_logits_are_cosines_with_the_positive_first() -> None:
    queue = KeyQueue(dim=3, queue_size=5, seed=0)
    q = torch.nn.functional.normalize(torch.randn(2, 3), dim=1)
    k = torch.nn.functional.normalize(torch.randn(2, 3), dim=1)

    logits, labels = queue.logits(q, k, IDS)

    assert logits.shape == (2, 6)
    assert labels.tolist() == [0, 0]
    for row in range(2):
        assert logits[row, 0] == pytest.approx(float(q[row] @ k[row]), abs=1e-6)
        assert logits[row, 4] == pytest.approx(float(q[row] @ queue.queue[:, 3]), abs=1e-6)


def test_the_first_content_is_random_unit_vectors_of_the_seed() -> None:
    queue = KeyQueue(dim=3, queue_size=5, seed=4)

    torch.testing.assert_close(queue.queue.norm(dim=0), torch.ones(5))
    assert torch.equal(queue.queue, KeyQueue(dim=3, queue_size=5, seed=4).queue)
    assert not torch.equal(queue.queue, KeyQueue(dim=3, queue_size=5, seed=5).queue)
    assert queue.queue.dtype == torch.float32
