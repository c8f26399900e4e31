"""Gaussian noise together with NoPeek."""

from __future__ import annotations

from cem_fast.defenses.composed import Composed
from cem_fast.defenses.distance_correlation import DistanceCorrelation
from cem_fast.defenses.noise import GaussianNoise


class NoiseNoPeek(Composed):
    """Releases noisy features, whose distance correlation with the images is kept low.

    Args:
        nopeek_weight: weight of the penalty.
        noise_std: standard deviation of the noise, in units of the features.

    Source:
        Titcombe et al., "Practical defences against model inversion attacks for split neural networks", ICLR workshop 2021; the parts are
        those of :class:`GaussianNoise` and :class:`DistanceCorrelation`.
    """

    def __init__(self, *, nopeek_weight: float, noise_std: float):
        super().__init__(DistanceCorrelation(nopeek_weight=nopeek_weight), GaussianNoise(noise_std=noise_std))
