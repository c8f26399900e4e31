"""This library: its public interface, and the operators of each GPU backend alone."""

from __future__ import annotations

from typing import Any

import torch
from cem_fast.benchmarks.cases import FITS, ITERATIONS, NOISE_STD, REG_COVAR, Problem, start_of_em
from cem_fast.benchmarks.peers.adapters import Built, Differentiable, Fit, Operators

from cem_fast import CEMLoss, GaussianMixture, KMeans
from cem_fast import functional as F
from cem_fast.ops import backend


def public_interface(problem: Problem) -> Built:
    """CEMLoss, the functions, and fits of GaussianMixture."""
    case = problem.case
    if case.op in FITS:
        return _fit(problem)
    if case.op == "mixture_log_prob":
        mixture = (problem.means, problem.variances, problem.weights)
        return Differentiable(problem, lambda x, labels: F.mixture_log_prob(x, *mixture, labels))
    if case.op == "component_statistics":
        return Differentiable(problem, lambda x, labels: F.component_statistics(x, problem.means, labels).scatter)
    loss = CEMLoss(
        num_classes=case.C,
        num_components=case.K,
        noise_std=NOISE_STD,
        covariance_type=case.covariance,
        variant=case.op.removeprefix("cem_"),
    )
    loss.to(problem.device).load_mixture(
        means=problem.means,
        variances=problem.variances,
        weights=problem.weights,
        class_prior=problem.class_prior,
        num_samples=int(problem.num_samples),
    )
    return Differentiable(problem, loss)


def _fit(problem: Problem) -> Fit:
    case, (x, labels) = problem.case, problem.sets[0]
    if case.op == "seeding":
        of = {"num_clusters": case.K, "num_classes": case.C, "max_iter": 1, "tol": 0.0}

        def seeding() -> KMeans:
            return KMeans(**of, generator=torch.Generator(problem.device).manual_seed(0)).fit(x, labels)

        return Fit(problem, seeding, lambda m: (m.cluster_centers_,))
    settings: dict[str, Any] = {
        "num_components": case.K,
        "num_classes": case.C,
        "covariance_type": case.covariance,
        "algorithm": case.op,
        "init": problem.start,
        "max_iter": ITERATIONS,
        "tol": 0.0,
        "reg_covar": REG_COVAR,
    }
    if case.op == "em":
        settings["init_variances"], settings["init_weights"] = start_of_em(problem)
    kept = "covariances" if case.covariance in ("tied", "full") else "variances"
    return Fit(
        problem,
        lambda: GaussianMixture(**settings).fit(x, labels),
        lambda m: (m.means, getattr(m, kept), m.weights) if case.op == "em" else (m.means,),
    )


def triton_operators(problem: Problem) -> Built:
    """The Triton operators."""
    from cem_fast.kernels.operators import OPERATORS

    return Operators(problem, OPERATORS)


def cuda_operators(problem: Problem) -> Built:
    """The CUDA C++ operators; ``ImportError`` if they are not built."""
    try:
        operators = backend.cuda_operators()
    except OSError as error:
        raise ImportError(str(error)) from error
    return Operators(problem, dict(operators))
