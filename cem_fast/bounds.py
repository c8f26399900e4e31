"""Entropy bounds of a mixture, and what conditional entropy says about any attack's reconstruction error.

All entropies are in nats. Bounds computed from a fitted mixture are estimates: Eq. 7 is a bound for the true component
covariances, and the held-out estimate is one in expectation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cem_fast.functional import component_statistics, mixture_log_prob
from cem_fast.mixture import GaussianMixture
from cem_fast.ops import validate


def _noise_variance(noise_std: float | Tensor, like: Tensor) -> Tensor:
    std = torch.as_tensor(noise_std, dtype=torch.float64, device=like.device)
    if std.dim() > 1 or not bool((std > 0).all()):
        raise ValueError(f"noise_std must be a positive number or a [D] tensor of them, got {noise_std}")
    if std.dim() == 1 and std.shape[0] not in (1, like.shape[-1]):
        raise ValueError(f"noise_std must be a number or have shape [{like.shape[-1]}], got {tuple(std.shape)}")
    return std.square()


def _per_dimension(mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Joint weights ``pi [C K]`` and variances ``[C K, D]`` (expanded, not copied, when spherical), float64."""
    if not mixture.is_fitted:
        raise RuntimeError("the mixture is not fitted: call fit(x, labels) first")
    pi = (mixture.class_prior.double().unsqueeze(1) * mixture.weights.double()).flatten()
    variances = mixture.variances.double()
    variances = variances if variances.dim() == 3 else variances.unsqueeze(-1).expand_as(mixture.means)
    return pi, variances.flatten(0, 1)


def entropy_upper_bound(mixture: GaussianMixture, noise_std: float | Tensor) -> Tensor:
    """Upper bound on the entropy of mixture features with Gaussian noise on top.

    ``H(z) <= sum_i pi_i ( -log pi_i + 1/2 sum_d log(2 pi e (v_id + s2_d)) )``

    Args:
        mixture: fitted mixture of clean features.
        noise_std: standard deviation of the noise, a number or ``[D]``.

    Returns:
        Nats, a float64 scalar.

    Raises:
        RuntimeError: the mixture is not fitted.
        ValueError: noise_std is not positive or does not fit.

    Source: Huber et al., "On entropy approximation for Gaussian mixture random vectors", MFI 2008, Theorem 2.
    """
    s2 = _noise_variance(noise_std, mixture.means)
    pi, variances = _per_dimension(mixture)
    per_component = 0.5 * torch.log(2 * math.pi * math.e * (variances + s2)).sum(1)
    return (pi * per_component - torch.special.xlogy(pi, pi)).sum()


def plugin_information(mixture: GaussianMixture, noise_std: float | Tensor) -> Tensor:
    """Eq. 7 on a fitted mixture: the plug-in estimate of an upper bound on ``I(z; zhat)``.

    ``L_C = sum_i pi_i ( -log pi_i + 1/2 sum_d log((v_id + s2_d) / s2_d) )``

    Args, Returns, Raises: as :func:`entropy_upper_bound`.

    Source: Theorem 2 and Eq. 7 of Xia et al., CVPR 2025.
    """
    s2 = _noise_variance(noise_std, mixture.means)
    pi, variances = _per_dimension(mixture)
    per_component = 0.5 * torch.log1p(variances / s2).sum(1)
    return (pi * per_component - torch.special.xlogy(pi, pi)).sum()


