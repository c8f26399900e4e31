"""Gaussian noise with adversarial representation learning."""

from __future__ import annotations

from cem_fast.defenses.adversarial import AdversarialRepresentation
from cem_fast.defenses.composed import Composed
from cem_fast.defenses.noise import GaussianNoise


class NoiseARL(Composed):
    """Releases features with Gaussian noise; trains the encoder against a proxy decoder of the noisy features.

    Args:
        adversary_weight: weight of the penalty, positive.
        noise_std: standard deviation of the noise, positive, in the unit of the features.
        train_noise_std: standard deviation of the noise in training mode; None for ``noise_std``.
        seed: seed of the proxy's initial weights.
        secure: as for :class:`cem_fast.defenses.GaussianNoise`.

    Source:
        Xia et al., CVPR 2025 (Noise_ARL), of :class:`cem_fast.defenses.GaussianNoise` and
        :class:`cem_fast.defenses.AdversarialRepresentation`.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> defense = defenses.NoiseARL(adversary_weight=1.0, noise_std=0.1)
        >>> features = torch.zeros(100_000)
        >>> round(defense.release(features).std().item(), 2)
        0.1
    """

    def __init__(
        self,
        *,
        adversary_weight: float,
        noise_std: float,
        train_noise_std: float | None = None,
        seed: int = 0,
        secure: bool = False,
    ):
        super().__init__(
            AdversarialRepresentation(adversary_weight=adversary_weight, seed=seed),
            GaussianNoise(noise_std=noise_std, train_noise_std=train_noise_std),
        )
        self.secure = secure
