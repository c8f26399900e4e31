"""Benchmark cases: an operation on a shape, its inputs, and the float64 results that every contender must match."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from cem_fast.benchmarks.timing import SETS
from torch import Tensor

from cem_fast.ops import reference
from cem_fast.ops.entropy_bound import BoundOptions, bound_options
from cem_fast.ops.fits import by_class

NOISE_STD = 0.05
NUM_SAMPLES = 50_000
ITERATIONS = 5
REG_COVAR = 1e-6
DIRECTIONS = ("forward", "backward", "both")
OPERATIONS = ("cem_paper", "cem_official", "mixture_log_prob", "component_statistics")
FITS = ("kmeans", "seeding", "em")
# Largest relative error of a correct result, in the Euclidean norm, by dtype of the features.
ALLOWED = {"float64": 1e-9, "float32": 1e-3, "float16": 1e-2, "bfloat16": 3e-2}
# The same for the parameters of a fit, relative to their distance from the start; one iteration less exceeds it.
ALLOWED_IN_FIT = 5e-3
# Largest relative difference of the inertias of two random seedings.
ALLOWED_IN_SEEDING = 0.2


@dataclass(frozen=True)
class Case:
    """One comparison: rows ``[N, D]`` of C classes and a mixture of K components per class.

    Args:
        group: ``operations``, ``scaling`` or ``fitting``; scaling cases have an ``axis`` and compare vectorized peers only.
        op: one of ``OPERATIONS``, timed forward, backward and both, or one of ``FITS``: ``kmeans`` and ``em`` for ``ITERATIONS``
            iterations from a given start, ``seeding`` by greedy k-means++ with one iteration of k-means.
        N: number of rows.
        D: number of features.
        C: number of classes.
        K: components per class.
        covariance: ``spherical``, ``diag`` or, with EM, ``tied`` or ``full``.
        dtype: dtype of the features.
        axis: the size that a scaling curve varies: N, D, C or K.
        peers: names of the peers that take part; all of them if empty.

    Example:
        >>> from cem_fast.benchmarks.cases import Case
        >>> case = Case("operations", "component_statistics", N=100, D=8, C=10, K=5)
        >>> case.directions
        ('forward', 'backward', 'both')
        >>> case.work("forward")  # floating-point operations, bytes
        (12000, 4800)
    """

    group: str
    op: str
    N: int
    D: int
    C: int
    K: int
    covariance: str = "spherical"
    dtype: str = "float32"
    axis: str = ""
    peers: tuple[str, ...] = ()

    @property
    def directions(self) -> tuple[str, ...]:
        """Directions in which the case is timed."""
        return ("fit",) if self.op in FITS else DIRECTIONS

    @property
    def diag(self) -> bool:
        """Whether variances are per feature."""
        return self.covariance == "diag"

    @property
    def allowed(self) -> float:
        """Largest relative error of a correct result."""
        if self.op == "seeding":
            return ALLOWED_IN_SEEDING
        return ALLOWED_IN_FIT if self.op in FITS else ALLOWED[self.dtype]

    @property
    def candidates(self) -> int:
        """Rows among which greedy k-means++ chooses the next center, as in scikit-learn."""
        return 2 + int(math.log(self.K))

    def work(self, direction: str) -> tuple[float, float]:
        """Floating-point operations, and bytes that must be read or written at least once, of one call."""
        rows, item = self.N * self.D, getattr(torch, self.dtype).itemsize
        pairs = rows * self.K
        if self.op in FITS:
            matrices = {"full": 2 * pairs * self.D, "tied": 2 * rows * self.D + 4 * pairs}
            of_iteration = {"kmeans": 2 * pairs, "em": matrices.get(self.covariance, 8 * pairs)}
            if self.op == "seeding":
                return 3 * pairs * self.candidates + of_iteration["kmeans"], rows * item
            return of_iteration[self.op] * ITERATIONS, rows * item
        parameters = 4 * min(self.C, self.N) * self.K * self.D
        if self.op == "mixture_log_prob":
            each = (4 if self.diag else 3) * pairs
            flops = {"forward": each, "backward": each, "both": 2 * each}
            parameters *= 1 + self.diag
        else:
            forward = 3 * pairs + 3 * rows * self.diag
            flops = {"forward": forward, "backward": 2 * rows, "both": forward + 2 * rows}
        moved = {
            "forward": rows * item + parameters,
            "backward": 2 * rows * item + parameters,
            "both": 3 * rows * item + parameters,
        }
        return flops[direction], moved[direction]


class Problem:
    """The inputs of a case on a device: ``sets`` of rows and labels (None for one class), and the mixture.

    Rows are drawn close to the means, so rounding changes no assignment. For fits the clusters overlap and the start
    consists of rows, so every iteration changes the parameters.
    """

    def __init__(self, case: Case, device: torch.device):
        self.case, self.device = case, device
        random = torch.Generator().manual_seed(0)
        dtype = getattr(torch, case.dtype)
        self.dtype = torch.promote_types(dtype, torch.float32)
        N, D, C, K = case.N, case.D, case.C, case.K

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=random)

        means, weights = uniform(C, K, D), uniform(C, K) + 0.2
        variances = 0.02 + 0.2 * uniform(*((C, K, D) if case.diag else (C, K)))
        self.means, self.variances = (t.to(device, self.dtype) for t in (means, variances))
        self.weights = (weights / weights.sum(1, keepdim=True)).to(device, self.dtype)
        self.class_prior = torch.full((C,), 1 / C, device=device, dtype=self.dtype)
        self.num_samples = torch.tensor(float(max(NUM_SAMPLES, 2 * N)), dtype=torch.float64, device=device)
        self.noise_variance = torch.tensor([NOISE_STD**2], dtype=torch.float64, device=device)
        self.sets: list[tuple[Tensor, Tensor | None]] = []
        for _ in range(1 if case.op in FITS else SETS):
            labels = torch.randint(C, (N,), generator=random)
            member = torch.randint(K, (N,), generator=random)
            spread = 0.5 if case.op in FITS else 0.2
            rows = torch.randn(N, D, generator=random).mul_(spread).add_(means[labels, member])
            self.sets.append((rows.to(device, dtype), labels.to(device) if C > 1 else None))
        # views of the same memory with gradients; contenders use them one at a time
        self.leaves = [x.detach().requires_grad_() for x, _ in self.sets]
        shape = {"mixture_log_prob": (N,), "component_statistics": (C, K)}.get(case.op, ())
        self.upstream = (0.5 + uniform(*shape)).to(device, self.dtype) if shape else torch.ones((), device=device)
        if case.op in FITS:
            first = torch.bincount(labels, minlength=C).cumsum(0).roll(1)
            first[0] = 0
            self.start = self.sets[0][0][labels.argsort()[first.unsqueeze(1) + torch.arange(K)].to(device)]

    @property
    def bound_options(self) -> BoundOptions:
        """Options of the entropy-bound operator."""
        variant = self.case.op.removeprefix("cem_")
        return bound_options(variant, "unbiased", "mean", None, 0.125, 0.01, self.case.diag, False)

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Float64 results of the reference for buffers 0."""
        (x, labels), case = self.sets[0], self.case
        x, means, variances, weights, prior, g = (
            t.double() for t in (x, self.means, self.variances, self.weights, self.class_prior, self.upstream)
        )
        mixture = (x, means, variances, weights, labels)
        if case.op in FITS:
            return _fitted(self, x, labels)
        if case.op == "mixture_log_prob":
            kept = reference.mixture_log_prob_fwd(*mixture, True)
            return {"value": kept[0], "gradient": reference.mixture_log_prob_bwd(g, *mixture, *kept)}
        if case.op == "component_statistics":
            found = reference.component_statistics_fwd(x, means, labels, None, None, False, False)
            gradient = reference.component_statistics_bwd(g, None, x, means, labels, found[3])
            return {"counts": found[0], "value": found[1], "gradient": gradient}
        priors = (variances, weights, prior, self.num_samples, self.noise_variance)
        value, slope, assignment = reference.cem_fwd(x, means, labels, *priors, *self.bound_options)
        gradient = reference.component_statistics_bwd(slope, None, x, means, labels, assignment)
        return {"value": value, "gradient": gradient}

    def error(self, results: dict[str, Tensor]) -> float:
        """Largest relative error of the results for buffers 0, in the Euclidean norm; infinity for a non-finite one.

        Args:
            results: a non-empty subset of the entries of ``truth``.
        """
        errors = [float("inf")] if not results else []
        start = _start(self) if self.case.op in FITS else {}
        for name, result in results.items():
            truth = self.truth[name]
            if result.shape != truth.shape:
                return float("inf")
            scale = (truth - start[name].double() if name in start else truth).norm().clamp_min(1e-30)
            error = (result.detach().to(truth.device).double() - truth).norm() / scale
            errors.append(float(error) if torch.isfinite(error) else float("inf"))
        return max(errors)


