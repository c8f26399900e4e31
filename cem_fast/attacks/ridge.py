"""Ridge regression from released features to pixels: a control that takes about a second."""

from __future__ import annotations

from collections.abc import Callable

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

LARGEST = 1 << 26  # numbers of a matrix of weights, of features or of reconstructions in memory
PENALTIES = torch.logspace(-6, 4, 41, dtype=torch.float64)


class Ridge(ClosedForm):
    """Reconstructs ``x = mean + W (z - mu) / sigma`` with ``W`` the ridge solution, in closed form.

    The penalty minimizes the error on a held-out fifth of the attacker's images; ``W`` is then solved on all of them. Several observations
    of each image make the solution robust to the noise. The smaller of two Gram matrices is solved: that of features, or that of
    observations where features outnumber them.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        draws: observations per image.
        seed: seed of the noise and of the held-out fifth.

    Source:
        Hoerl and Kennard, "Ridge regression: biased estimation for nonorthogonal problems", Technometrics 1970.

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return torch.nn.functional.avg_pool2d(images, 2)
        >>> attack = attacks.Ridge(image_shape=(1, 8, 8))
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> attack.reconstruct(observe(images)).shape
        torch.Size([16, 1, 8, 8])
    """

    name = "ridge"
    knowledge = QUERIES

    @property
    def budget(self) -> str:
        return f"a closed form, from {self.draws} observations of each of its images"

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Chooses the penalty and solves for the weights; see :meth:`cem_fast.attacks.Attack.fit`.

        Raises:
            ValueError: there are fewer than 5 images, too few to hold out a fifth.
        """
        require_images(self, images, round(1 / HELD_OUT))
        validation, training = hold_out(images, seed=self.seed)
        with seeded(self.seed, "ridge attack"):
            observations = [observe(images).flatten(1) for _ in range(self.draws)]
        if all(torch.equal(observations[0], other) for other in observations[1:]):
            del observations[1:]  # without noise, one observation suffices
        stacked = torch.stack(observations).double()  # [draws, N, D]
        del observations
        self.standardize = Standardizer(stacked.flatten(0, 1))
        stacked = self.standardize(stacked)

        dual = len(stacked) * len(training) < stacked.shape[2]
        self.factors, self.intercept, self.penalty = (_by_observations if dual else _by_features)(
            stacked, images.flatten(1), validation, training
        )

    @property
    def weights(self) -> Tensor:
        """``W [D, P]``, float64."""
        require_fitted(self, "factors")
        return torch.linalg.multi_dot(self.factors) if len(self.factors) > 1 else self.factors[0]

    def reconstruct(self, features: Tensor) -> Tensor:
        require_fitted(self, "factors")
        width = max(features[0].numel(), self.intercept.numel()) if len(features) else 1
        return torch.cat([self._rebuilt(part) for part in features.split(max(1, LARGEST // width))])

    def _rebuilt(self, features: Tensor) -> Tensor:
        found = self.standardize(features.flatten(1).double())
        for factor in self.factors:
            found = found @ factor
        return (self.intercept + found).float().clamp(0, 1).unflatten(1, self.image_shape)


def _by_features(
    features: Tensor, pixels: Tensor, validation: Tensor, training: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, float]:
    """``W [D, P]`` as a product of matrices, the intercept and the penalty, from features and pixels.

    Features ``[draws, N, D]`` are centered over all images; pixels are ``[N, P]``. They take most of the memory, so each solve
    makes its own float64 copy.
    """
    path = _Path(features[:, training], pixels[training].double())
    seen = features[0, validation] @ path.basis
    penalty = _best(lambda penalty: path.predict(seen, penalty), pixels[validation].double())
    path = _Path(features, pixels.to(torch.float64, copy=True))
    return (path.weights(penalty),), path.intercept, penalty


def _by_observations(
    features: Tensor, pixels: Tensor, validation: Tensor, training: Tensor
) -> tuple[tuple[Tensor, ...], Tensor, float]:
    """As :func:`_by_features`, for more features than observations: ``W = Z' (Z Z' + penalty)^-1 Y``, one Gram matrix for all solves."""
    draws, count, dimensions = features.shape
    flat = features.flatten(0, 1)
    gram = flat @ flat.T
    rows = (torch.arange(draws, device=flat.device)[:, None] * count + training).flatten()
    known, seen = gram[rows][:, rows], gram[validation][:, rows]
    targets = pixels[training].double()
    intercept = targets.mean(0)
    targets -= intercept

    def predict(penalty: float) -> Tensor:
        # All draws share their targets: sum the coefficients instead of repeating the targets.
        coefficients = torch.cholesky_solve(seen.T, _factor(known, penalty)).T
        return intercept + coefficients.unflatten(1, (draws, -1)).sum(1) @ targets

    penalty = _best(predict, pixels[validation].double())
    if len(flat) >= dimensions:  # features outnumber observations only where a fifth is held out
        path = _Path(features, pixels.to(torch.float64, copy=True))
        return (path.weights(penalty),), path.intercept, penalty
    targets = pixels.to(torch.float64, copy=True)
    intercept = targets.mean(0)
    targets -= intercept
    coefficients = torch.cholesky_solve(targets.repeat(draws, 1), _factor(gram, penalty))
    factors = (flat.T, coefficients)
    return factors if dimensions * pixels.shape[1] > LARGEST else (flat.T @ coefficients,), intercept, penalty


def _factor(gram: Tensor, penalty: float) -> Tensor:
    """Cholesky factor of ``gram`` plus the penalty, in units of the mean eigenvalue."""
    unit = float(gram.trace()) / len(gram) + 1e-300
    penalized = gram.clone()
    penalized.diagonal().add_(penalty * unit)
    return torch.linalg.cholesky(penalized)


def _best(predict: Callable[[float], Tensor], pixels: Tensor) -> float:
    """The penalty whose predictions have the least error."""
    errors = [(predict(penalty) - pixels).square().mean() for penalty in PENALTIES]
    return float(PENALTIES[int(torch.stack(errors).argmin())])


class _Path:
    """Ridge solutions of one regression for all penalties, from one eigendecomposition of the features' Gram matrix."""

    def __init__(self, features: Tensor, targets: Tensor):
        """Takes ``features [draws, N, D]``, centered over all images, and ``targets [N, P]``, which it centers in place."""
        flat = features.flatten(0, 1)
        self.intercept = targets.mean(0)
        centered = targets.sub_(self.intercept)
        values, self.basis = torch.linalg.eigh(flat.T @ flat)
        self.values = values.clamp_min(0)
        self.unit = float(self.values.sum()) / len(values) + 1e-300  # penalties are in units of the mean eigenvalue
        # All draws share their targets: sum the features instead of repeating the targets.
        self.coordinates = self.basis.T @ (features.sum(0).T @ centered)  # [D, P]

    def _shrunk(self, penalty: float) -> Tensor:
        return self.coordinates / (self.values + penalty * self.unit)[:, None]

    def weights(self, penalty: float) -> Tensor:
        """Returns ``W [D, P]``."""
        return self.basis @ self._shrunk(penalty)

    def predict(self, coordinates: Tensor, penalty: float) -> Tensor:
        """Returns the pixels ``[N, P]`` of features ``[N, D]`` in coordinates of ``basis``."""
        return self.intercept + coordinates @ self._shrunk(penalty)
