"""Every test runs with NaN in place of uninitialized memory, so that reading it cannot go unnoticed."""

import os
import random

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


def pytest_addoption(parser):
    parser.addoption(
        "--share", type=float, default=1.0, help="random share of the long tests to run; fuzzing reads SHARE"
    )


def pytest_collection_modifyitems(config, items):
    share = config.getoption("--share")
    left_out = [
        item
        for item in items
        if item.get_closest_marker("long") and "fuzz" not in item.nodeid and random.random() >= share
    ]
    if share < 1:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
