"""NoPeek: training of the encoder for a low distance correlation of images and released features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cem_fast._support.counts import require_number
from cem_fast.defenses.base import Defense


def distance_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Distance correlation of two samples: agreement of the distances between rows of one with those of the other.

    ``R = sqrt( V2(x, z) / sqrt(V2(x, x) V2(z, z)) )`` with ``V2(x, z) = mean_ij A_ij B_ij``

    A and B are the doubly centered matrices of Euclidean distances between rows: minus row means and column means, plus the total mean.

    Args:
        first: ``[N, ...]``; trailing dimensions are flattened.
        second: ``[N, ...]``, floating point like ``first``.

    Returns:
        A scalar in [0, 1]: 1 where one sample is the other one scaled and rotated; 0 where either sample is constant. For few rows it is
        above zero even for independent samples. Differentiable everywhere.

    Raises:
        ValueError: the samples have different numbers of rows, or none.

    Source:
        Szekely, Rizzo and Bakirov, "Measuring and testing dependence by correlation of distances", Annals of Statistics 2007, Def. 5.

    Example:
        >>> import torch
        >>> from cem_fast.defenses.distance_correlation import distance_correlation
        >>> x = torch.arange(8.0).view(4, 2)
        >>> distance_correlation(x, 3 * x + 1)
        tensor(1.)
    """
    if len(first) != len(second) or not len(first):
        raise ValueError(f"both samples must have as many rows, at least 1, got {len(first)} and {len(second)}")
    a, b = _centered_distances(first), _centered_distances(second)
    shared, own = (a * b).mean(), a.square().mean() * b.square().mean()
    # The gradient of a square root is infinite at zero: for constant or independent samples neither root is taken.
    varies = own > torch.finfo(own.dtype).tiny
    squared = shared / torch.where(varies, own, 1.0).sqrt()
    dependent = varies & (squared > torch.finfo(own.dtype).eps)
    return torch.where(dependent, torch.where(dependent, squared, 1.0).sqrt(), 0.0)


class DistanceCorrelation(Defense):
    """Adds ``weight * R(images, released features)`` to the loss of every batch; features are released unchanged.

    Args:
        nopeek_weight: weight of the penalty, positive.

    Raises:
        ValueError: ``nopeek_weight`` is not positive and finite.

    Source:
        Vepakomma et al., "NoPeek: information leakage reduction to share activations in distributed deep learning", ICDM workshops 2020.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> defense = defenses.DistanceCorrelation(nopeek_weight=2.0)
        >>> images = torch.arange(16.0).view(4, 1, 2, 2)
        >>> released = defense.release(0.5 * images)
        >>> defense.penalty(images, released, released, torch.zeros(4))
        tensor(2.)
    """

    keeps_range = True

    def __init__(self, *, nopeek_weight: float):
        super().__init__()
        if not 0 < require_number("nopeek_weight", nopeek_weight) < math.inf:
            raise ValueError(f"nopeek_weight must be positive and finite, got {nopeek_weight}")
        self.nopeek_weight = nopeek_weight

    def penalty(self, images: Tensor, features: Tensor, released: Tensor, labels: Tensor) -> Tensor:
        return self.nopeek_weight * distance_correlation(images, released)


def _centered_distances(sample: Tensor) -> Tensor:
    rows = sample.flatten(1)
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")  # zero where rows are equal
    return distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean()
