"""Separated clusters of several classes."""

import torch


def blobs(rows=600, dimension=5, classes=3, components=2, spread=0.05, seed=0):
    """Well separated clusters: rows, labels, the component of each row, and the centers."""
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, components, dimension, generator=g) * 3
    labels = torch.randint(0, classes, (rows,), generator=g)
    component = torch.randint(0, components, (rows,), generator=g)
    x = centers[labels, component] + spread * torch.randn(rows, dimension, generator=g)
    return x, labels, component, centers
