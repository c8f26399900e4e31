"""Chains of fused multiply-adds in registers: what a GPU's arithmetic reaches when nothing waits for memory."""

from __future__ import annotations

import triton
import triton.language as tl

CHAINS = 8
BLOCK = 256


@triton.jit
def fma_kernel(out, iterations, BLOCK: tl.constexpr):
    x0 = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
    x1, x2, x3, x4, x5, x6, x7 = x0 + 1, x0 + 2, x0 + 3, x0 + 4, x0 + 5, x0 + 6, x0 + 7
    factor = 0.5 + x0 / 4
    for _ in range(iterations):
        x0 = tl.fma(x0, factor, 1.0)
        x1 = tl.fma(x1, factor, 1.0)
        x2 = tl.fma(x2, factor, 1.0)
        x3 = tl.fma(x3, factor, 1.0)
        x4 = tl.fma(x4, factor, 1.0)
        x5 = tl.fma(x5, factor, 1.0)
        x6 = tl.fma(x6, factor, 1.0)
        x7 = tl.fma(x7, factor, 1.0)
    total = (x0 + x1) + (x2 + x3) + ((x4 + x5) + (x6 + x7))
    tl.store(out + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), total)


def flops(programs: int, iterations: int) -> int:
    return 2 * CHAINS * BLOCK * programs * iterations
