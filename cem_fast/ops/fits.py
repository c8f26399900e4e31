"""Operators that only fits use: seeding, and covariance matrices in double precision. Plain torch, and C++ on the CPU.

The C++ kernels give the same bits for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from cem_fast.ops.library import LIBRARY, register
from cem_fast.ops.reference import BLOCK_ELEMENTS

SCHEMAS = {
    "candidate_distances": "(Tensor x, Tensor candidates, Tensor? labels, Tensor nearest, Tensor mass)"
    " -> (Tensor distances, Tensor potentials)",
    "kmeans_plus_plus": "(Tensor x, Tensor mass, Tensor uniform, int num_components) -> Tensor",
    "inverse_roots": "(Tensor matrices) -> (Tensor roots, Tensor half_logdets)",
    "matrix_log_joint": "(Tensor x, Tensor means, Tensor roots, Tensor constants, Tensor? labels) -> Tensor",
    "matrix_moments": "(Tensor x, Tensor means, Tensor responsibilities, Tensor? labels, bool tied)"
    " -> (Tensor s0, Tensor s1, Tensor s2)",
}


def by_class(labels: Tensor | None, num_classes: int) -> Iterator[tuple[int, Tensor | slice]]:
    """Each class that has rows, and the indices of its rows; labels outside the range belong to no class."""
    if labels is None:
        yield 0, slice(None)
        return
    inside = labels.clamp(-1, num_classes) + 1
    order, sizes = inside.argsort(stable=True), torch.bincount(inside, minlength=num_classes + 2).tolist()
    for c, rows in enumerate(torch.split(order, sizes)):
        if len(rows) and 0 < c <= num_classes:
            yield c - 1, rows


def candidate_distances(
    x: Tensor, candidates: Tensor, labels: Tensor | None, nearest: Tensor, mass: Tensor
) -> tuple[Tensor, Tensor]:
    """``min(nearest_n, |x_n - candidate|^2)`` ``[T, N]`` for T candidates of each class ``[C, T, D]``, and the sums over the
    rows of each class ``[T, C]``, weighted by their masses ``[N]``, float64."""
    C, T, D = candidates.shape
    labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if labels is None else labels
    distances = candidates.new_empty(T, len(x))
    size = max(1, BLOCK_ELEMENTS // max(1, D))
    for begin in range(0, len(x), size):
        rows = slice(begin, begin + size)
        for t in range(T):
            square = (x[rows].to(candidates.dtype) - candidates[labels[rows], t]).square().sum(1)
            distances[t, rows] = torch.minimum(square, nearest[rows])
    potentials = mass.new_zeros(T, C).index_add_(1, labels, distances.double() * mass)
    return distances, potentials


def draw_rows(mass: Tensor, otherwise: Tensor, uniform: Tensor) -> Tensor:
    """Indices of rows, one for each uniform number, drawn with probability proportional to their mass ``[N]``, float64.

    Where no mass is left, ``otherwise`` is that mass.
    """
    cumulative = mass.cumsum(0)
    if not float(cumulative[-1]) > 0:
        cumulative = otherwise.cumsum(0)
    return torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp_(max=len(mass) - 1)


def kmeans_plus_plus(x: Tensor, mass: Tensor, uniform: Tensor, num_components: int) -> Tensor:
    """Initial means ``[1, K, D]`` of one class by greedy k-means++ with T candidates, from random numbers ``[1 + (K - 1) T]``.

    Rows ``[N, D]``, at least one, are drawn with probability proportional to their masses ``[N]``, float64, times their squared
    distances to the nearest mean so far.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    nearest = x.new_full((len(x),), math.inf, dtype=dtype)
    means: list[Tensor] = []
    for u in uniform[:1], *uniform[1:].view(num_components - 1, -1 if num_components > 1 else 0):
        candidates = x[draw_rows(nearest.double() * mass if means else mass, mass, u)].to(dtype)
        distances, potentials = candidate_distances(x, candidates.unsqueeze(0), None, nearest, mass)
        best = potentials.flatten().argmin()  # the first of several
        nearest = distances[best]
        means.append(candidates[best])
    return torch.stack(means).unsqueeze(0)


