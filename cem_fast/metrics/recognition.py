"""Re-identification rate: a classifier trained on clean images, applied to reconstructions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PENALTIES = torch.logspace(-6, 2, 25, dtype=torch.float64)
MAX_IMAGES = 5000  # training images, at most: a quick classifier, not the best one
MAX_NUMBERS = MAX_IMAGES * 64 * 64 * 3  # pixels of these images, at most


@dataclass(frozen=True)
class Rate:
    """Share of victims of which the attacker reads something right from their released features.

    Attributes:
        share: the share.
        chance: share that naming the most frequent answer for all would get right.

    Example:
        >>> from cem_fast.metrics.recognition import Rate
        >>> Rate(share=0.9, chance=0.1).share
        0.9
    """

    share: float
    chance: float


class Recognizer:
    """Ridge regression from pixels to classes.

    ``class(x) = argmax_c ( b_c + (x - mean) . w_c )``; the penalty is the one with the least squared leave-one-out error.

    Args:
        images: clean images ``[N, C, H, W]`` that the attacker holds; of more than 5000, a random 5000 are used, and of large images fewer.
        labels: their classes ``[N]``, int64.

    Raises:
        ValueError: there are fewer than 2 images, or the lengths differ.

    Source:
        Hoerl and Kennard, "Ridge regression: biased estimation for nonorthogonal problems", Technometrics 1970; Allen, "The relationship
        between variable selection and data augmentation and a method for prediction", Technometrics 1974 (leave-one-out error).

    Example:
        >>> import torch
        >>> from cem_fast.metrics.recognition import Recognizer
        >>> images = torch.eye(4).repeat(3, 1).view(12, 1, 2, 2)
        >>> Recognizer(images, torch.arange(12) % 4).rate(images, torch.arange(12) % 4)
        1.0
    """

    def __init__(self, images: Tensor, labels: Tensor):
        if images.dim() != 4 or labels.shape != images.shape[:1] or len(images) < 2:
            raise ValueError(
                f"images [N, C, H, W] and labels [N] must agree with N > 1, got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        most = max(2, min(MAX_IMAGES, MAX_NUMBERS // max(1, images[0].numel())))
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:most].to(images.device)
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
            )  # of an image on its own prediction, with the intercept
            errors.append((residuals / (1 - influence).clamp_min(1e-12)[:, None]).square().mean())
        penalty = PENALTIES[int(torch.stack(errors).nan_to_num(torch.inf).argmin())]
        self.weights = pixels.T @ (left @ (coordinates / (values + penalty * unit)[:, None]))

    def names(self, images: Tensor) -> Tensor:
        """Returns the predicted classes ``[N]``, int64.

        Args:
            images: ``[N, C, H, W]``.

        Example:
            >>> import torch
            >>> from cem_fast.metrics.recognition import Recognizer
            >>> images = torch.eye(4).repeat(3, 1).view(12, 1, 2, 2)
            >>> Recognizer(images, torch.arange(12) % 4).names(images[:4])
            tensor([0, 1, 2, 3])
        """
        pixels = images.flatten(1).to(self.weights)
        return (self.intercept + (pixels - self.mean) @ self.weights).argmax(1)

    def rate(self, images: Tensor, labels: Tensor) -> float:
        """Share of the images that are assigned to their own class.

        Args:
            images: ``[N, C, H, W]``.
            labels: their classes ``[N]``, int64.

        Returns:
            A number in [0, 1].

        Raises:
            ValueError: the lengths differ, or there is no image.

        Example:
            >>> import torch
            >>> from cem_fast.metrics.recognition import Recognizer
            >>> images = torch.eye(4).repeat(3, 1).view(12, 1, 2, 2)
            >>> Recognizer(images, torch.arange(12) % 4).rate(images[:2], torch.tensor([0, 3]))
            0.5
        """
        if labels.shape != images.shape[:1] or not len(labels):
            raise ValueError(
                f"images [N, C, H, W] and labels [N] must agree with N > 0, got {tuple(images.shape)} and {tuple(labels.shape)}"
            )
        return float((self.names(images) == labels.to(self.weights.device)).double().mean())


def chance(labels: Tensor) -> float:
    """Recognition rate of a constant guess, the most frequent class.

    Args:
        labels: classes ``[N]``, int64.

    Returns:
        A number in [0, 1].

    Example:
        >>> import torch
        >>> from cem_fast.metrics.recognition import chance
        >>> chance(torch.tensor([0, 1, 1, 2]))
        0.5
    """
    return float(torch.bincount(labels).double().max() / len(labels))
