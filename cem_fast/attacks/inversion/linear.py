"""A linear reconstruction, from which the networks of the inversion attack start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cem_fast.attacks.warps import warped

MOST = 2048  # features, at most
WEIGHTS = 2**26  # weights, at most: 256 MB
ROWS = 8  # images to learn from per feature
LEAST_ROWS = 2048
CHUNK = 512  # images whose features are computed at once
PENALTY = 0.01  # of the squared weights, in units of the features' variance


class Linear:
    """Ridge regression from features to images, learned from warped images with fresh noise.

    There are many more warped images than features. The error on the attacker's images is then that on other images, and a network can
    learn from it.

    Args:
        features: function from images ``[N, C, H, W]`` to standardized features of one release, ``[N, ...]``.
        images: the attacker's images ``[N, C, H, W]``.
        mean: image that is subtracted, ``[C, H, W]``.
        mirror: whether mirrored images are images of the same kind.

    Source:
        Hoerl and Kennard, "Ridge regression: biased estimation for nonorthogonal problems", Technometrics 1970.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.inversion.linear import Linear
        >>> images = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> linear = Linear(lambda x: 4 * (x - 0.5), images, images.mean(0), mirror=True)
        >>> bool((images.mean(0) + linear(4 * (images - 0.5)) - images).abs().mean() < 0.05)
        True
    """

    def __init__(self, features: Callable[[Tensor], Tensor], images: Tensor, mean: Tensor, *, mirror: bool):
        width = features(images[:1]).numel()
        rows = max(ROWS * width, LEAST_ROWS)
        gram = torch.eye(width, dtype=torch.float64, device=images.device) * (PENALTY * rows)
        product = torch.zeros(width, mean.numel(), dtype=torch.float64, device=images.device)
        for start in range(0, rows, CHUNK):
            count = min(CHUNK, rows - start)
            looks = warped(
                images[torch.arange(start, start + count, device=images.device) % len(images)], mirror=mirror
            )
            flat = features(looks).flatten(1).double()
            gram += flat.T @ flat
            product += flat.T @ (looks - mean).flatten(1).double()
        self.shape = mean.shape
        self.weights = torch.cholesky_solve(product, torch.linalg.cholesky(gram)).float()

    @staticmethod
    def fits(width: int, pixels: int) -> bool:
        """Returns whether features and images are small enough.

        Args:
            width: number of features.
            pixels: number of values of an image.
        """
        return width <= MOST and width * pixels <= WEIGHTS

    def __call__(self, features: Tensor) -> Tensor:
        """Returns images without their mean ``[N, C, H, W]``.

        Args:
            features: standardized features ``[N, ...]``.
        """
        return (features.flatten(1).float() @ self.weights).view(-1, *self.shape)
