"""Every test runs with NaN in place of uninitialized memory, so that reading it cannot go unnoticed."""

import os

# before torch: idle threads sleep instead of spinning, which took most of the time on a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

pytest_plugins = ["support.fixtures"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
