"""Cases of the quick suite for pytest-benchmark: ``pytest benchmarks/``.

A missing package or a case out of reach skips the test with the reason; wrong results fail it before any timing.
"""

from __future__ import annotations

import pytest
import torch
from cem_fast.benchmarks import cases, peers
from cem_fast.benchmarks.cases import Case, Problem
from cem_fast.benchmarks.peers import Peer, Skipped
from cem_fast.benchmarks.timing import SETS

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of third-party packages
CPU = torch.device("cpu")
RACES = [case for group in ("operations", "fitting") for case in cases.GROUPS[group](True) if not case.axis]


def entries() -> list[tuple[Case, Peer]]:
    return [(case, peer) for case in RACES for peer in peers.of(case, CPU)]


def name(entry: tuple[Case, Peer]) -> str:
    case, peer = entry
    return f"{case.op}-{case.N}x{case.D}-{peer.name}".replace(" ", "_")


@pytest.mark.parametrize("entry", entries(), ids=name)
def test_speed(benchmark, entry):
    case, peer = entry
    problem = Problem(case, CPU)
    benchmark.group = f"{case.op} N={case.N} D={case.D} C={case.C} K={case.K}"
    try:
        built = peer.build(problem)
    except (ImportError, Skipped) as reason:
        pytest.skip(str(reason))
    direction = built.directions[-1]
    before, call = built.prepare(direction), built.call(direction)
    before(0)
    call(0)
    error = problem.error(built.results())
    benchmark.extra_info["error"] = error
    assert error <= case.allowed
    turn = iter(range(10**9))

    def setup():
        buffers = next(turn) % SETS
        before(buffers)
        return (buffers,), {}

    benchmark.pedantic(call, setup=setup, rounds=5, warmup_rounds=1)
