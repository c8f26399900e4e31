"""Triton decides at import whether kernels are interpreted, so the tests in interpreted/ run in a process of their own."""

import os
import random

collect_ignore = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["interpreted"]


def pytest_addoption(parser):
    parser.addoption("--long-share", type=float, default=1.0, help="part of the long tests to run, chosen at random")


def pytest_collection_modifyitems(config, items):
    share = config.getoption("long_share", 1.0)
    left_out = [item for item in items if item.get_closest_marker("long") and random.random() >= share]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
