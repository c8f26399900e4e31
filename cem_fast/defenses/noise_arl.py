"""Gaussian noise together with adversarial representation learning."""

from __future__ import annotations

from cem_fast.defenses.adversarial import AdversarialRepresentation
from cem_fast.defenses.composed import Composed
from cem_fast.defenses.noise import GaussianNoise


class NoiseARL(Composed):
    """Releases noisy features, and trains the encoder against a proxy decoder that sees them so.

    Args:
        adversary_weight: weight of the penalty.
        noise_std: standard deviation of the noise, in units of the features.
        seed: seed of the proxy's initial weights.

    Source:
        Both parts together are a defense of Xia et al., CVPR 2025 (Noise_ARL); the parts are those of :class:`GaussianNoise` and
        :class:`AdversarialRepresentation`.
    """

    def __init__(self, *, adversary_weight: float, noise_std: float, seed: int = 0):
        super().__init__(
            AdversarialRepresentation(adversary_weight=adversary_weight, seed=seed), GaussianNoise(noise_std=noise_std)
        )
