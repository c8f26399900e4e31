"""Gaussian mixtures of all classes at once."""

from cem_fast.mixture.model import GaussianMixture

__all__ = ["GaussianMixture"]
