"""The weight of the CEM loss over training."""

from __future__ import annotations

import math

KINDS = ("constant", "official")


class CEMSchedule:
    """Weight (lambda) of the CEM loss at each epoch.

    ``constant``: the weight itself. ``official``, the authors' released code: ``weight * 0.001 / lr`` until the learning
    rate falls below ``4.1e-4``, then the weight. The loss is zero before its first fit, so no epoch needs an exception.

    Args:
        weight: lambda, not negative.
        kind: ``constant`` or ``official``.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Source: lambda of Eq. 8 of Xia et al., CVPR 2025, and their released training code.
    """

    def __init__(self, weight: float, *, kind: str = "constant"):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be a number >= 0, got {weight}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.weight, self.kind = weight, kind

    def weight_at(self, *, epoch: int, learning_rate: float) -> float:
        """Returns the weight in force at an epoch (counted from 0) with this learning rate."""
        if self.kind == "official" and learning_rate >= 4.1e-4:
            return self.weight * 0.001 / learning_rate
        return self.weight
