"""Settings shared by all tests."""

import os

# Before PyTorch starts its pools: results do not depend on the machine, and parallel test processes do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state and with one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
