"""The attacker's own image whose features are nearest: a control that rebuilds nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import QUERIES, ClosedForm, Observe, Standardizer, require_fitted, require_images


class Nearest(ClosedForm):
    """Answers with the image ``argmin_i E || (z - z_i) / sigma ||^2``, the expectation over the noise in the attacker's own features.

    What it gets right, any lookup gets right: an attack that does no better has not rebuilt anything.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        draws: observations of every image that the expectation is taken over.
        seed: seed of the noise.

    Raises:
        ValueError: ``draws`` is not positive.
    """

    name = "nearest"
    knowledge = QUERIES

    @property
    def budget(self) -> str:
        return f"a lookup among its own images, each observed {self.draws} times"

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Observes the images; see :meth:`cem_fast.attacks.base.Attack.fit`.

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
        require_fitted(self, "images")
        # || z - z_i ||^2 but for || z ||^2, which all of them share
        distances = self.norms - 2 * self.standardize(features.flatten(1)) @ self.centers.T
        return self.images[distances.argmin(1)]
