"""Ridge regression from released features to pixels: the attack that takes a second."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import (
    HELD_OUT,
    QUERIES,
    ClosedForm,
    Observe,
    Standardizer,
    hold_out,
    require_fitted,
    require_images,
)

PENALTIES = torch.logspace(-6, 4, 41, dtype=torch.float64)


class Ridge(ClosedForm):
    """Rebuilds ``x = mean + W (z - mu) / sigma`` with ``W`` the ridge solution, in closed form.

    The penalty is the one with the least error on a fifth of the attacker's own images, after which ``W`` is solved on all of them.
    Each image is observed several times, so that the solution knows the noise. The smaller of the two Gram matrices is used (features, or
    observations where there are fewer of them).

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        draws: observations of every image.
        seed: seed of the noise and of the held-out fifth.

    Source:
        Hoerl and Kennard, "Ridge regression: biased estimation for nonorthogonal problems", Technometrics 1970.
    """

    name = "ridge"
    knowledge = QUERIES

    @property
    def budget(self) -> str:
        return f"a closed form, from {self.draws} observations of each of its images"

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Solves for the penalty and the weights; see :meth:`cem_fast.attacks.base.Attack.fit`.

        Raises:
            ValueError: there are fewer than 5 images, too few to hold a fifth out.
        """
        require_images(self, images, round(1 / HELD_OUT))
        validation, training = hold_out(images, seed=self.seed)
        with seeded(self.seed, "ridge attack"):
            observations = [observe(images).flatten(1) for _ in range(self.draws)]
        if all(torch.equal(observations[0], other) for other in observations[1:]):
            del observations[1:]  # nothing random is released: once is enough
        stacked = torch.stack(observations).double()  # [draws, N, D]
        self.standardize = Standardizer(stacked.flatten(0, 1))
        stacked = self.standardize(stacked)
        pixels = images.flatten(1).double()

        solution = _Path(stacked[:, training], pixels[training])
        errors = [
            (solution.predict(stacked[0, validation], penalty) - pixels[validation]).square().mean()
            for penalty in PENALTIES
        ]
        self.penalty = float(PENALTIES[int(torch.stack(errors).argmin())])
        solution = _Path(stacked, pixels)
        self.weights, self.intercept = solution.weights(self.penalty), solution.intercept

    def reconstruct(self, features: Tensor) -> Tensor:
        require_fitted(self, "weights")
        pixels = self.intercept + self.standardize(features.flatten(1).double()) @ self.weights
        return pixels.float().clamp(0, 1).unflatten(1, self.image_shape)


class _Path:
    """Every ridge solution of one regression, whatever the penalty, from one eigendecomposition."""

    def __init__(self, features: Tensor, targets: Tensor):
        """Takes ``features [draws, N, D]``, centered over all images, and ``targets [N, P]``."""
        draws, _, dimensions = features.shape
        flat = features.flatten(0, 1)
        self.intercept = targets.mean(0)
        centered = targets - self.intercept
        self.dual = len(flat) < dimensions
        gram = flat @ flat.T if self.dual else flat.T @ flat
        values, vectors = torch.linalg.eigh(gram)
        self.values = values.clamp_min(0)
        self.unit = float(self.values.sum()) / len(values) + 1e-300  # penalties are relative to the mean eigenvalue
        self.basis = flat.T @ vectors if self.dual else vectors  # [D, R]
        # every draw has the same targets; many images are never repeated, only their features are added up
        shared = centered.repeat(draws, 1) if self.dual else features.sum(0).T @ centered
        self.coordinates = vectors.T @ shared  # [R, P]

    def _shrunk(self, penalty: float) -> Tensor:
        return self.coordinates / (self.values + penalty * self.unit)[:, None]

    def weights(self, penalty: float) -> Tensor:
        """Returns ``W [D, P]``."""
        return self.basis @ self._shrunk(penalty)

    def predict(self, features: Tensor, penalty: float) -> Tensor:
        """Returns the pixels ``[N, P]`` of features ``[N, D]``."""
        return self.intercept + (features @ self.basis) @ self._shrunk(penalty)
