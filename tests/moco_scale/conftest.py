"""What all tests of this package share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # The models are tiny: threads would only wait for each other, and for other programs. Before
    # each test, for a command that was run in this process leaves as many as there are cores; and
    # another number gives other bits.
    torch.set_num_threads(1)
