"""Dropout of features on their way to the cloud, in training and in use."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cem_fast.defenses.base import Defense


class FeatureDropout(Defense):
    """Releases every feature with probability ``1 - rate``, scaled by ``1 / (1 - rate)``, and a zero in its place otherwise.

    The choice is fresh at every call and never ends with training: what is dropped, the attacker does not see either.

    Args:
        dropout_rate: share of the features that is dropped on average.

    Raises:
        ValueError: ``dropout_rate`` is not between 0 and 1.

    Source:
        He, Zhang and Lee, "Attacking and protecting data privacy in edge-cloud collaborative inference systems", IEEE Internet of Things
        Journal 2021; Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 2014.
    """

    def __init__(self, *, dropout_rate: float):
        super().__init__()
        if not 0 < dropout_rate < 1:
            raise ValueError(f"dropout_rate must be between 0 and 1, got {dropout_rate}")
        self.dropout_rate = dropout_rate

    def release(self, features: Tensor) -> Tensor:
        return F.dropout(features, self.dropout_rate, training=True)
