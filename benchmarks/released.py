"""Loss and clustering of the training script released by the CEM authors, written from its description.

A loop over the classes of a batch contains a loop over samples, whose nearest centroid numpy finds, and a loop over
clusters, each of which waits for its count. The benchmark compares with it because users of that script pay its cost.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

GAMMA, THRESHOLD, BOOST = 0.01, 0.125, 10.0
ITERATIONS = 50


def loss(
    x: Tensor, labels: Tensor, means: Tensor, variances: Tensor, weights: Tensor, num_samples: float, noise_std: float
) -> Tensor:
    """Regularizer of a batch: mean over its classes of ``sum_k w_yk relu(log(v + gamma) - log(tau s2 + gamma))``.

    Args:
        x: features ``[N, D]``.
        labels: class of each row ``[N]``.
        means: centroids ``[C, K, D]``.
        variances: variances of the last fit ``[C, K]``.
        weights: cluster weights ``[C, K]``.
        num_samples: size of the training set.
        noise_std: standard deviation of the noise.

    Returns:
        A scalar, differentiable in x.

    Example:
        >>> import torch
        >>> from cem_fast.benchmarks import released
        >>> x, labels, means = torch.ones(4, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(1, 1, 2)
        >>> released.loss(x, labels, means, torch.ones(1, 1), torch.ones(1, 1), num_samples=100, noise_std=0.1)
        tensor(4.4973)
    """
    C, K, _ = means.shape
    floor = math.log(THRESHOLD * noise_std**2 + GAMMA)
    total, classes = x.new_zeros(()), labels.unique().tolist()
    for c in classes:
        rows = x[labels == c]
        centroids = means[c].cpu().numpy()
        nearest = [int(np.argmin(((row - centroids) ** 2).sum(1))) for row in rows.detach().float().cpu().numpy()]
        member = torch.tensor(nearest, device=x.device)
        for k in range(K):
            of_cluster = rows[member == k]
            count = len(of_cluster)
            if count == 0:
                continue
            blend = BOOST * count / (float(weights[c, k]) * num_samples / C)
            blend = blend if blend < 1 else 0.99
            variance = blend * (of_cluster - means[c, k]).square().mean() + (1 - blend) * variances[c, k]
            total = total + weights[c, k] * torch.relu(torch.log(variance + GAMMA) - floor)
    return total / max(len(classes), 1)


def fit(x: Tensor, labels: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``ITERATIONS`` iterations of Lloyd's algorithm, one class and one cluster at a time.

    Args:
        x: features ``[N, D]``.
        labels: class of each row ``[N]``.
        means: initial centroids ``[C, K, D]``.

    Returns:
        Means, variances ``[C, K]`` and weights ``[C, K]``.
    """
    C, K, _ = means.shape
    means, variances, weights = means.clone(), x.new_ones(C, K), x.new_zeros(C, K)
    for c in range(C):
        rows = x[labels == c]
        for _ in range(ITERATIONS):
            nearest = torch.cdist(rows, means[c]).argmin(1)
            for k in range(K):
                of_cluster = rows[nearest == k]
                if len(of_cluster) > 0:
                    means[c, k] = of_cluster.mean(0)
        nearest = torch.cdist(rows, means[c]).argmin(1)
        for k in range(K):
            of_cluster = rows[nearest == k]
            if len(of_cluster) > 0:
                variances[c, k] = (of_cluster - means[c, k]).square().mean()
                weights[c, k] = len(of_cluster) / len(rows)
    return means, variances, weights
