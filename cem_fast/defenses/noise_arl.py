"""Gaussian noise together with adversarial representation learning."""

from __future__ import annotations

from torch import Tensor

from cem_fast.defenses.adversarial import AdversarialRepresentation
from cem_fast.defenses.noise import GaussianNoise


class NoiseARL(AdversarialRepresentation):
    """Releases noisy features, and trains the encoder against a proxy decoder that sees them so.

    Args:
        noise_std: standard deviation of the noise, in units of the features.
        adversary_weight: weight of the penalty.
        seed: seed of the proxy's initial weights.

    Source:
        Both parts together are a defense of Xia et al., CVPR 2025 (Noise_ARL); the parts are those of :class:`GaussianNoise` and
        :class:`AdversarialRepresentation`.
    """

    def __init__(self, *, noise_std: float, adversary_weight: float, seed: int = 0):
        super().__init__(adversary_weight=adversary_weight, seed=seed)
        self.noise = GaussianNoise(noise_std=noise_std)

    def release(self, features: Tensor) -> Tensor:
        return self.noise.release(features)