@torch.no_grad()
def heldout_information(
    mixture: GaussianMixture,
    features: Tensor,
    noise_std: float | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Upper bound on ``I(z; zhat)`` in expectation, from features that the mixture was not fitted to.

    ``I(z; zhat) = H(z) - H(noise) <= E[ -log q(z) ] - D/2 log(2 pi e s2)`` with q the mixture convolved with the noise

    Args:
        mixture: fitted mixture of clean features.
        features: held-out clean features ``[N, ...]``, N >= 2; trailing dimensions are flattened.
        noise_std: standard deviation of the noise, a number or ``[D]``.
        generator: source of the noise.

    Returns:
        The estimate and its standard error, float64 scalars in nats.

    Raises:
        RuntimeError: the mixture is not fitted.
        ValueError: noise_std or features do not fit.

    Source: Gibbs' inequality; Cover and Thomas, "Elements of Information Theory", 2006, section 2.6.
    """
    s2 = _noise_variance(noise_std, mixture.means)
    if len(features) < 2:
        raise ValueError(f"features must have at least two rows for a standard error, got {tuple(features.shape)}")
    z = _noisy(_rows(mixture, features), s2, generator)
    log_q = mixture_log_prob(z, *(part.unsqueeze(0) for part in _with_noise(mixture, s2)))
    noise_entropy = 0.5 * torch.log(2 * math.pi * math.e * s2).expand(z.shape[1]).sum()
    excess = -log_q - noise_entropy
    return excess.mean(), excess.std() / math.sqrt(len(z))


class Utility(NamedTuple):
    """Mean posteriors of the right component and of the right class, float64 scalars in [0, 1]; see :func:`utility`."""

    component: Tensor
    label: Tensor


@torch.no_grad()
def utility(
    mixture: GaussianMixture,
    features: Tensor,
    labels: Tensor | None,
    noise_std: float | Tensor,
    *,
    generator: torch.Generator | None = None,
) -> Utility:
    """How surely noisy features tell where they come from: the mean posterior of the right component, and of the right class.

    ``U = mean_n( sum_{i in R_n} pi_i N(z_n; mu_i, v_i + s2) / sum_i pi_i N(z_n; mu_i, v_i + s2) )`` with ``z_n = x_n + noise``

    For the component (Eq. 4), ``R_n`` is the one of the row's own class whose mean is nearest to ``x_n``; for the class, it is all of the
    class's components.

    Args:
        mixture: fitted mixture of clean features.
        features: clean features ``[N, ...]``, N >= 1; trailing dimensions are flattened.
        labels: class of each row ``[N]``, integer; None for a mixture of one class, whose posterior is 1.
        noise_std: standard deviation of the noise, a number or ``[D]``.
        generator: source of the noise.

    Returns:
        Both means.

    Raises:
        RuntimeError: the mixture is not fitted.
        ValueError: an argument does not fit.

    Source: Eq. 4 of Xia et al., CVPR 2025, over rows instead of over the mixture's own samples.
    """
    s2 = _noise_variance(noise_std, mixture.means)
    if not len(features):
        raise ValueError(f"features must have at least one row, got {tuple(features.shape)}")
    means, spread, pi = _with_noise(mixture, s2)
    x = _rows(mixture, features)
    nearest = component_statistics(x, mixture.means.double(), labels).assignment
    z = _noisy(x, s2, generator)
    log_q = mixture_log_prob(z, means.unsqueeze(0), spread.unsqueeze(0), pi.unsqueeze(0))
    index = nearest if labels is None else labels.long() * mixture.num_components + nearest
    by_component = mixture_log_prob(z, means.unsqueeze(1), spread.unsqueeze(1), pi.unsqueeze(1), index)
    by_class = (part.unflatten(0, mixture.weights.shape) for part in (means, spread, pi))
    by_label = mixture_log_prob(z, *by_class, labels)
    return Utility(*((each - log_q).exp().mean() for each in (by_component, by_label)))


def _rows(mixture: GaussianMixture, features: Tensor) -> Tensor:
    """Features as float64 rows ``[N, D]`` that fit the mixture."""
    rows = features.detach().flatten(1).double()
    validate.features(rows, mixture.means.double())
    return rows


def _noisy(rows: Tensor, noise_variance: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(rows.shape, dtype=rows.dtype, device=rows.device, generator=generator)
    return rows + noise_variance.sqrt() * noise


def _with_noise(mixture: GaussianMixture, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means and variances ``[C K, D]`` of the mixture convolved with the noise, and its joint weights ``[C K]``, float64."""
    pi, variances = _per_dimension(mixture)
    return mixture.means.double().flatten(0, 1), (variances + noise_variance).contiguous(), pi


def mse_lower_bound(conditional_entropy: float | Tensor, dimension: int) -> Tensor:
    """Per-dimension mean squared error that no attack can beat: ``xi >= exp(2 H(x|z) / d) / (2 pi e)``.

    Args:
        conditional_entropy: ``H(x|z)`` in nats.
        dimension: d, the number of input dimensions.

    Returns:
        The bound, a float64 tensor in squared units of x. Equality needs an isotropic Gaussian posterior.

    Raises:
        ValueError: dimension is not positive.

    Source: Theorem 1 of Xia et al., CVPR 2025.
    """
    entropy = torch.as_tensor(conditional_entropy, dtype=torch.float64)
    return torch.exp(2 * entropy / _positive(dimension)) / (2 * math.pi * math.e)


def relative_mse_floor(information: float | Tensor, dimension: int) -> Tensor:
    """The bound of Theorem 1 relative to its value without any features: ``exp(-2 I / d)``.

    The entropy ``H(x)`` of images is unknown, so only this ratio can be computed for them, from the summed (not per-feature)
    information.

    Args:
        information: ``I(x; z)`` or an upper bound on it, in nats.
        dimension: d, the number of input dimensions.

    Returns:
        A float64 tensor in (0, 1].

    Raises:
        ValueError: dimension is not positive.

    Source: Theorems 1 and 2 of Xia et al., CVPR 2025.
    """
    return torch.exp(-2 * torch.as_tensor(information, dtype=torch.float64) / _positive(dimension))


def _positive(dimension: int) -> int:
    if not dimension > 0:
        raise ValueError(f"dimension must be positive, got {dimension}")
    return dimension
