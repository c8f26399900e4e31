"""Ridge regression from released features to pixels: the attack that takes a second."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cem_fast.seeding import seeded

HELD_OUT = 0.2
PENALTIES = torch.logspace(-6, 4, 41, dtype=torch.float64)


class Ridge:
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
    knowledge = "knows the training images and, through the encoder and the defense, their features; sees test features as released"

    def __init__(self, *, image_shape: tuple[int, int, int], draws: int = 8, seed: int = 0):
        if draws < 1:
            raise ValueError(f"draws must be at least 1, got {draws}")
        self.image_shape = tuple(image_shape)
        self.draws = draws
        self.seed = seed

    def half_budget(self) -> None:
        """Returns None: a closed form has no budget."""

    def fit(self, observe: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
        """Solves for the penalty and the weights; see :meth:`cem_fast.attacks.base.Attack.fit`.

        Raises:
            ValueError: there are fewer than 5 images, too few to hold a fifth out.
        """
        if len(images) < 1 / HELD_OUT:
            raise ValueError(f"the ridge attack needs at least {round(1 / HELD_OUT)} images, got {len(images)}")
        with seeded(self.seed, "ridge attack"):
            order = torch.randperm(len(images)).to(images.device)
            observations = [observe(images).flatten(1) for _ in range(self.draws)]
        if all(torch.equal(observations[0], other) for other in observations[1:]):
            del observations[1:]  # nothing random is released: once is enough
        stacked = torch.stack(observations).double()  # [draws, N, D]
        self.mean = stacked.mean((0, 1))
        deviation = stacked.std((0, 1), correction=0)
        # a feature that hardly varies here may well vary on other images: do not blow it up
        self.scale = deviation.clamp_min(1e-3 * float(deviation.square().mean().sqrt()) + 1e-12)
        stacked = (stacked - self.mean) / self.scale
        pixels = images.flatten(1).double()

        held_out = round(HELD_OUT * len(images))
        validation, training = order[:held_out], order[held_out:]
        solution = _Path(stacked[:, training], pixels[training])
        errors = [
            (solution.predict(stacked[0, validation], penalty) - pixels[validation]).square().mean()
            for penalty in PENALTIES
        ]
        self.penalty = float(PENALTIES[int(torch.stack(errors).argmin())])
        solution = _Path(stacked, pixels)
        self.weights, self.intercept = solution.weights(self.penalty), solution.intercept

    def reconstruct(self, features: Tensor) -> Tensor:
        if not hasattr(self, "weights"):
            raise RuntimeError("this ridge attack has learned nothing yet: call fit(observe, images, labels) first")
        standardized = (features.flatten(1).double() - self.mean) / self.scale
        pixels = self.intercept + standardized @ self.weights
        return pixels.float().clamp(0, 1).unflatten(1, self.image_shape)


class _Path:
    """Every ridge solution of one regression, whatever the penalty, from one eigendecomposition."""

    def __init__(self, features: Tensor, targets: Tensor):
        """Takes ``features [draws, N, D]``, centered over all images, and ``targets [N, P]``."""
        draws, _, dimensions = features.shape
        flat = features.flatten(0, 1)
        self.intercept = targets.mean(0)
        centered = (targets - self.intercept).repeat(draws, 1)
        self.dual = len(flat) < dimensions
        gram = flat @ flat.T if self.dual else flat.T @ flat
        values, vectors = torch.linalg.eigh(gram)
        self.values = values.clamp_min(0)
        self.unit = float(self.values.sum()) / len(values) + 1e-300  # penalties are relative to the mean eigenvalue
        self.basis = flat.T @ vectors if self.dual else vectors  # [D, R]
        self.coordinates = vectors.T @ (centered if self.dual else flat.T @ centered)  # [R, P]

    def _shrunk(self, penalty: float) -> Tensor:
        return self.coordinates / (self.values + penalty * self.unit)[:, None]

    def weights(self, penalty: float) -> Tensor:
        """Returns ``W [D, P]``."""
        return self.basis @ self._shrunk(penalty)

    def predict(self, features: Tensor, penalty: float) -> Tensor:
        """Returns the pixels ``[N, P]`` of features ``[N, D]``."""
        return self.intercept + (features @ self.basis) @ self._shrunk(penalty)
