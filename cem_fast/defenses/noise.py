"""Gaussian noise on released features, in training and at inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cem_fast._support.counts import require_number
from cem_fast.defenses.base import Defense


class GaussianNoise(Defense):
    """Releases ``z = features + noise_std * epsilon`` with ``epsilon ~ N(0, I)``, independent at every call.

    The mean of ``n`` releases of one image has noise of ``noise_std / sqrt(n)``: the stated level holds for one release.

    The noise comes from torch's generator, which is seedable and not cryptographic. Noise of a known seed can be subtracted. ``secure``
    takes the operating system's secure generator instead, with a sum of four draws for each number
    (:func:`cem_fast.defenses.secure.normal`).

    Args:
        noise_std: standard deviation of the noise, positive, in the unit of the features.
        train_noise_std: standard deviation of the noise in training mode; None for ``noise_std``.
        secure: whether the noise comes from the operating system's secure generator; not for evaluations.

    Raises:
        ValueError: ``noise_std`` is not positive and finite, or ``train_noise_std`` is negative or infinite.

    Source:
        He, Zhang and Lee, "Model inversion attacks against collaborative inference", ACSAC 2019; Titcombe et al., "Practical defences
        against model inversion attacks for split neural networks", ICLR workshop 2021.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> defense = defenses.GaussianNoise(noise_std=0.5)
        >>> features = torch.zeros(100_000)
        >>> round(defense.release(features).std().item(), 2)
        0.5
        >>> torch.equal(defense.before_noise(features), features)
        True
    """

    keeps_range = True

    def __init__(self, *, noise_std: float, train_noise_std: float | None = None, secure: bool = False):
        super().__init__()
        if not 0 < require_number("noise_std", noise_std) < math.inf:
            raise ValueError(f"noise_std must be positive, got {noise_std}")
        if train_noise_std is not None and not 0 <= require_number("train_noise_std", train_noise_std) < math.inf:
            raise ValueError(f"train_noise_std must be at least 0 or None, got {train_noise_std}")
        self.noise_std = noise_std
        self.train_noise_std = noise_std if train_noise_std is None else train_noise_std
        self.secure = secure

    def release(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        std = self.train_noise_std if self.training else self.noise_std
        return features + std * self.normal_like(features, generator)

    def before_noise(self, features: Tensor) -> Tensor:
        return features
