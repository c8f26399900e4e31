"""Counts the bytes that every operation moves, in Triton's interpreter, and writes benchmarks/results/traffic.csv.

usage: TRITON_INTERPRET=1 CEM_FAST_BACKEND=triton python tests/kernels/traffic.py
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from support.interpreter import watching
from torch import Tensor

from cem_fast import CEMLoss
from cem_fast.functional import mixture_log_prob

TABLE = Path(__file__).resolve().parents[2] / "benchmarks/results/traffic.csv"

# N, D, C, K
SHAPES = [(1000, 512, 10, 5), (64, 4096, 1, 5), (1024, 128, 16, 3)]

# Of the least bytes that an operation can move: x read once in each direction (twice where a forward with per-dimension
# variances is split by dimensions), dx written once, parameters read or written once in each direction. Every row of a backward
# may read its own mean; all accesses count, also those that a cache serves.
MOST = 1.5


def _mixture(C: int, K: int, D: int, diag: bool) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.rand(C, K) + 0.2
    spread = torch.rand(*((C, K, D) if diag else (C, K))) * 0.2 + 0.02
    return torch.rand(C, K, D), spread, weights / weights.sum(1, keepdim=True)


def cem_step(N: int, D: int, C: int, K: int, diag: bool) -> tuple[Callable[[], None], int]:
    """The step, and its least bytes."""
    means, variances, weights = _mixture(C, K, D, diag)
    loss = CEMLoss(num_classes=C, num_components=K, noise_std=0.05, covariance_type="diag" if diag else "spherical")
    prior = torch.full((C,), 1 / C)
    loss.load_mixture(means=means, variances=variances, weights=weights, class_prior=prior, num_samples=50_000)
    x, labels = torch.rand(N, D, requires_grad=True), torch.randint(0, C, (N,))
    twice = diag and D > 512
    return lambda: loss(x, labels).backward(), 4 * ((4 if twice else 3) * N * D + (4 if diag else 2) * C * K * D)


def log_prob_step(N: int, D: int, C: int, K: int, diag: bool) -> tuple[Callable[[], None], int]:
    """Log-likelihood and its gradient in x, and its least bytes."""
    mixture = _mixture(C, K, D, diag)
    x, labels = torch.rand(N, D, requires_grad=True), torch.randint(0, C, (N,))
    least = 4 * (3 * N * D + (4 if diag else 2) * C * K * D)
    return lambda: mixture_log_prob(x, *mixture, labels).sum().backward(), least


OPERATIONS = {"CEMLoss step": cem_step, "mixture_log_prob step": log_prob_step}


def measure(operation: str, shape: tuple[int, int, int, int], diag: bool) -> dict[str, object]:
    """One row of the table."""
    torch.manual_seed(0)
    step, least = OPERATIONS[operation](*shape, diag)
    with watching() as seen:
        step()
    N, D, _, _ = shape
    x = 4 * N * D
    return {
        "operation": operation,
        **dict(zip("NDCK", shape)),
        "variances": "diag" if diag else "spherical",
        "launches": seen.launches.total(),
        "bytes": seen.bytes,
        "least bytes": least,
        "ratio": round(seen.bytes / least, 3),
        "times x is read": round(seen.loaded["x_ptr"] / x, 3),
        "times dx is written": round(seen.stored["dx_ptr"] / x, 3),
        "everything else, by argument": " ".join(
            f"{name.removesuffix('_ptr')}={size}"
            for name, size in sorted((seen.loaded + seen.stored).items())
            if name not in ("x_ptr", "dx_ptr")
        ),
    }


def main() -> int:
    rows = [measure(name, shape, diag) for name in OPERATIONS for shape in SHAPES for diag in (False, True)]
    with TABLE.open("w", newline="") as file:
        file.write("# TRITON_INTERPRET=1 CEM_FAST_BACKEND=triton python tests/kernels/traffic.py\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        print(*list(row.values())[:-1])
    return int(any(row["ratio"] > MOST for row in rows))


if __name__ == "__main__":
    sys.exit(main())
