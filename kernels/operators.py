"""Launchers of the operators by their name in ``torch.ops.cem_fast``; needs triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cem_fast.kernels.component_statistics import (
    component_statistics_bwd,
    component_statistics_fwd,
    partial_statistics,
)
from cem_fast.kernels.entropy_bound import entropy_bound, entropy_bound_of_partials
from cem_fast.kernels.mixture_log_prob import mixture_log_prob_bwd, mixture_log_prob_fwd, mixture_moments
from torch import Tensor


def cem_fwd(
    x: Tensor,
    means: Tensor,
    labels: Tensor | None,
    variances: Tensor,
    weights: Tensor,
    class_prior: Tensor,
    num_samples: Tensor,
    noise_variance: Tensor,
    official: bool = False,
    boost: float = 1.0,
    unbiased: bool = True,
    mean: bool = True,
    threshold: float = 0.125,
    gamma: float = 0.01,
) -> tuple[Tensor, Tensor, Tensor]:
    per_dimension = variances.dim() == 3
    priors = (variances, weights, class_prior, num_samples, noise_variance)
    if per_dimension and x.shape[0] > 0:
        partials, assignment = partial_statistics(x, means, labels, None, None, True, False)
        return *entropy_bound_of_partials(partials, *priors, boost, unbiased, mean), assignment
    counts, scatter, _, assignment = component_statistics_fwd(x, means, labels, None, None, per_dimension, False)
    options = (official, boost, unbiased, mean, threshold, gamma)
    return *entropy_bound(counts, scatter, means.shape[2], *priors, *options), assignment


OPERATORS: dict[str, Callable[..., Any]] = {
    "mixture_log_prob_fwd": mixture_log_prob_fwd,
    "mixture_log_prob_bwd": mixture_log_prob_bwd,
    "mixture_moments": mixture_moments,
    "component_statistics_fwd": component_statistics_fwd,
    "component_statistics_bwd": component_statistics_bwd,
    "entropy_bound": entropy_bound,
    "cem_fwd": cem_fwd,
}
