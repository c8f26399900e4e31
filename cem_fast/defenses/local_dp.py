"""The mechanisms of local differential privacy: clipped features with noise calibrated to a privacy budget."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cem_fast._support.counts import require_number
from cem_fast._support.lookup import lookup
from cem_fast.defenses import secure
from cem_fast.defenses.base import Defense, gaussian_log_density

NORMS = {"gaussian": 2, "laplace": 1}  # order of the norm in which each mechanism measures sensitivity


def gaussian_scale(*, epsilon: float, delta: float, sensitivity: float) -> float:
    """The least standard deviation of Gaussian noise that is ``(epsilon, delta)``-differentially private.

    ``Phi(s / 2 sigma - epsilon sigma / s) - exp(epsilon) Phi(-s / 2 sigma - epsilon sigma / s) = delta``

    It holds for every epsilon; the textbook's ``sqrt(2 log(1.25 / delta)) s / epsilon`` only below 1.

    Args:
        epsilon: positive.
        delta: between 0 and 1.
        sensitivity: s, the greatest Euclidean distance between the noiseless releases of any two inputs.

    Returns:
        sigma, in the unit of ``sensitivity``.

    Source:
        Balle and Wang, "Improving the Gaussian mechanism for differential privacy: analytical calibration and optimal denoising", ICML
        2018, Theorem 8.

    Example:
        >>> from cem_fast.defenses.local_dp import gaussian_scale
        >>> round(gaussian_scale(epsilon=1.0, delta=1e-5, sensitivity=1.0), 3)
        3.731
    """

    def excess(sigma: float) -> float:
        points = [0.5 / sigma - epsilon * sigma, -0.5 / sigma - epsilon * sigma]
        above, below = torch.special.log_ndtr(torch.tensor(points, dtype=torch.float64, device="cpu")).tolist()
        return math.exp(above) - math.exp(epsilon + below) - delta

    low, high = 1.0, 1.0
    while excess(low) <= 0:
        low /= 2
    while excess(high) > 0:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high * sensitivity


class LocalDP(Defense):
    """Releases ``z = features * min(1, clip / norm) + noise``, ``(epsilon, delta)``-differentially private for any two images.

    The features of one image are scaled as a whole to a norm of at most ``clip``: Euclidean for Gaussian noise, the sum of magnitudes for
    Laplace noise (for which delta is 0). The distance of two images' features is then at most ``2 clip``, which is the sensitivity.

    At the budgets at which features can still be classified, around 200, this is a noise heuristic. Differential privacy at
    ``epsilon = 200`` bounds the ratio of two images' likelihoods by ``exp(200)`` and so gives no meaningful guarantee; single digits do.

    The budget holds for one release of an image, in exact arithmetic, and with perfect noise. Every further release of the same image
    spends it again; the mean of ``n`` releases has noise of ``scale / sqrt(n)``. The noise comes from torch's generator, which is seedable
    and not cryptographic: it serves experiments. ``secure`` takes the operating system's secure generator instead: a sum of four draws for
    Gaussian noise, and exact sums on a grid for Laplace noise (:func:`cem_fast.defenses.secure.laplace`).

    Args:
        privacy_mechanism: ``gaussian`` or ``laplace``.
        privacy_epsilon: epsilon; smaller is more private.
        privacy_delta: delta, for ``gaussian`` only.
        privacy_clip: greatest norm of an image's features.
        secure: whether the noise comes from the operating system's secure generator; not for evaluations.

    Attributes:
        scale: standard deviation of the Gaussian noise, or mean magnitude of the Laplace noise.

    Raises:
        ValueError: the mechanism is unknown, or another setting is out of range.

    Source:
        Dwork and Roth, "The algorithmic foundations of differential privacy", 2014, sections 3.3 and A; Ryu et al., "Can differential
        privacy practically protect collaborative deep learning inference for the Internet of Things?", 2021 (for features; it finds
        useful values of epsilon between 100 and 200).

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> settings = {"privacy_mechanism": "laplace", "privacy_epsilon": 200.0, "privacy_delta": 0.0}
        >>> defense = defenses.LocalDP(**settings, privacy_clip=10.0)
        >>> defense.scale
        0.1
        >>> defense.release(torch.rand(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        *,
        privacy_mechanism: str,
        privacy_epsilon: float,
        privacy_delta: float,
        privacy_clip: float,
        secure: bool = False,
    ):
        super().__init__()
        self.norm = lookup("privacy_mechanism", privacy_mechanism, NORMS)
        for key, value in (("privacy_epsilon", privacy_epsilon), ("privacy_clip", privacy_clip)):
            if not 0 < require_number(key, value) < math.inf:
                raise ValueError(f"{key} must be positive and finite, got {value}")
        if privacy_mechanism == "gaussian" and not 0 < require_number("privacy_delta", privacy_delta) < 1:
            raise ValueError(f"privacy_delta must be between 0 and 1, got {privacy_delta}")
        self.clip, self.mechanism, self.secure = privacy_clip, privacy_mechanism, secure
        if privacy_mechanism == "gaussian":
            self.scale = gaussian_scale(epsilon=privacy_epsilon, delta=privacy_delta, sensitivity=2 * privacy_clip)
        else:
            self.scale = 2 * privacy_clip / privacy_epsilon

    def clipped(self, features: Tensor) -> Tensor:
        """Returns the features, each image's scaled down to a norm of at most ``clip``.

        Args:
            features: ``[N, ...]``.

        Example:
            >>> import torch
            >>> from cem_fast import defenses
            >>> settings = {"privacy_mechanism": "gaussian", "privacy_epsilon": 200.0, "privacy_delta": 1e-4}
            >>> defenses.LocalDP(**settings, privacy_clip=1.0).clipped(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
            tensor([[0.6000, 0.8000],
                    [0.3000, 0.4000]])
        """
        norms = torch.linalg.vector_norm(features.flatten(1), ord=self.norm, dim=1)
        return features * (self.clip / norms.clamp_min(self.clip)).view(-1, *[1] * (features.dim() - 1))

    def release(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        clipped = self.clipped(features)
        if self.mechanism == "gaussian":
            return clipped + self.scale * self.normal_like(features, generator)
        if self.is_secure(generator):
            return secure.laplace(clipped, self.scale)
        first, second = (torch.empty_like(features).exponential_(generator=generator) for _ in range(2))
        return clipped + self.scale * (first - second)

    def log_likelihood(self, released: Tensor, features: Tensor, *, noise_std: float = 0.0) -> Tensor:
        """Returns the log-density of the mechanism's noise, and of later Gaussian noise, about the clipped features.

        Laplace noise of scale b plus Gaussian noise of standard deviation s has the density
        ``exp(s**2 / 2 b**2) [exp(-d / b) Phi(d / s - s / b) + exp(d / b) Phi(-d / s - s / b)] / 2 b`` at a deviation d.
        See :meth:`cem_fast.defenses.Defense.log_likelihood`.

        Source:
            Reed, "The normal-Laplace distribution and its relatives", in Advances in Distribution Theory, Order Statistics, and Inference,
            2006.
        """
        deviations = released - self.clipped(features)
        if self.mechanism == "gaussian":
            density = gaussian_log_density(deviations, math.hypot(self.scale, noise_std))
        elif noise_std == 0:
            density = -deviations.abs() / self.scale - math.log(2 * self.scale)
        else:
            ratio, standard = noise_std / self.scale, deviations / noise_std
            density = (
                torch.logaddexp(
                    torch.special.log_ndtr(standard - ratio) - ratio * standard,
                    torch.special.log_ndtr(-standard - ratio) + ratio * standard,
                )
                + ratio**2 / 2
                - math.log(2 * self.scale)
            )
        return density.flatten(1).sum(1)
