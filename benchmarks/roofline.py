"""Ceilings of the machine, measured in the same run: memory copy, matrix product and fused multiply-adds."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from cem_fast.benchmarks.timing import Contender, Quantiles, clock_of, race

COPIED_BYTES = 256 << 20
PRODUCT = {"cpu": 2_048, "cuda": 8_192}  # side of the matrices
FMA_FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
FMA_CHAINS, FMA_LANES = 12, 16
FMA_SOURCE = f"""
typedef float lanes __attribute__((vector_size({4 * FMA_LANES})));
float fma_chains(long iterations) {{
  lanes x[{FMA_CHAINS}], factor = {{0}}, one = {{0}};
  for (int i = 0; i < {FMA_LANES}; ++i) factor[i] = 0.5f + 0.01f * i, one[i] = 1.0f;
  for (int k = 0; k < {FMA_CHAINS}; ++k) x[k] = one * (float)k;
  for (long n = 0; n < iterations; ++n)
#pragma GCC unroll {FMA_CHAINS}
    for (int k = 0; k < {FMA_CHAINS}; ++k) x[k] = x[k] * factor + one;
  float total = 0;
  for (int k = 0; k < {FMA_CHAINS}; ++k)
    for (int i = 0; i < {FMA_LANES}; ++i) total += x[k][i];
  return total;
}}
"""


class Ceiling(NamedTuple):
    """A measured rate.

    Args:
        name: ``copy``, ``GEMM`` or ``FMA``.
        unit: GB/s (reads plus writes) or GFLOP/s.
        rate: the rate in that unit; None if it could not be measured.
        times: times of a call.
        reason: why there is no rate.
    """

    name: str
    unit: str
    rate: float | None
    times: Quantiles | None
    reason: str = ""


def ceilings(device: torch.device, *, budget_s: float) -> list[Ceiling]:
    """Measures copy, GEMM and FMA on a device, each for about ``budget_s`` seconds.

    Returns:
        The three ceilings; those that could not be measured carry the reason.
    """
    found = []
    for name, unit, prepare in (("copy", "GB/s", _copy), ("GEMM", "GFLOP/s", _gemm), ("FMA", "GFLOP/s", _fma)):
        try:
            work, call = prepare(device)
            call()
        except Exception as error:  # compilers and drivers raise many kinds
            found.append(Ceiling(name, unit, None, None, f"{type(error).__name__}: {error}"))
            continue
        times = race([Contender(name, partial(_run, call))], clock_of(device), budget_s=budget_s)[name]
        found.append(Ceiling(name, unit, work / times.p20 / 1e6, times))
    return found


def _run(call: Callable[[], object], _: int) -> object:
    return call()


def share(flops: float, moved: float, took_ms: float, gb_s: float, gflop_s: float | None) -> tuple[float, str]:
    """Share of the roofline that a call reaches, and the limiting resource: ``memory`` or ``arithmetic``.

    Args:
        flops: floating-point operations of the call.
        moved: bytes that the call must read or write.
        took_ms: measured time.
        gb_s: rate of a copy, reads plus writes.
        gflop_s: rate of fused multiply-adds; None if unknown.

    Returns:
        ``max(moved / rate, flops / rate) / took``; above 1 if data came from a cache.

    Example:
        >>> from cem_fast.benchmarks import roofline
        >>> roofline.share(flops=1e9, moved=1e9, took_ms=200, gb_s=10, gflop_s=100)
        (0.5, 'memory')
    """
    floors = {"memory": moved / gb_s / 1e6, "arithmetic": flops / gflop_s / 1e6 if gflop_s else 0.0}
    bound = max(floors, key=floors.__getitem__)
    return floors[bound] / took_ms, bound


def _copy(device: torch.device) -> tuple[float, Callable[[], object]]:
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return 2 * COPIED_BYTES, lambda: target.copy_(source)


def _gemm(device: torch.device) -> tuple[float, Callable[[], object]]:
    side = PRODUCT[device.type]
    a, b = (torch.rand(side, side, device=device) for _ in range(2))
    return 2 * side**3, lambda: a @ b


def _fma(device: torch.device) -> tuple[float, Callable[[], object]]:
    if device.type == "cuda":
        return _fma_on_cuda(device)
    chains = _compiled()
    threads, iterations = torch.get_num_threads(), 1_000_000
    pool = ThreadPoolExecutor(threads)
    call = lambda: list(pool.map(chains, [iterations] * threads))  # noqa: E731
    return 2 * FMA_CHAINS * FMA_LANES * iterations * threads, call


def _compiled() -> Callable[[int], float]:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("cc")
    if compiler is None:
        raise OSError("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "fma.c"), Path(folder, "fma.so")
        source.write_text(FMA_SOURCE)
        command = [compiler, *FMA_FLAGS, "-x", "c", str(source), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True)
        function = ctypes.CDLL(str(library)).fma_chains
    function.argtypes, function.restype = [ctypes.c_long], ctypes.c_float
    return function


def _fma_on_cuda(device: torch.device) -> tuple[float, Callable[[], object]]:
    from cem_fast.benchmarks.fma_triton import BLOCK, flops, fma_kernel

    programs, iterations = 32 * torch.cuda.get_device_properties(device).multi_processor_count, 4_096
    out = torch.empty(programs * BLOCK, device=device)
    return flops(programs, iterations), lambda: fma_kernel[(programs,)](out, iterations, BLOCK)
