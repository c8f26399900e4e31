"""The weight of the CEM loss over training."""

from __future__ import annotations

import math

from cem_fast._support.counts import require_number

KINDS = ("constant", "official")


class CEMSchedule:
    """Weight (lambda) of the CEM loss at each epoch.

    ``constant`` is the weight itself. ``official`` is the rule of the authors' released code: ``weight * 0.001 / lr`` until the
    learning rate falls below ``4.1e-4``, then the weight. The loss is zero before its first fit, so no epoch is excluded.

    Args:
        weight: lambda, not negative.
        kind: ``constant`` or ``official``.

    Raises:
        ValueError: the weight is negative or not finite, or there is no such kind.

    Example:
        >>> from cem_fast import CEMSchedule
        >>> CEMSchedule(0.5).weight_at(epoch=3, learning_rate=0.05)
        0.5

    Source: lambda of Eq. 8 of Xia et al., CVPR 2025, and their released training code.
    """

    def __init__(self, weight: float, *, kind: str = "constant"):
        if not 0 <= require_number("weight", weight) < math.inf:
            raise ValueError(f"weight must be a number >= 0, got {weight}")
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.weight, self.kind = weight, kind

    def weight_at(self, *, epoch: int, learning_rate: float) -> float:
        """Weight at an epoch with a learning rate.

        Args:
            epoch: epoch, from 0.
            learning_rate: learning rate of the encoder at that epoch.

        Returns:
            The factor of the loss.

        Example:
            >>> from cem_fast import CEMSchedule
            >>> official = CEMSchedule(16.0, kind="official")
            >>> official.weight_at(epoch=0, learning_rate=0.05), official.weight_at(epoch=200, learning_rate=0.0004)
            (0.32, 16.0)
        """
        if self.kind == "official" and learning_rate >= 4.1e-4:
            return self.weight * 0.001 / learning_rate
        return self.weight
