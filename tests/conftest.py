"""Settings that all tests share."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    """Two test workers share two cores; a seed makes every failure repeatable."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