def _start(problem: Problem) -> dict[str, Tensor]:
    if problem.case.op == "seeding":
        return {}
    variances, weights = start_of_em(problem)
    return {"means": problem.start, "variances": variances, "weights": weights}


def start_of_em(problem: Problem) -> tuple[Tensor, Tensor]:
    """Initial variances or covariances, of the shape of the case's, and weights ``[C, K]`` of every EM fit."""
    case, weights = problem.case, torch.full_like(problem.weights, 1 / problem.case.K)
    if case.covariance in ("tied", "full"):
        components = (case.K,) if case.covariance == "full" else ()
        return 0.25 * torch.eye(case.D).to(problem.start).repeat(case.C, *components, 1, 1), weights
    return torch.full_like(problem.start if case.diag else weights, 0.25), weights


def judged(problem: Problem, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is compared of a fit: its parameters or, of a seeding, the inertia of its centers."""
    if problem.case.op != "seeding":
        return parameters
    x, labels = problem.sets[0]
    means = parameters["means"].to(x.device).double()
    found = reference.component_statistics_fwd(x.double(), means, labels, None, None, False, False)
    return {"inertia": found[1].sum()}


def _fitted(problem: Problem, x: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Float64 parameters after ``ITERATIONS`` iterations, or the inertia of a seeding."""
    case = problem.case
    if case.op == "seeding":
        random = torch.Generator(x.device).manual_seed(0)
        means = torch.stack([_seeded(x[rows], case, random) for _, rows in by_class(labels, case.C)])
        return judged(problem, {"means": reference.kmeans(x, means, labels, 1, 0.0, False)[0]})
    means, variances, weights = (t.double() for t in _start(problem).values())
    if case.op == "kmeans":
        return {"means": reference.kmeans(x, means, labels, ITERATIONS, 0.0, False)[0]}
    if not case.diag:
        fits = [_em(x[rows], means[c], variances[c], weights[c], case) for c, rows in by_class(labels, case.C)]
        return {name: torch.stack(of) for name, of in zip(("means", "variances", "weights"), zip(*fits))}
    for _ in range(ITERATIONS):
        s0, s1, s2, _ = reference.mixture_statistics(x, means, variances, weights, labels)
        n = s0.clamp_min(1e-300).unsqueeze(-1)
        means, variances = means + s1 / n, s2 / n - (s1 / n).square() + REG_COVAR
        weights = s0 / s0.sum(1, keepdim=True)
    return {"means": means, "variances": variances, "weights": weights}


def _seeded(x: Tensor, case: Case, random: torch.Generator) -> Tensor:
    """Greedy k-means++ from its definition (Arthur and Vassilvitskii, SODA 2007): centers ``[K, D]``."""
    chosen = [x[torch.randint(len(x), (), generator=random, device=x.device)]]
    nearest = (x - chosen[0]).square().sum(1)
    for _ in range(case.K - 1):
        candidates = x[nearest.multinomial(case.candidates, generator=random)]
        distances = torch.cdist(candidates, x).square().minimum(nearest)
        best = distances.sum(1).argmin()
        chosen.append(candidates[best])
        nearest = distances[best]
    return torch.stack(chosen)


def _em(x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """EM of one class from its definition, with a matrix for every component."""
    identity = torch.eye(case.D, dtype=x.dtype, device=x.device)
    matrices = variances.view(-1, 1, 1) * identity if case.covariance == "spherical" else variances
    for _ in range(ITERATIONS):
        factor = torch.linalg.cholesky(matrices.expand(case.K, -1, -1))
        away = (x - means.unsqueeze(1)).mT  # [K, D, N]
        scaled = torch.linalg.solve_triangular(factor, away, upper=False)
        log_volume = factor.diagonal(dim1=1, dim2=2).log().sum(1)
        mass = (weights.log() - log_volume - 0.5 * scaled.square().sum(1).mT).softmax(1)  # [N, K]
        counts = mass.sum(0)
        means, weights = mass.mT @ x / counts.unsqueeze(1), counts / counts.sum()
        away = (x - means.unsqueeze(1)).mT
        matrices = (away * mass.mT.unsqueeze(1)) @ away.mT / counts.view(-1, 1, 1)
        if case.covariance == "tied":
            matrices = (weights.view(-1, 1, 1) * matrices).sum(0)
        matrices = matrices + REG_COVAR * identity
        if case.covariance == "spherical":
            variances = matrices.diagonal(dim1=1, dim2=2).mean(1)
            matrices = variances.view(-1, 1, 1) * identity
    return means, variances if case.covariance == "spherical" else matrices, weights


VECTORIZED = ("torch eager", "segmented GEMM")
QUICK = (*VECTORIZED, "MixtureSameFamily", "scikit-learn", "torchgmm")  # no compilation
SCALED = {
    "N": (100, 1_000, 10_000, 100_000),
    "D": (8, 80, 800, 8_000),
    "C": (1, 10, 100, 1_000),
    "K": (1, 10, 100, 1_000),
}
SCALED_FITS = SCALED | {"N": (1_000, 10_000, 100_000, 1_000_000), "D": (4, 40, 400, 4_000)}


def operations(quick: bool) -> Iterator[Case]:
    """Operations at the shapes of training steps, spherical and diag, small and large."""
    of = "operations"
    if quick:
        yield Case(of, "cem_paper", 128, 512, 10, 5)
        yield Case(of, "cem_official", 1_024, 512, 100, 5)
        yield Case(of, "mixture_log_prob", 512, 512, 10, 10, "diag", peers=QUICK)
        yield Case(of, "mixture_log_prob", 1_024, 64, 1, 100, "diag", peers=QUICK)
        yield Case(of, "component_statistics", 1_024, 512, 10, 5, peers=VECTORIZED)
        return
    for N, D, C in ((128, 512, 10), (1_024, 512, 100), (8_192, 512, 1_000), (4_096, 2_048, 100), (65_536, 512, 100)):
        yield Case(of, "cem_official", N, D, C, 5)
    yield Case(of, "cem_paper", 128, 512, 10, 5)
    yield Case(of, "cem_paper", 8_192, 512, 1_000, 5, peers=VECTORIZED)
    yield Case(of, "cem_paper", 4_096, 2_048, 100, 5, "diag", peers=VECTORIZED)
    yield Case(of, "cem_paper", 65_536, 512, 100, 5, "diag", peers=VECTORIZED)
    yield Case(of, "cem_paper", 65_536, 512, 100, 5, dtype="bfloat16", peers=VECTORIZED)
    yield Case(of, "mixture_log_prob", 4_096, 2_048, 10, 10, "diag")
    yield Case(of, "mixture_log_prob", 4_096, 2_048, 100, 10, "diag")
    yield Case(of, "mixture_log_prob", 4_096, 128, 1, 1_000, "diag")
    yield Case(of, "component_statistics", 4_096, 2_048, 100, 5)


def scaling(quick: bool) -> Iterator[Case]:
    """Operations over three decades of N, D, C and K, one size at a time."""
    base = Case("scaling", "cem_paper", 2_048, 256, 10, 5, peers=VECTORIZED)
    for op, covariance in (("cem_paper", "spherical"), ("mixture_log_prob", "diag")):
        for axis, sizes in SCALED.items():
            for size in sizes[:2] if quick else sizes:
                yield _resized(replace(base, op=op, covariance=covariance), axis, size)


def fitting(quick: bool) -> Iterator[Case]:
    """Fits of a single class and of many classes, and fits over three decades of each size."""
    if quick:
        yield Case("fitting", "kmeans", 4_096, 128, 1, 10)
        yield Case("fitting", "em", 4_096, 64, 1, 10, "diag")
    else:
        yield Case("fitting", "kmeans", 16_384, 512, 1, 10)
        yield Case("fitting", "kmeans", 50_000, 512, 100, 5)
        yield Case("fitting", "em", 16_384, 512, 1, 10, "diag")
        for N, D, K in ((20_000, 16, 10), (20_000, 16, 100), (20_000, 16, 1_000), (100_000, 2, 8), (5_000, 64, 32)):
            yield Case("fitting", "kmeans", N, D, 1, K)
        for N, D, K in ((8_000, 16, 1_024), (50_000, 64, 100)):
            yield Case("fitting", "seeding", N, D, 1, K)
        for covariance in ("spherical", "diag"):
            yield Case("fitting", "em", 20_000, 16, 1, 32, covariance)
        for covariance in ("tied", "full"):  # of which some compute in float64 only
            yield Case("fitting", "em", 20_000, 16, 1, 32, covariance, dtype="float64")
    for op, covariance in (("kmeans", "spherical"), ("em", "diag")):
        base = Case("fitting", op, 10_000, 64, 10, 8, covariance, peers=("scikit-learn",))
        for axis, sizes in SCALED_FITS.items():
            for size in sizes[:2] if quick else sizes:
                # enough rows for every component
                if axis == "C":
                    of_axis = replace(base, N=100 * size)
                elif axis == "K":
                    of_axis = replace(base, N=20_000, C=1, D=16)
                else:
                    of_axis = base
                yield _resized(of_axis, axis, size)


def _resized(case: Case, axis: str, size: int) -> Case:
    """A point of a scaling curve: the case with another size along one axis."""
    sizes: dict[str, Any] = {axis: size}
    return replace(case, axis=axis, **sizes)


GROUPS: dict[str, Callable[[bool], Iterator[Case]]] = {
    "operations": operations,
    "scaling": scaling,
    "fitting": fitting,
}
