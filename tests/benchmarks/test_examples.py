"""Examples in the docstrings of the benchmark suite."""

import doctest

import pytest
from cem_fast.benchmarks import cases, machine, peers, released, report, roofline, table, timing


@pytest.mark.parametrize(
    "module", [cases, machine, peers, released, report, roofline, table, timing], ids=lambda module: module.__name__
)
def test_examples_run(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0
