"""Mixtures with a covariance matrix, one for each component (full) or one for each class (tied), in double precision.

``log p(x | c) = logsumexp_k( log w_ck - 1/2 ( |L_ck^-1 (x - mu_ck)|^2 + 2 log det L_ck + D log 2 pi ) )``, ``L L^T`` the covariance
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def per_component(covariances: Tensor, num_components: int) -> Tensor:
    """``[C, K, D, D]`` from that, or from tied ``[C, D, D]``."""
    if covariances.dim() == 4:
        return covariances
    return covariances.unsqueeze(1).expand(-1, num_components, -1, -1)


def _classes(x: Tensor, labels: Tensor | None, num_classes: int) -> Iterator[tuple[int, Tensor]]:
    """Every class that has rows, and where they are."""
    for c in range(num_classes):
        rows = torch.arange(len(x), device=x.device) if labels is None else (labels == c).nonzero().squeeze(1)
        if len(rows):
            yield c, rows


def log_joint(x: Tensor, labels: Tensor | None, means: Tensor, covariances: Tensor, weights: Tensor) -> Tensor:
    """``log( w_ck N(x; mu_ck, Sigma_ck) )`` of each row and component of its class, ``[N, K]`` float64; differentiable.

    Args:
        x: rows ``[N, D]``.
        labels: class of each row ``[N]``, int64 in range; None for one class.
        means: ``[C, K, D]``.
        covariances: ``[C, K, D, D]`` or ``[C, D, D]``, positive definite.
        weights: ``[C, K]``.
    """
    C, K, D = means.shape
    roots = torch.linalg.cholesky(covariances.double())
    half_logdet = roots.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constants = weights.double().log() - 0.5 * D * math.log(2 * math.pi)
    constants = constants - (half_logdet if covariances.dim() == 4 else half_logdet.unsqueeze(1))
    joint = x.new_zeros(len(x), K, dtype=torch.float64)
    for c, rows in _classes(x, labels, C):
        deviations = x[rows].double().unsqueeze(0) - means[c].double().unsqueeze(1)
        of_class = roots[c] if covariances.dim() == 4 else roots[c].unsqueeze(0)
        white = torch.linalg.solve_triangular(of_class, deviations.transpose(1, 2), upper=False)
        joint = joint.index_copy(0, rows, constants[c] - 0.5 * white.square().sum(1).T)
    return joint


def moments(
    x: Tensor, labels: Tensor | None, means: Tensor, covariances: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``sum r``, ``sum r (x - mu)``, ``sum r (x - mu)(x - mu)^T`` (over k, too, if tied) and each class's log-likelihood."""
    C, _, _ = means.shape
    joint = log_joint(x, labels, means, covariances, weights)
    log_prob = joint.logsumexp(1)
    r = (joint - log_prob.unsqueeze(1)).exp()
    s0, s1, s2 = (torch.zeros_like(t, dtype=torch.float64) for t in (weights, means, covariances))
    total = s0.new_zeros(C)
    for c, rows in _classes(x, labels, C):
        deviations = x[rows].double().unsqueeze(0) - means[c].double().unsqueeze(1)
        shared = deviations * r[rows].T.unsqueeze(-1)
        s0[c], s1[c], total[c] = r[rows].sum(0), shared.sum(1), log_prob[rows].sum()
        outer = shared.transpose(1, 2) @ deviations
        s2[c] = outer if covariances.dim() == 4 else outer.sum(0)
    return s0, s1, s2, total


def estimate(s0: Tensor, shift: Tensor, s2: Tensor, *, reg_covar: float) -> Tensor:
    """The covariances that moments about the old means give once the means have moved by ``shift [C, K, D]``."""
    moved = shift.unsqueeze(-1) * shift.unsqueeze(-2)
    if s2.dim() == 4:
        covariances = s2 / s0.clamp_min(torch.finfo(torch.float64).tiny)[..., None, None] - moved
    else:
        covariances = s2 - (s0[..., None, None] * moved).sum(1)
        covariances = covariances / s0.sum(1).clamp_min(1)[:, None, None]
    ridge = reg_covar * torch.eye(s2.shape[-1], dtype=s2.dtype, device=s2.device)
    return (covariances + covariances.mT) / 2 + ridge
