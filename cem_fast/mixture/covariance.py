"""Mixtures with a covariance matrix per component (full) or per class (tied), in double precision.

``log p(x | c) = logsumexp_k( log w_ck - 1/2 ( |L_ck^-1 (x - mu_ck)|^2 + 2 log det L_ck + D log 2 pi ) )``, ``L L^T`` the covariance
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cem_fast.ops.fits import OPERATORS, by_class

_INVERSE_ROOTS = OPERATORS["inverse_roots"]
_LOG_JOINT = OPERATORS["matrix_log_joint"]
_MOMENTS = OPERATORS["matrix_moments"]

NOT_POSITIVE = "covariances must be positive definite, got one that is not: raise reg_covar"


def per_component(covariances: Tensor, num_components: int) -> Tensor:
    """Covariances of all components, ``[C, K, D, D]``; tied ones ``[C, D, D]`` are expanded."""
    if covariances.dim() == 4:
        return covariances
    return covariances.unsqueeze(1).expand(-1, num_components, -1, -1)


def log_joint(x: Tensor, labels: Tensor | None, means: Tensor, covariances: Tensor, weights: Tensor) -> Tensor:
    """``log( w_ck N(x; mu_ck, Sigma_ck) )`` of each row and each component of its class, ``[N, K]`` float64; differentiable.

    Args:
        x: rows ``[N, D]``.
        labels: class of each row ``[N]``, int64 in range; None for one class.
        means: ``[C, K, D]``.
        covariances: ``[C, K, D, D]`` or ``[C, D, D]``, positive definite.
        weights: ``[C, K]``.

    Raises:
        ValueError: a covariance is not positive definite.
    """
    C, K, D = means.shape
    traced = torch.compiler.is_compiling()
    tensors = (x, means, covariances, weights)
    if not traced and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return _log_joint_without_gradient(x, labels, means, covariances, weights)
    roots, failed = torch.linalg.cholesky_ex(covariances.double())
    if traced:  # where values cannot be looked at, what is not positive definite gives NaN
        roots = roots.masked_fill((failed != 0)[..., None, None], math.nan)
    elif bool(failed.any()):
        raise ValueError(NOT_POSITIVE)
    half_logdet = roots.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    constants = weights.double().log() - 0.5 * D * math.log(2 * math.pi)
    constants = constants - (half_logdet if covariances.dim() == 4 else half_logdet.unsqueeze(1))

    def of_class(c: int, rows: Tensor) -> Tensor:
        deviations = rows.double().unsqueeze(0) - means[c].double().unsqueeze(1)
        root = roots[c] if covariances.dim() == 4 else roots[c].unsqueeze(0)
        white = torch.linalg.solve_triangular(root, deviations.transpose(1, 2), upper=False)
        joint: Tensor = constants[c] - 0.5 * white.square().sum(1).T
        return joint

    if labels is None:
        return of_class(0, x)
    joint = x.new_full((x.shape[0], K), math.nan, dtype=torch.float64)
    if traced:  # the number of rows of a class is unknown
        for c in range(C):
            joint = torch.where((labels == c).unsqueeze(1), of_class(c, x), joint)
        return joint
    for c, rows in by_class(labels, C):
        assert isinstance(rows, Tensor)
        joint = joint.index_copy(0, rows, of_class(c, x[rows]))
    return joint


def _log_joint_without_gradient(
    x: Tensor, labels: Tensor | None, means: Tensor, covariances: Tensor, weights: Tensor
) -> Tensor:
    _, K, D = means.shape
    roots, half_logdets = _INVERSE_ROOTS(covariances.double().reshape(-1, D, D))
    if bool(half_logdets.isnan().any()):
        raise ValueError(NOT_POSITIVE)
    half_logdets = half_logdets.view(-1, K if covariances.dim() == 4 else 1)
    constants = weights.double().log() - 0.5 * D * math.log(2 * math.pi) - half_logdets
    joint: Tensor = _LOG_JOINT(x.double(), means.double(), roots.view(covariances.shape), constants, labels)
    return joint


def moments(x: Tensor, labels: Tensor | None, means: Tensor, r: Tensor, *, tied: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``sum r``, ``sum r (x - mu)`` and ``sum r (x - mu)(x - mu)^T`` with ``r [N, K]``, float64; if tied, the last also sums over k."""
    s0, s1, s2 = _MOMENTS(x.double(), means.double(), r.double(), labels, tied)
    return s0, s1, s2


def estimate(s0: Tensor, shift: Tensor, s2: Tensor, *, reg_covar: float) -> Tensor:
    """Covariances from moments about the old means, after the means moved by ``shift [C, K, D]``."""
    moved = shift.unsqueeze(-1) * shift.unsqueeze(-2)
    if s2.dim() == 4:
        covariances = s2 / s0.clamp_min(torch.finfo(torch.float64).tiny)[..., None, None] - moved
    else:
        covariances = s2 - (s0[..., None, None] * moved).sum(1)
        covariances = covariances / s0.sum(1).clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
    ridge = reg_covar * torch.eye(s2.shape[-1], dtype=s2.dtype, device=s2.device)
    return (covariances + covariances.mT) / 2 + ridge


class Span:
    """Coordinates ``[N, M]`` of rows in the affine space spanned by ``n < D`` points, where a fit costs ``n^3`` instead of ``D^3``.

    The points' moments lie in this space. Outside it, a covariance consists of the ridge only:
    ``Sigma = ridge I + Q (Sigma_Q - ridge I) Q^T`` with an orthonormal basis ``Q [D, M]``, so that
    ``log N(x; mu, Sigma) = log N(Q^T x; Q^T mu, Sigma_Q) - (D - M) / 2 log(2 pi ridge)``.

    Args:
        points: ``[n, D]``, float64.
        ridge: added to the diagonal of every covariance; positive.
    """

    def __init__(self, points: Tensor, ridge: float):
        self.ridge = ridge
        self.origin: Tensor = points.mean(0)
        self.basis: Tensor = torch.linalg.qr((points - self.origin).T).Q

    def coordinates(self, x: Tensor) -> Tensor:
        return (x - self.origin) @ self.basis

    def points(self, coordinates: Tensor) -> Tensor:
        return self.origin + coordinates @ self.basis.T

    def covariances(self, inside: Tensor) -> Tensor:
        """Covariances ``[..., D, D]`` of rows from covariances ``[..., M, M]`` of their coordinates."""
        D, M = self.basis.shape
        without = inside - self.ridge * torch.eye(M, dtype=inside.dtype, device=inside.device)
        return self.basis @ without @ self.basis.T + self.ridge * torch.eye(D, dtype=inside.dtype, device=inside.device)

    @property
    def log_density_outside(self) -> float:
        D, M = self.basis.shape
        return -0.5 * (D - M) * math.log(2 * math.pi * self.ridge)
