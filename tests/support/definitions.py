"""Definitions of the operations in plain float64 torch; every backend is tested against them.

All of them are differentiable by autograd and allocate intermediates of ``N x K x D`` elements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Mixture(NamedTuple):
    """Parameters of a mixture."""

    means: Tensor
    variances: Tensor
    weights: Tensor

    def to(self, dtype: torch.dtype) -> Mixture:
        return Mixture(*(t.to(dtype) for t in self))


# N, D, C, K: single elements, odd sizes, more classes than rows, many components
SHAPES = [(1, 1, 1, 1), (37, 3, 4, 5), (64, 129, 7, 3), (5, 70, 40, 2), (30, 33, 1, 80)]


def draw(
    rows: int, dimension: int, classes: int, components: int, *, diag: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Mixture]:
    """Random float64 rows, labels and a mixture, reproducible by seed."""
    g = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=g)

    weights = uniform(classes, components) + 0.2
    shape = (classes, components, dimension) if diag else (classes, components)
    mixture = Mixture(
        uniform(classes, components, dimension), 0.02 + 0.2 * uniform(*shape), weights / weights.sum(1, True)
    )
    return uniform(rows, dimension), torch.randint(0, classes, (rows,), generator=g), mixture


def log_prob(x: Tensor, mixture: Mixture, labels: Tensor) -> Tensor:
    """Log-density of each row in the mixture of its class ``[N]``."""
    means, variances, weights = mixture
    v = variances if variances.dim() == 3 else variances.unsqueeze(-1).expand_as(means)
    exponent = ((x.unsqueeze(1) - means[labels]).square() / v[labels] + torch.log(2 * math.pi * v[labels])).sum(-1)
    return torch.logsumexp(torch.log(weights[labels]) - 0.5 * exponent, dim=1)


def nearest(x: Tensor, means: Tensor, labels: Tensor) -> Tensor:
    """Index of the nearest mean of each row's class ``[N]``."""
    return (x.detach().unsqueeze(1) - means[labels]).square().sum(-1).argmin(1)


def statistics(x: Tensor, means: Tensor, labels: Tensor, chosen: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Counts ``[C, K]``, scatter and sums ``[C, K, D]`` about the nearest means, or the chosen ones."""
    C, K, _ = means.shape
    chosen = nearest(x, means, labels) if chosen is None else chosen
    member = torch.nn.functional.one_hot(labels * K + chosen, C * K).to(x.dtype).view(-1, C, K)
    scatter = torch.einsum("nck,nckd->ckd", member, (x[:, None, None] - means).square())
    return member.sum(0), scatter, torch.einsum("nck,nd->ckd", member, x)


def paper_bound(
    x: Tensor,
    labels: Tensor,
    mixture: Mixture,
    class_prior: Tensor,
    num_samples: int,
    noise_variance: Tensor,
    *,
    boost: float = 1.0,
    unbiased: bool = True,
    chosen: Tensor | None = None,
) -> Tensor:
    """Eq. 5-7 summed over dimensions; ``unbiased`` scales the gradient to a minibatch gradient of Eq. 7."""
    means, variances, weights = mixture
    rows, D = x.shape
    b = min(boost, num_samples / max(rows, 1))
    counts, scatter, _ = statistics(x, means, labels, chosen)
    if unbiased:
        scatter = scatter.detach() + (scatter - scatter.detach()) * num_samples / (b * max(rows, 1))
    mass = class_prior.unsqueeze(1) * weights * max(0.0, num_samples - b * rows) + b * counts
    a = torch.where(counts > 0, b * counts / mass.where(counts > 0, 1.0), 0.0).unsqueeze(-1)
    batch = scatter / counts.clamp_min(1).unsqueeze(-1)
    if variances.dim() == 2:
        batch, variances = batch.mean(-1, keepdim=True).expand(-1, -1, D), variances.unsqueeze(-1).expand(-1, -1, D)
    blended = (1 - a) * variances + a * batch
    pi = mass / num_samples
    entropy = 0.5 * torch.log((blended + noise_variance) / noise_variance).sum(-1)
    return (pi * entropy - torch.special.xlogy(pi, pi)).sum()


def official_hinge(
    x: Tensor,
    labels: Tensor,
    mixture: Mixture,
    num_samples: int,
    noise_variance: Tensor,
    *,
    threshold: float = 0.125,
    gamma: float = 0.01,
    chosen: Tensor | None = None,
) -> Tensor:
    """Regularizer of the released code, one class and one component at a time."""
    means, variances, weights = mixture
    C, K, _ = means.shape
    chosen = nearest(x, means, labels) if chosen is None else chosen
    floor = torch.log(threshold * noise_variance + gamma).squeeze()
    total, present = x.new_zeros(()), 0
    for c in range(C):
        present += int((labels == c).any())
        for k in range(K):
            rows = x[(labels == c) & (chosen == k)]
            if len(rows):
                a = 10 * len(rows) / (weights[c, k] * num_samples / C)
                a = a if a < 1 else 0.99
                v = (1 - a) * variances[c, k] + a * (rows - means[c, k]).square().mean()
                total = total + weights[c, k] * torch.relu(torch.log(v + gamma) - floor)
    return total / max(present, 1)
