"""Ceilings of the machine and the share of them that a row reaches."""

import numpy as np
import pytest
import torch
from cem_fast.benchmarks import machine, roofline
from cem_fast.benchmarks.cases import Case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(roofline, "COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(roofline, "PRODUCT", {"cpu": 64})
    with machine.pinned(1):
        yield


def test_copy_gemm_and_fma_are_measured():
    copy, gemm, fma = roofline.ceilings(CPU, budget_s=0)
    assert (copy.name, gemm.name, fma.name) == ("copy", "GEMM", "FMA")
    assert (copy.unit, gemm.unit, fma.unit) == ("GB/s", "GFLOP/s", "GFLOP/s")
    assert copy.rate == pytest.approx(2 * (1 << 20) / copy.times.p20 / 1e6)
    assert gemm.rate == pytest.approx(2 * 64**3 / gemm.times.p20 / 1e6)
    assert fma.rate > 1


def test_fma_chains_are_computed():
    x = np.repeat(np.arange(roofline.FMA_CHAINS, dtype=np.float64)[:, None], roofline.FMA_LANES, 1)
    for _ in range(5):
        x = x * (0.5 + 0.01 * np.arange(roofline.FMA_LANES)) + 1
    assert roofline._compiled()(5) == pytest.approx(x.sum(), rel=1e-5)


def test_a_ceiling_without_a_rate_has_a_reason(monkeypatch):
    monkeypatch.setenv("CXX", "/no/such/compiler")
    *_, fma = roofline.ceilings(CPU, budget_s=0)
    assert fma.rate is None
    assert "/no/such/compiler" in fma.reason


def test_share_uses_the_tighter_limit():
    assert roofline.share(1e9, 1e9, took_ms=200, gb_s=10, gflop_s=100) == (pytest.approx(0.5), "memory")
    assert roofline.share(1e9, 1e6, took_ms=20, gb_s=10, gflop_s=100) == (pytest.approx(0.5), "arithmetic")
    assert roofline.share(1e12, 1e9, took_ms=200, gb_s=10, gflop_s=None) == (pytest.approx(0.5), "memory")


def test_work_of_a_case():
    case = Case("operations", "mixture_log_prob", 100, 8, 10, 5, "diag")
    assert case.work("forward") == (4 * 100 * 8 * 5, 4 * 100 * 8 + 2 * 4 * 10 * 5 * 8)
    assert case.work("both") == (8 * 100 * 8 * 5, 3 * 4 * 100 * 8 + 2 * 4 * 10 * 5 * 8)
    few = Case("operations", "cem_paper", 2, 8, 10, 5)  # only the means of its classes are read
    assert few.work("forward") == (3 * 2 * 8 * 5, 4 * 2 * 8 + 4 * 2 * 5 * 8)
    half = Case("operations", "cem_paper", 100, 8, 10, 5, dtype="bfloat16")
    assert half.work("backward")[1] == 2 * 2 * 100 * 8 + 4 * 10 * 5 * 8
