"""Nearest neighbor among the attacker's own images: a control without any reconstruction."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import QUERIES, ClosedForm, Observe, Standardizer, require_fitted, require_images

CHUNK = 1024  # messages whose distances to all images are in memory together


class Nearest(ClosedForm):
    """Returns the image ``argmin_i E || (z - z_i) / sigma ||^2``, with the expectation over the noise of the attacker's own features.

    An attack whose error is no lower than that of this lookup has not reconstructed anything.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        draws: observations per image in the expectation.
        seed: seed of the noise.

    Raises:
        ValueError: ``draws`` is not positive.

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return torch.nn.functional.avg_pool2d(images, 2)
        >>> attack = attacks.Nearest(image_shape=(1, 8, 8))
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> torch.equal(attack.reconstruct(observe(images)), images)
        True
    """

    name = "nearest"
    knowledge = QUERIES

    @property
    def budget(self) -> str:
        return f"a lookup among its own images, each observed {self.draws} times"

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Observes the images; see :meth:`cem_fast.attacks.Attack.fit`.

        Raises:
            ValueError: there is no image.
        """
        require_images(self, images, 1)
        with seeded(self.seed, "nearest attack"):
            observations = torch.stack([observe(images).flatten(1) for _ in range(self.draws)])
        self.standardize = Standardizer(observations.flatten(0, 1))
        observations = self.standardize(observations)
        self.images = images
        self.centers = observations.mean(0)  # [N, D]
        self.norms = observations.square().sum(2).mean(0)  # [N], E ||z_i||^2

    def reconstruct(self, features: Tensor) -> Tensor:
        found = self.lookup(features)  # refuses an attack that is not fitted
        return self.images[found]

    def lookup(self, features: Tensor) -> Tensor:
        """Returns the index of the attacker's image with the nearest features, ``[N]`` int64.

        Args:
            features: released features ``[N, ...]``.

        Raises:
            RuntimeError: ``fit`` was not called.
        """
        require_fitted(self, "images")
        found = []
        for part in features.split(CHUNK):
            # || z - z_i ||^2 without || z ||^2, which does not depend on i
            distances = self.norms - 2 * self.standardize(part.flatten(1)) @ self.centers.T
            found.append(distances.argmin(1))
        return torch.cat(found)
