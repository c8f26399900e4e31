"""The loss and the clustering of the CEM authors' released training script, as its description has them.

A loop over the classes of a batch; in it one over samples, whose nearest centroid numpy finds, and one over clusters, each of
which waits for its count. Written from the description alone: it stands here as what users of that script pay today.
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
    """The regularizer of one batch: mean over its classes of ``sum_k w_yk relu(log(v + gamma) - log(tau s2 + gamma))``.

    Args:
        x: features ``[N, D]``.
        labels: class of each row ``[N]``.
        means: centroids ``[C, K, D]``.
        variances: of the last fit ``[C, K]``.
        weights: shares of the clusters ``[C, K]``.
        num_samples: size of the training set.
        noise_std: standard deviation of the noise.

    Returns:
        A scalar with a graph to x.
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
    """Lloyd's iterations, always ``ITERATIONS`` of them, class by class and cluster by cluster.

    Args:
        x: features ``[N, D]``.
        labels: class of each row ``[N]``.
        means: the centroids to start from ``[C, K, D]``.

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
