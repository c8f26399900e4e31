"""Entropy bounds of a mixture, and the lower bound on the mean squared error of every attack.

All entropies are in nats. Values computed from a fitted mixture are estimates of bounds: Eq. 7 is a bound for the true component
covariances, and the held-out estimate is a bound in expectation.

The error bound holds for the mean squared error, in expectation over inputs, up to the entropy of the data, which is unknown
for images. It assumes one release of features per input. An attacker with n releases of one image averages their noise, which loses
nothing if it is Gaussian and independent: ``releases=n`` divides the variance by n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cem_fast._support.counts import require_count
from cem_fast.functional import component_statistics, mixture_log_prob
from cem_fast.mixture import GaussianMixture
from cem_fast.ops import validate


def _noise_variance(noise_std: float | Tensor, like: Tensor, releases: int = 1) -> Tensor:
    """Variance of the noise of the mean of all releases."""
    std = validate.standard_deviation("noise_std", noise_std).to(like.device)
    if std.dim() == 1 and std.shape[0] not in (1, like.shape[-1]):
        raise ValueError(f"noise_std must be a number or have shape [{like.shape[-1]}], got {tuple(std.shape)}")
    require_count("releases", releases)
    return std.square() / releases


def _means(mixture: GaussianMixture) -> Tensor:
    """Means ``[C, K, D]`` of a fitted mixture with variances."""
    if not isinstance(mixture, GaussianMixture):
        raise TypeError(f"mixture must be a GaussianMixture, got {type(mixture).__name__}")
    if not mixture.is_fitted:
        raise RuntimeError("the mixture is not fitted: call fit(x, labels) first")
    if mixture.matrices:
        raise ValueError(f"mixture must have spherical or diag covariances, got {mixture.covariance_type!r}")
    return mixture.means


def _per_dimension(mixture: GaussianMixture) -> tuple[Tensor, Tensor]:
    """Joint weights ``pi [C K]`` and variances ``[C K, D]`` (expanded, not copied, when spherical), float64."""
    pi = (mixture.class_prior.double().unsqueeze(1) * mixture.weights.double()).flatten()
    variances = mixture.variances.double()
    variances = variances if variances.dim() == 3 else variances.unsqueeze(-1).expand_as(mixture.means)
    return pi, variances.flatten(0, 1)


def _expected(pi: Tensor, per_component: Tensor) -> Tensor:
    """``sum_i pi_i (a_i - log pi_i)``."""
    total: Tensor = (pi * per_component - torch.special.xlogy(pi, pi)).sum()
    return total


def entropy_upper_bound(mixture: GaussianMixture, noise_std: float | Tensor, *, releases: int = 1) -> Tensor:
    """Upper bound on the entropy of mixture features with added Gaussian noise.

    ``H(z) <= sum_i pi_i ( -log pi_i + 1/2 sum_d log(2 pi e (v_id + s2_d)) )``

    Args:
        mixture: fitted mixture of clean features.
        noise_std: standard deviation of the noise, a number or ``[D]``.
        releases: messages of one input with independent noise.

    Returns:
        Nats, a float64 scalar.

    Raises:
        RuntimeError: the mixture is not fitted.
        ValueError: noise_std is not positive or does not fit.

    Example:
        >>> import torch
        >>> from cem_fast import GaussianMixture, bounds
        >>> mixture = GaussianMixture(num_components=1, reg_covar=0.0).fit(torch.tensor([[-1.0], [1.0]]))
        >>> bounds.entropy_upper_bound(mixture, 0.5)  # 1/2 log(2 pi e (1 + 0.25)): one Gaussian is exact
        tensor(1.5305, dtype=torch.float64)

    Source: Huber et al., "On entropy approximation for Gaussian mixture random vectors", MFI 2008, Theorem 2.
    """
    s2 = _noise_variance(noise_std, _means(mixture), releases)
    pi, variances = _per_dimension(mixture)
    return _expected(pi, 0.5 * torch.log(2 * math.pi * math.e * (variances + s2)).sum(1))


def plugin_information(mixture: GaussianMixture, noise_std: float | Tensor, *, releases: int = 1) -> Tensor:
    """Eq. 7 on a fitted mixture: the plug-in estimate of an upper bound on ``I(z; zhat)``.

    ``L_C = sum_i pi_i ( -log pi_i + 1/2 sum_d log((v_id + s2_d) / s2_d) )``

    Args:
        mixture: fitted mixture of clean features.
        noise_std: standard deviation of the noise, a number or ``[D]``.
        releases: messages of one input with independent noise.

    Returns:
        Nats, a float64 scalar.

    Raises:
        RuntimeError: the mixture is not fitted.
        ValueError: noise_std is not positive or does not fit.

    Example:
        >>> import torch
        >>> from cem_fast import GaussianMixture, bounds
        >>> mixture = GaussianMixture(num_components=1, reg_covar=0.0).fit(torch.tensor([[-1.0], [1.0]]))
        >>> bounds.plugin_information(mixture, 0.5)  # 1/2 log((1 + 0.25) / 0.25)
        tensor(0.8047, dtype=torch.float64)
        >>> bounds.plugin_information(mixture, 0.5, releases=4)  # of one input
        tensor(1.4166, dtype=torch.float64)

    Source: Theorem 2 and Eq. 7 of Xia et al., CVPR 2025.
    """
    s2 = _noise_variance(noise_std, _means(mixture), releases)
    pi, variances = _per_dimension(mixture)
    return _expected(pi, 0.5 * torch.log1p(variances / s2).sum(1))


def channel_capacity(num_features: int, noise_std: float | Tensor, *, releases: int = 1) -> Tensor:
    """Upper bound on the information in features in [0, 1] with added Gaussian noise, whatever the encoder and the data are.

    ``I(x; z) <= sum_d 1/2 log(1 + 1 / (4 s2_d))``, since a variable in [0, 1] has a variance of at most 1/4

    It needs no fit, and is a certificate, unlike the estimates: 64 numbers at noise 0.2 carry at most 63 nats, which is 91 bits.

    Args:
        num_features: number of released features, D.
        noise_std: standard deviation of the noise, a number or ``[D]``.
        releases: messages of one input with independent noise.

    Returns:
        Nats, a float64 scalar; divide by ``log(2)`` for bits.

    Raises:
        ValueError: num_features or noise_std is not positive, or noise_std does not fit.

    Example:
        >>> import math
        >>> from cem_fast import bounds
        >>> bounds.channel_capacity(64, 0.2)
        tensor(63.3920, dtype=torch.float64)
        >>> round(float(bounds.channel_capacity(64, 0.2)) / math.log(2))  # bits
        91

    Source: Cover and Thomas, "Elements of Information Theory", 2006, sections 9.1 and 9.4 (capacity at a given power).
    """
    require_count("num_features", num_features)
    s2 = _noise_variance(noise_std, torch.empty(num_features), releases)
    return (0.5 * torch.log1p(0.25 / s2)).expand(num_features).sum()


@torch.no_grad()
def heldout_information(
    mixture: GaussianMixture,
    features: Tensor,
    noise_std: float | Tensor,
    *,
    releases: int = 1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Estimate of an upper bound on ``I(z; zhat)``, from features that the mixture was not fitted to.

    ``I(z; zhat) = H(z) - H(noise) <= E[ -log q(z) ] - D/2 log(2 pi e s2)`` with q the mixture convolved with the noise

    Args:
        mixture: fitted mixture of clean features.
        features: held-out clean features ``[N, ...]``, N >= 2; trailing dimensions are flattened.
        noise_std: standard deviation of the noise, a number or ``[D]``.
        releases: messages of one input with independent noise.
        generator: source of the noise.

    Returns:
        The estimate and its standard error, float64 scalars in nats.

    Raises:
        RuntimeError: the mixture is not fitted.
        ValueError: noise_std or features do not fit.

    Example:
        >>> import torch
        >>> from cem_fast import GaussianMixture, bounds
        >>> generator = torch.Generator().manual_seed(0)
        >>> train, held_out = torch.randn(2, 5000, 1, generator=generator)
        >>> mixture = GaussianMixture(num_components=1).fit(train)
        >>> nats, standard_error = bounds.heldout_information(mixture, held_out, 0.5, generator=generator)
        >>> abs(float(nats) - 0.8047) < 3 * float(standard_error)  # 1/2 log((1 + 0.25) / 0.25) for normal features
        True

    Source: Gibbs' inequality; Cover and Thomas, "Elements of Information Theory", 2006, section 2.6.
    """
    s2 = _noise_variance(noise_std, _means(mixture), releases)
    z = _noisy(_rows(mixture, features), s2, generator)
    log_q = mixture_log_prob(z, *(part.unsqueeze(0) for part in _with_noise(mixture, s2)))
    noise_entropy = 0.5 * torch.log(2 * math.pi * math.e * s2).expand(z.shape[1]).sum()
    excess = -log_q - noise_entropy
    return excess.mean(), excess.std() / math.sqrt(len(z))


