"""Settings that all tests share."""

import signal

import pytest
import torch

# Started in the background of a script, this process ignores Ctrl-C and hands that on to the
# programs that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread_and_a_fixed_seed():
    """Two test workers share two cores; a seed makes every failure repeatable."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
