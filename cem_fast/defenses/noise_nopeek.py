"""Gaussian noise with NoPeek."""

from __future__ import annotations

from cem_fast.defenses.composed import Composed
from cem_fast.defenses.distance_correlation import DistanceCorrelation
from cem_fast.defenses.noise import GaussianNoise


class NoiseNoPeek(Composed):
    """Releases features with Gaussian noise; trains the encoder for a low distance correlation of images and noisy features.

    Args:
        nopeek_weight: weight of the penalty, positive.
        noise_std: standard deviation of the noise, positive, in the unit of the features.
        train_noise_std: standard deviation of the noise in training mode; None for ``noise_std``.
        secure: as for :class:`cem_fast.defenses.GaussianNoise`.

    Source:
        Titcombe et al., "Practical defences against model inversion attacks for split neural networks", ICLR workshop 2021, of
        :class:`cem_fast.defenses.GaussianNoise` and :class:`cem_fast.defenses.DistanceCorrelation`.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> defense = defenses.NoiseNoPeek(nopeek_weight=1.0, noise_std=0.1)
        >>> features = torch.zeros(100_000)
        >>> round(defense.release(features).std().item(), 2)
        0.1
    """

    def __init__(
        self, *, nopeek_weight: float, noise_std: float, train_noise_std: float | None = None, secure: bool = False
    ):
        super().__init__(
            DistanceCorrelation(nopeek_weight=nopeek_weight),
            GaussianNoise(noise_std=noise_std, train_noise_std=train_noise_std),
        )
        self.secure = secure
