"""What all tests of this package share."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    # The models are tiny: threads would only wait for each other, and for other programs.
    torch.set_num_threads(1)