def inverse_roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``W = L^-1`` of each matrix ``A = L L^T`` ``[M, D, D]``, and ``1/2 log det A`` ``[M]``.

    The latter is NaN for a matrix that is not positive definite.
    """
    roots, failed = torch.linalg.cholesky_ex(matrices)
    half_logdets = roots.diagonal(dim1=-2, dim2=-1).log().sum(-1).masked_fill(failed != 0, math.nan)
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    inverse = torch.linalg.solve_triangular(roots, identity.expand_as(roots), upper=False)
    return inverse.contiguous(), half_logdets


def matrix_log_joint(x: Tensor, means: Tensor, roots: Tensor, constants: Tensor, labels: Tensor | None) -> Tensor:
    """``constants_ck - 1/2 |W_ck (x_n - mu_ck)|^2`` ``[N, K]``; roots ``[C, K, D, D]``, or ``[C, D, D]`` if tied."""
    joint = x.new_full((x.shape[0], means.shape[1]), math.nan)
    for c, rows in by_class(labels, len(means)):
        for k, mean in enumerate(means[c]):
            root = roots[c] if roots.dim() == 3 else roots[c, k]
            joint[rows, k] = constants[c, k] - 0.5 * ((x[rows] - mean) @ root.T).square().sum(-1)
    return joint


def matrix_moments(
    x: Tensor, means: Tensor, responsibilities: Tensor, labels: Tensor | None, tied: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``sum r``, ``sum r (x - mu)`` and ``sum r (x - mu)(x - mu)^T`` with ``r [N, K]``; if tied, the last also sums over k."""
    C, K, D = means.shape
    s0, s1, s2 = x.new_zeros(C, K), x.new_zeros(C, K, D), x.new_zeros((C, D, D) if tied else (C, K, D, D))
    for c, rows in by_class(labels, C):
        s0[c] = responsibilities[rows].sum(0)
        for k, mean in enumerate(means[c]):
            deviations = x[rows] - mean
            shared = deviations * responsibilities[rows, k].unsqueeze(-1)
            s1[c, k] = shared.sum(0)
            total = s2[c] if tied else s2[c, k]
            total += shared.T @ deviations
    if labels is None:
        return s0, s1, s2
    poison = torch.where(((labels >= 0) & (labels < C)).all(), 0.0, math.nan).to(x.dtype)
    return s0 + poison, s1 + poison, s2 + poison


def _fake_candidate_distances(x: Tensor, candidates: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    C, T, _D = candidates.shape
    return candidates.new_empty(T, x.shape[0]), candidates.new_empty(T, C, dtype=torch.float64)


def _fake_kmeans_plus_plus(x: Tensor, mass: Tensor, uniform: Tensor, num_components: int) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(1, num_components, x.shape[1], dtype=dtype)


def _fake_inverse_roots(matrices: Tensor) -> tuple[Tensor, Tensor]:
    return matrices.new_empty(matrices.shape), matrices.new_empty(matrices.shape[0])


def _fake_log_joint(x: Tensor, means: Tensor, roots: Tensor, constants: Tensor, labels: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], means.shape[1])


def _fake_moments(
    x: Tensor, means: Tensor, responsibilities: Tensor, labels: Tensor | None, tied: bool
) -> tuple[Tensor, ...]:
    C, K, D = means.shape
    return x.new_empty(C, K), x.new_empty(C, K, D), x.new_empty((C, D, D) if tied else (C, K, D, D))


_KERNELS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "candidate_distances": (candidate_distances, _fake_candidate_distances),
    "kmeans_plus_plus": (kmeans_plus_plus, _fake_kmeans_plus_plus),
    "inverse_roots": (inverse_roots, _fake_inverse_roots),
    "matrix_log_joint": (matrix_log_joint, _fake_log_joint),
    "matrix_moments": (matrix_moments, _fake_moments),
}
for _name, (_reference, _fake) in _KERNELS.items():
    LIBRARY.define(_name + SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"cem_fast::{_name}", _fake, lib=LIBRARY)
    register(_name, _reference, "CompositeExplicitAutograd")

OPERATORS = {name: getattr(torch.ops.cem_fast, name).default for name in SCHEMAS}
