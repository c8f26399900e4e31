"""Dropout of released features, in training and at inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from cem_fast._support.counts import require_number
from cem_fast.defenses.base import Defense, gaussian_log_density


class FeatureDropout(Defense):
    """Releases every feature with probability ``1 - rate``, scaled by ``1 / (1 - rate)``, and zero otherwise.

    Each call drops features independently, at inference too, so that an attacker does not see them. Repeated releases of one image
    together show nearly all of them.

    Args:
        dropout_rate: expected share of the dropped features, between 0 and 1.
        secure: whether the operating system's secure generator chooses the features; not for evaluations.

    Raises:
        ValueError: ``dropout_rate`` is not between 0 and 1.

    Source:
        He, Zhang and Lee, "Attacking and protecting data privacy in edge-cloud collaborative inference systems", IEEE Internet of Things
        Journal 2021; Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 2014.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> defenses.FeatureDropout(dropout_rate=0.5).eval().release(torch.ones(1, 1000)).unique()
        tensor([0., 2.])
    """

    def __init__(self, *, dropout_rate: float, secure: bool = False):
        super().__init__()
        if not 0 < require_number("dropout_rate", dropout_rate) < 1:
            raise ValueError(f"dropout_rate must be between 0 and 1, got {dropout_rate}")
        self.dropout_rate, self.secure = dropout_rate, secure

    def release(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if generator is None and not self.secure:
            return F.dropout(features, self.dropout_rate, training=True)
        kept = self.uniform_like(features, generator) >= self.dropout_rate
        return torch.where(kept, features / (1 - self.dropout_rate), 0.0)

    def log_likelihood(self, released: Tensor, features: Tensor, *, noise_std: float = 0.0) -> Tensor:
        """Returns ``sum log[(1 - p) N(z; f / (1 - p), s**2) + p N(z; 0, s**2)]`` with s the noise added afterwards.

        See :meth:`cem_fast.defenses.Defense.log_likelihood`.
        """
        if noise_std == 0:
            raise NotImplementedError("dropped features have no density without noise: add some after the dropout")
        kept = math.log1p(-self.dropout_rate) + gaussian_log_density(
            released - features / (1 - self.dropout_rate), noise_std
        )
        dropped = math.log(self.dropout_rate) + gaussian_log_density(released, noise_std)
        return torch.logaddexp(kept, dropped).flatten(1).sum(1)
