"""Float32 features whose squares overflow, and what the operators must make of them."""

from __future__ import annotations

import math
from typing import Any

import torch

from support.tolerances import RELATIVE, relative_error

WIDTHS = (1, 3, 144, 1030)


def case(width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows far from all means, near one of them, and near zero; every component is the nearest of some."""
    means = torch.zeros(1, 3, width)
    means[0, 1], means[0, 2] = 5e19, -6e19
    x = torch.tensor([4e19, -5e19, 1e-3, 3e37, -3e37, 1e20])[:, None].repeat(1, width)
    return x, means


def check_nearest(operators: Any, width: int, *, components: int = 3) -> None:
    """Assignment, counts and sums are those of float64; a scatter that float32 cannot hold is infinite."""
    x, means = case(width)
    means = means.repeat(1, components // 3, 1)
    distance = (x.double()[:, None] - means[0].double()).square().sum(-1)
    for per_dimension, sums in ((False, True), (True, False)):
        counts, scatter, total, assignment = operators.component_statistics_fwd(
            x, means, None, None, None, per_dimension, sums
        )
        assert torch.equal(assignment, distance.argmin(1))
        assert torch.equal(counts[0], torch.bincount(assignment, minlength=components).float())
        assert scatter.isinf().any()
        assert not scatter.isnan().any()
        if sums:
            expected = torch.zeros(components, width, dtype=torch.float64).index_add_(0, assignment, x.double())
            assert relative_error(total[0], expected) < RELATIVE[torch.float32]


def check_densities(operators: Any, width: int, *, diag: bool, components: int = 3) -> None:
    """Log-likelihood, gradient and the most probable component are those of float64."""
    x, means = case(width)
    x, means = x.clamp(-1e20, 1e20), means.repeat(1, components // 3, 1)
    variances = torch.full((1, components, width) if diag else (1, components), 1e38)
    variances[:, 1] = 2e37
    weights = torch.full((1, components), 1 / components)
    joint = torch.stack(
        [
            -0.5 * ((x.double() - m).square() / v + v.log() + math.log(2 * math.pi)).sum(-1) - math.log(components)
            for m, v in zip(means[0].double(), variances[0].double().reshape(components, -1))
        ],
        1,
    )
    for kept in (True, False):
        log_prob, r = operators.mixture_log_prob_fwd(x, means, variances, weights, None, kept)
        assert relative_error(log_prob, joint.logsumexp(1)) < 10 * RELATIVE[torch.float32]
        dx = operators.mixture_log_prob_bwd(torch.ones(len(x)), x, means, variances, weights, None, log_prob, r)
        spread = variances.double().reshape(components, -1)
        slope = (joint.softmax(1)[..., None] * (means[0].double() - x.double()[:, None]) / spread).sum(1)
        assert ((dx - slope).abs() <= 1e-4 * slope.abs() + 1e-5 * slope.abs().max()).all()
    best = operators.component_statistics_fwd(x, means, None, variances, weights, False, True)[3]
    assert torch.equal(best, joint.argmax(1))
