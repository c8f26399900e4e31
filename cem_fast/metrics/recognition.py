"""Whose image a reconstruction is taken for: a classifier of clean images, asked about rebuilt ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PENALTIES = torch.logspace(-6, 2, 25, dtype=torch.float64)
MAX_IMAGES = 5000  # what it learns from, at the most: it has to be quick, not the best classifier there is


class Recognizer:
    """Names the class of an image by ridge regression from pixels to classes.

    ``class(x) = argmax_c ( b_c + (x - mean) . w_c )``; the penalty is the one with the least squared error on images left out in turn.

    Args:
        images: clean images ``[N, C, H, W]`` that the attacker holds; where there are more than 5000, it learns from as many of them.
        labels: their classes ``[N]``, int64.

    Raises:
        ValueError: there are fewer than 2 images, or the lengths differ.

    Source:
        Hoerl and Kennard, "Ridge regression: biased estimation for nonorthogonal problems", Technometrics 1970; Allen, "The relationship
        between variable selection and data augmentation and a method for prediction", Technometrics 1974 (images left out in turn).
    """

    def __init__(self, images: Tensor, labels: Tensor):
        if images.dim() != 4 or labels.shape != images.shape[:1] or len(images) < 2:
            raise ValueError(
                f"images [N, C, H, W] and labels [N] must agree with N > 1, got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:MAX_IMAGES].to(images.device)
        pixels, wanted = images[chosen].flatten(1).double(), F.one_hot(labels)[chosen].double()
        self.mean, self.intercept = pixels.mean(0), wanted.mean(0)
        pixels, wanted = pixels - self.mean, wanted - self.intercept
        # pixels = left diag(sqrt(values)) right^T, from the smaller of the two Gram matrices
        wide = len(pixels) < pixels.shape[1]
        values, vectors = torch.linalg.eigh(pixels @ pixels.T if wide else pixels.T @ pixels)
        kept = values > 1e-10 * values[-1]
        values, vectors = values[kept], vectors[:, kept]
        left = vectors if wide else pixels @ vectors / values.sqrt()
        coordinates, unit = left.T @ wanted, values.mean()
        errors = []
        for penalty in PENALTIES:
            shrunk = values / (values + penalty * unit)
            residuals = wanted - left @ (shrunk[:, None] * coordinates)
            influence = left.square() @ shrunk + 1 / len(
                pixels
            )  # of an image on its own answer, the intercept's included
            errors.append((residuals / (1 - influence).clamp_min(1e-12)[:, None]).square().mean())
        penalty = PENALTIES[int(torch.stack(errors).nan_to_num(torch.inf).argmin())]
        self.weights = pixels.T @ (left @ (coordinates / (values + penalty * unit)[:, None]))

    def names(self, images: Tensor) -> Tensor:
        """Returns the class that each of the images ``[N, C, H, W]`` is taken for, ``[N]`` int64."""
        pixels = images.flatten(1).to(self.weights)
        return (self.intercept + (pixels - self.mean) @ self.weights).argmax(1)

    def rate(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images ``[N, C, H, W]`` that are taken for their own class ``[N]``, a number in [0, 1].

        Raises:
            ValueError: the lengths differ, or there is no image.
        """
        if labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"images [N, C, H, W] and labels [N] must agree with N > 0, got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        return float((self.names(images) == labels.to(self.weights.device)).double().mean())


def chance(labels: Tensor) -> float:
    """Rate of always naming the most frequent of the classes ``[N]``."""
    return float(torch.bincount(labels).double().max() / len(labels))
