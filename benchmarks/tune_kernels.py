"""Times tile sizes of the Triton kernels on this machine's GPU and prints the rows to put into kernels/_configs.py.

A row changes what can be launched: `python tests/aot/collect.py` must then still find no fault.

usage: python benchmarks/tune_kernels.py [--family gradient ...] [--rows 8192] [--dimension 2048] [--classes 100] [--components 10]
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable

import torch
import triton
from cem_fast.kernels import _configs, _launch
from cem_fast.kernels._configs import Config
from cem_fast.kernels.operators import OPERATORS

# Rows and dimensions of a tile, and components where a kernel can choose
CANDIDATES: dict[str, list[tuple[int, ...]]] = {
    "distance": [(32, 32), (64, 32), (32, 64), (64, 64)],
    "resident_narrow": [(32, 128), (64, 128)],
    "resident_wide": [(16, 512), (32, 512)],
    "gradient": [(64, 32), (128, 32), (64, 64), (32, 128)],
    "moments": [(32, 32), (64, 32), (32, 64), (64, 64)],
    "reduce": [(1, 512), (1, 1024), (1, 2048)],
    "entropy": [(1, 512), (1, 1024), (1, 2048)],
    "sort": [(128, 32), (256, 32), (128, 64)],
    "count": [(64, 32), (128, 32), (128, 64)],
    "product": [(64, 16, 32), (64, 32, 32), (64, 16, 64), (128, 16, 32)],
    "product_gradient": [(64, 32, 16), (64, 64, 16), (128, 32, 16)],
    "product_moments": [(16, 32, 64), (32, 32, 64), (16, 64, 64)],
}
WARPS = (4, 8)


def workload(family: str, N: int, D: int, C: int, K: int) -> Callable[[], object]:
    """One call that spends its time in the kernels of the family."""
    if family == "resident_narrow":
        D = min(D, 128)
    if family == "resident_wide":
        D = 512
    if family == "sort":
        N = _configs.PAIRWISE_SORT_ROWS
    if family == "count":
        N, D = 8 * _configs.PAIRWISE_SORT_ROWS, 32
    if family.startswith("product"):
        C, K = 1, max(K * C, _configs.PRODUCT_COMPONENTS)
    on = {"device": "cuda"}
    x, labels = torch.rand(N, D, **on), torch.randint(0, C, (N,), **on)
    means, variances = torch.rand(C, K, D, **on), torch.rand(C, K, D, **on) + 0.1
    weights, prior = torch.full((C, K), 1 / K, **on), torch.full((C,), 1 / C, **on)
    row_weights, r = torch.rand(N, **on), torch.softmax(torch.rand(N, K, **on), 1)
    assignment = torch.randint(0, K, (N,), **on)
    scalars = torch.tensor(50_000.0, dtype=torch.float64, **on), torch.tensor([0.01], dtype=torch.float64, **on)
    mixture = (means, variances, weights, labels)
    if family == "distance":
        return lambda: OPERATORS["mixture_log_prob_fwd"](x, *mixture, False)
    if family == "gradient":
        return lambda: OPERATORS["component_statistics_bwd"](variances, None, x, means, labels, assignment)
    if family.startswith("product"):
        one = (means, variances, weights, None)
        log_prob, nothing = OPERATORS["mixture_log_prob_fwd"](x, *one, False)
        if family == "product":
            return lambda: OPERATORS["mixture_log_prob_fwd"](x, *one, False)
        name = "mixture_log_prob_bwd" if family == "product_gradient" else "mixture_moments"
        return lambda: OPERATORS[name](row_weights, x, *one, log_prob, nothing)
    if family in ("moments", "reduce"):
        return lambda: OPERATORS["mixture_moments"](row_weights, x, *mixture, row_weights, r)
    options = (False, 1.0, True, True, 0.125, 0.01)
    return lambda: OPERATORS["cem_fwd"](x, means, labels, variances, weights, prior, *scalars, *options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="*", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--components", type=int, default=10)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("tune_kernels.py times kernels on a GPU, and torch sees none")
    torch.manual_seed(0)
    architecture = _launch._architecture(torch.cuda.current_device())
    for family in args.family:
        call = workload(family, args.rows, args.dimension, args.classes, args.components)
        size = next(iter(_configs.TABLE[family]["*"]))
        times: dict[Config, float] = {}
        for (rows, width, *components), warps in itertools.product(CANDIDATES[family], WARPS):
            config = Config(rows, width, warps, 1, *components)
            _configs.TABLE[family][architecture] = {size: config}
            times[config] = triton.testing.do_bench(call, quantiles=[0.5])
            print(f"  {family} {config}: {times[config]:.4f} ms")
        best = min(times, key=times.__getitem__)
        _configs.TABLE[family][architecture] = {size: best}
        print(f'"{family}": {{"{architecture}": {{{size}: {best}}}}}')


if __name__ == "__main__":
    main()