@torch.no_grad()
def heldout_upper_bound(
    mixture: GaussianMixture,
    features: Tensor,
    noise_std: float | Tensor,
    *,
    radius: float,
    delta: float = 0.05,
    share: float = 1e-3,
    releases: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Upper bound on ``I(z; zhat)`` that holds with a probability of at least ``1 - delta``, if features lie within a radius.

    ``I(z; zhat) <= E[R]``, ``R = log N(z; zhat, s2) - log q(z)``, ``q = (1 - share) mixture + share N(center, s2 + radius^2 / D)``

    The broad Gaussian bounds the log-ratio: ``R <= M = -log share + 1/2 sum_d log(1 + radius^2 / (D s2_d)) + D / 2``. The bound on the mean
    is that of Maurer and Pontil, with R cut off below, which only raises its mean:
    ``mean + sqrt(2 var log(2 / delta) / N) + 7 (M - least) log(2 / delta) / (3 (N - 1))``

    It assumes that the held-out features are drawn independently, like those that it speaks of, and that none of these lies further from
    the center of the mixture than ``radius``. For features in [0, 1] the radius ``sqrt(D)`` always holds.

    Args:
        mixture: fitted mixture of clean features.
        features: held-out clean features ``[N, ...]``, N >= 2; trailing dimensions are flattened.
        noise_std: standard deviation of the noise, a number or ``[D]``.
        radius: largest distance of clean features from the center of the mixture; chosen without the held-out features.
        delta: probability that the bound fails, in (0, 1).
        share: weight of the broad Gaussian, in (0, 1).
        releases: messages of one input with independent noise.
        generator: source of the noise.

    Returns:
        Nats, a float64 scalar.

    Raises:
        RuntimeError: the mixture is not fitted.
        ValueError: an argument does not fit, or held-out features lie outside of the radius.

    Example:
        >>> import torch
        >>> from cem_fast import GaussianMixture, bounds
        >>> generator = torch.Generator().manual_seed(0)
        >>> train, held_out = torch.rand(2, 5000, 4, generator=generator)
        >>> mixture = GaussianMixture(num_components=1).fit(train)
        >>> float(bounds.heldout_upper_bound(mixture, held_out, 0.2, radius=2.0, generator=generator)) < 2.5
        True
        >>> float(bounds.heldout_information(mixture, held_out, 0.2, generator=generator)[0]) > 2.2
        True

    Source: Maurer and Pontil, "Empirical Bernstein bounds and sample-variance penalization", COLT 2009, Theorem 4.
    """
    if not (0 < delta < 1 and 0 < share < 1 and 0 < radius < math.inf):
        raise ValueError(
            f"delta and share must lie between 0 and 1, and radius must be positive, got {delta}, {share} and {radius}"
        )
    s2 = _noise_variance(noise_std, _means(mixture), releases)
    x = _rows(mixture, features)
    count, dimension = x.shape
    means, spread, pi = _with_noise(mixture, s2)
    center = (pi.unsqueeze(1) * means).sum(0)
    furthest = float((x - center).square().sum(1).max().sqrt())
    if furthest > radius:
        raise ValueError(f"features must lie within the radius {radius:.4g} of the center, got one at {furthest:.4g}")
    s2 = s2.expand(dimension)
    broad = s2 + radius**2 / dimension
    z = _noisy(x, s2, generator)
    inside = mixture_log_prob(z, means.unsqueeze(0), spread.unsqueeze(0), pi.unsqueeze(0))
    log_q = torch.logaddexp(math.log1p(-share) + inside, math.log(share) + _log_normal(z - center, broad))
    most = -math.log(share) + 0.5 * float((broad / s2).log().sum()) + 0.5 * dimension
    least = -4 * math.sqrt(dimension / 2)  # four standard deviations of the noise's own log-density
    ratio = (_log_normal(z - x, s2) - log_q).clamp_min(least)
    logarithm = math.log(2 / delta)
    slack = (2 * ratio.var() * logarithm / count).sqrt() + 7 * (most - least) * logarithm / (3 * (count - 1))
    return ratio.mean() + slack


def fisher_information(
    encoder: Callable[[Tensor], Tensor],
    images: Tensor,
    noise_std: float | Tensor,
    *,
    releases: int = 1,
    draws: int = 8,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Fisher information of the release about each image, per pixel (dFIL), for Gaussian noise on the features.

    ``dFIL(x) = tr(J' diag(1 / s2) J) / d``, with the Jacobian ``J`` of the features and d pixels

    The mean squared error of an attack is at least ``1 / dFIL(x)`` if it is unbiased: if its reconstructions of x are right on average over
    the noise. Attacks that know what images look like are biased, and may err less. The trace is estimated from products of the Jacobian
    with random vectors ``u``, ``E |J' u / s|^2``.

    Args:
        encoder: function from images to features of any shape, differentiable, and each image on its own.
        images: ``[N, ...]``, in [0, 1] for an error of pixels in [0, 1].
        noise_std: standard deviation of the noise, a number or ``[D]``.
        releases: messages of one image with independent noise.
        draws: random vectors per image.
        generator: source of the random vectors.

    Returns:
        ``[N]`` float64, in units of one over the square of a pixel's.

    Raises:
        ValueError: noise_std is not positive or does not fit, or the features have no gradient.

    Example:
        >>> import torch
        >>> from cem_fast import bounds
        >>> images = torch.rand(5, 1, 4, 4)
        >>> bounds.fisher_information(lambda x: 2 * x, images, 0.5, generator=torch.Generator().manual_seed(0)).mean() > 10  # 2^2 / 0.5^2
        tensor(True)

    Source: Maeng et al., "Bounding the invertibility of privacy-preserving instance encoding using Fisher information", NeurIPS 2023
        (arXiv 2305.04146).
    """
    require_count("draws", draws)
    with torch.enable_grad():
        pixels = images.detach().requires_grad_()
        features = encoder(pixels)
        if not features.requires_grad:
            raise ValueError("encoder must be differentiable, got features without a gradient")
        std = _noise_variance(noise_std, features.detach().flatten(1), releases).sqrt().to(features.dtype)
        total = torch.zeros(len(images), dtype=torch.float64, device=images.device)
        for draw in range(draws):
            vectors = torch.randn(features.shape, dtype=features.dtype, device=features.device, generator=generator)
            scaled = (vectors.flatten(1) / std).view_as(features)
            (product,) = torch.autograd.grad(features, pixels, scaled, retain_graph=draw < draws - 1)
            total += product.flatten(1).double().square().mean(1)
    return total / draws


def _log_normal(deviations: Tensor, variances: Tensor) -> Tensor:
    """Log-density ``[N]`` of deviations ``[N, D]`` under independent Gaussians of variances ``[D]``."""
    return -0.5 * (deviations.square() / variances + (2 * math.pi * variances).log()).sum(1)


class Utility(NamedTuple):
    """Mean posteriors of the right component and of the right class, float64 scalars in [0, 1].

    Example:
        >>> import torch
        >>> from cem_fast import bounds
        >>> bounds.Utility(component=torch.tensor(0.5), label=torch.tensor(0.9)).label
        tensor(0.9000)
    """

    component: Tensor
    label: Tensor


@torch.no_grad()
def utility(
    mixture: GaussianMixture,
    features: Tensor,
    labels: Tensor | None,
    noise_std: float | Tensor,
    *,
    releases: int = 1,
    generator: torch.Generator | None = None,
) -> Utility:
    """Mean posterior of the right component, and of the right class, given noisy features.

    ``U = mean_n( sum_{i in R_n} pi_i N(z_n; mu_i, v_i + s2) / sum_i pi_i N(z_n; mu_i, v_i + s2) )`` with ``z_n = x_n + noise``

    For the component (Eq. 4), ``R_n`` is the component of the row's class with the mean nearest to ``x_n``. For the class,
    ``R_n`` holds all components of the row's class.

    Args:
        mixture: fitted mixture of clean features.
        features: clean features ``[N, ...]``, N >= 1; trailing dimensions are flattened.
        labels: class of each row ``[N]``, integer; None for a mixture of one class, whose posterior is 1.
        noise_std: standard deviation of the noise, a number or ``[D]``.
        releases: messages of one input with independent noise.
        generator: source of the noise.

    Returns:
        Both means, each in [0, 1].

    Raises:
        RuntimeError: the mixture is not fitted.
        ValueError: an argument does not fit.

    Example:
        >>> import torch
        >>> from cem_fast import GaussianMixture, bounds
        >>> features, labels = torch.tensor([[0.0], [1.0], [10.0], [11.0]]), torch.tensor([0, 0, 1, 1])
        >>> mixture = GaussianMixture(num_components=1, num_classes=2).fit(features, labels)
        >>> bounds.utility(mixture, features, labels, 0.1).label
        tensor(1., dtype=torch.float64)

    Source: Eq. 4 of Xia et al., CVPR 2025, over rows instead of over the mixture's own samples.
    """
    s2 = _noise_variance(noise_std, _means(mixture), releases)
    x = _rows(mixture, features, least=1)
    means, spread, pi = _with_noise(mixture, s2)
    nearest = component_statistics(x, mixture.means.double(), labels).assignment
    z = _noisy(x, s2, generator)
    log_q = mixture_log_prob(z, means.unsqueeze(0), spread.unsqueeze(0), pi.unsqueeze(0))
    index = nearest if labels is None else labels.long() * mixture.num_components + nearest
    by_component = mixture_log_prob(z, means.unsqueeze(1), spread.unsqueeze(1), pi.unsqueeze(1), index)
    C, K = mixture.weights.shape
    by_label = mixture_log_prob(z, means.view(C, K, -1), spread.view(C, K, -1), pi.view(C, K), labels)
    return Utility(*((each - log_q).exp().mean() for each in (by_component, by_label)))


def _rows(mixture: GaussianMixture, features: Tensor, least: int = 2) -> Tensor:
    """Features as float64 rows ``[N, D]`` that fit the mixture, at least 2 for a standard error."""
    validate.rows("features", features)
    if len(features) < least:
        raise ValueError(f"features must have shape [N, ...] with N of at least {least}, got {tuple(features.shape)}")
    rows = features.detach().flatten(1).double()
    validate.features(rows, mixture.means.double(), "features")
    return rows


def _noisy(rows: Tensor, noise_variance: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(rows.shape, dtype=rows.dtype, device=rows.device, generator=generator)
    return rows + noise_variance.sqrt() * noise


def _with_noise(mixture: GaussianMixture, noise_variance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means and variances ``[C K, D]`` of the mixture convolved with the noise, and its joint weights ``[C K]``, float64."""
    pi, variances = _per_dimension(mixture)
    return mixture.means.double().flatten(0, 1), (variances + noise_variance).contiguous(), pi


def mse_lower_bound(conditional_entropy: float | Tensor, dimension: int) -> Tensor:
    """Lower bound on the mean squared error per dimension of every attack: ``xi >= exp(2 H(x|z) / d) / (2 pi e)``.

    The error is the expectation over inputs. The bound does not apply to a single image, to perceptual similarity, or to labels.

    Args:
        conditional_entropy: ``H(x|z)`` in nats, of all features that the attacker has of one input.
        dimension: d, the number of input dimensions.

    Returns:
        The bound, a float64 tensor in squared units of x. Equality needs an isotropic Gaussian posterior.

    Raises:
        ValueError: dimension is not positive.

    Example:
        >>> import math
        >>> from cem_fast import bounds
        >>> bounds.mse_lower_bound(2 * 0.5 * math.log(2 * math.pi * math.e * 0.04), 2)  # two dimensions of variance 0.04
        tensor(0.0400, dtype=torch.float64)

    Source: Theorem 1 of Xia et al., CVPR 2025.
    """
    entropy = torch.as_tensor(conditional_entropy, dtype=torch.float64)
    require_count("dimension", dimension)
    return torch.exp(2 * entropy / dimension) / (2 * math.pi * math.e)


def relative_mse_floor(information: float | Tensor, dimension: int) -> Tensor:
    """Bound of Theorem 1 relative to its value without features: ``exp(-2 I / d)``.

    The entropy ``H(x)`` of images is unknown, so only this ratio can be computed for them. It needs the summed information,
    not the information per feature.

    Args:
        information: ``I(x; z)`` or an upper bound on it, in nats.
        dimension: d, the number of input dimensions.

    Returns:
        A float64 tensor in (0, 1].

    Raises:
        ValueError: dimension is not positive.

    Example:
        >>> from cem_fast import bounds
        >>> bounds.relative_mse_floor(100.0, 3 * 32 * 32)
        tensor(0.9370, dtype=torch.float64)

    Source: Theorems 1 and 2 of Xia et al., CVPR 2025.
    """
    require_count("dimension", dimension)
    return torch.exp(-2 * torch.as_tensor(information, dtype=torch.float64) / dimension)
