"""Gaussian mixtures and k-means of all classes at once."""

from cem_fast.mixture.kmeans import KMeans
from cem_fast.mixture.model import GaussianMixture

__all__ = ["GaussianMixture", "KMeans"]
