"""Gaussian noise on what leaves the device, in training and in use."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_fast.defenses.base import Defense


class GaussianNoise(Defense):
    """Releases ``z = features + noise_std * epsilon`` with ``epsilon ~ N(0, I)``, fresh at every call.

    Args:
        noise_std: standard deviation of the noise, in units of the features.

    Raises:
        ValueError: ``noise_std`` is not positive.

    Source:
        He, Zhang and Lee, "Model inversion attacks against collaborative inference", ACSAC 2019; Titcombe et al., "Practical defences
        against model inversion attacks for split neural networks", ICLR workshop 2021.
    """

    def __init__(self, *, noise_std: float):
        super().__init__()
        if not noise_std > 0:
            raise ValueError(f"noise_std must be positive, got {noise_std}")
        self.noise_std = noise_std

    def release(self, features: Tensor) -> Tensor:
        return features + self.noise_std * torch.randn_like(features)

    def before_noise(self, features: Tensor) -> Tensor:
        return features
