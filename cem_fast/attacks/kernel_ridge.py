"""Kernel ridge regression from released features to pixels: nonlinear, in closed form, in seconds."""

from __future__ import annotations

from dataclasses import dataclass

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
    require_positive,
)
from cem_fast.attacks.warps import are_mirrored, warped

WIDTHS = (0.1, 0.3, 1.0, 3.0)  # squared width of the kernel, in units of the mean squared distance
PENALTIES = (0.001, 0.01, 0.1)
JUDGES = 300  # maximum number of held-out images on which settings are chosen
TRIAL = 1000  # rows, at most, on which settings are chosen
CENTERS = 2048  # of the Nystrom approximation
CHUNK = 4096  # rows of a kernel matrix computed together
VALUES = 2**28  # of the observations and their pixels, at most: 1 GB


@dataclass(kw_only=True, eq=False)
class KernelRidge(ClosedForm):
    """Reconstructs ``x = mean + k(z) (K + penalty I)^-1 (X - mean)`` with the kernel ``exp(-||z - z'||^2 / 2 width)``.

    The rows of ``K`` are several observations of each of the attacker's images, with fresh noise; all but the first are of the image warped
    smoothly, if that helps. Width, penalty and warps minimize the error on a held-out fifth of the attacker's images. Beyond ``rows``
    observations, ``K`` is approximated from a random subset of them (Nystrom).

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        draws: observations per image, at most; fewer where they would exceed ``rows`` or 1 GB.
        seed: seed of noise, warps and of the held-out fifth.
        rows: observations, at most, for the exact solution.

    Raises:
        ValueError: ``draws`` is not positive.

    Source:
        Saunders, Gammerman and Vovk, "Ridge regression learning algorithm in dual variables", ICML 1998; Williams and Seeger, "Using the
        Nystrom method to speed up kernel machines", NeurIPS 2000.

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return torch.nn.functional.avg_pool2d(images, 2)
        >>> attack = attacks.KernelRidge(image_shape=(1, 8, 8))
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> attack.reconstruct(observe(images)).shape
        torch.Size([16, 1, 8, 8])
    """

    name = "kernel_ridge"
    knowledge = QUERIES

    rows: int = 8000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "rows")

    @property
    def budget(self) -> str:
        return f"a closed form, from up to {self.draws} observations of each of its images"

    @torch.no_grad()
    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Chooses the settings and solves for the weights; see :meth:`cem_fast.attacks.Attack.fit`.

        Raises:
            ValueError: there are fewer than 5 images, too few to hold out a fifth.
        """
        require_images(self, images, round(1 / HELD_OUT))
        held_out, rest = hold_out(images, seed=self.seed)
        with seeded(self.seed, "kernel ridge attack"):
            mirror = are_mirrored(images, held_out=held_out, rest=rest)
            seen = observe(images).flatten(1)
            rows = min(self.rows, VALUES // (seen.shape[1] + images[0].numel()))
            copies = max(1, min(self.draws, rows // len(images)))
            self.standardize = Standardizer(seen)
            judges = images[held_out[:JUDGES]]
            secret = self.standardize(observe(judges).flatten(1)), judges.flatten(1)
            known = images[rest][: max(1, TRIAL // copies)]
            trials = []
            for warp in (False, True):
                trial = self._observed(observe, known, copies=copies, mirror=mirror if warp else None)
                trials += [(error, width, penalty, warp) for error, width, penalty in _errors(*trial, *secret)]
            _, width, self.penalty, self.warp = min(trials)
            observed = self._observed(observe, images, copies=copies, mirror=mirror if self.warp else None)
            self.width = width * float(_distances(observed[0][:TRIAL], observed[0][:TRIAL]).mean()) + 1e-12
            count = len(observed[0])
            centers = None if count <= self.rows else torch.randperm(count)[:CENTERS].to(images.device)
            self.solution = _Solution(*observed, width=self.width, penalty=self.penalty, centers=centers)

    @torch.no_grad()
    def reconstruct(self, features: Tensor) -> Tensor:
        require_fitted(self, "solution")
        pixels = self.solution.predict(self.standardize(features.flatten(1)))
        return pixels.clamp(0, 1).unflatten(1, self.image_shape)

    def _observed(self, observe: Observe, images: Tensor, *, copies: int, mirror: bool | None) -> tuple[Tensor, Tensor]:
        """Standardized observations ``[copies N, D]`` and their pixels; the first copy is not warped, none is if ``mirror`` is None."""
        looks = [images] + [images if mirror is None else warped(images, mirror=mirror) for _ in range(copies - 1)]
        features = torch.cat([observe(look).flatten(1) for look in looks])
        return self.standardize(features), torch.cat(looks).flatten(1)


def _errors(features: Tensor, pixels: Tensor, seen: Tensor, secret: Tensor) -> list[tuple[float, float, float]]:
    """Mean squared errors on held-out images ``secret [M, P]`` of features ``seen [M, D]``, with the width and the penalty of each."""
    apart, away = _distances(features, features), _distances(features, seen)
    unit, mean, errors = float(apart.mean()) + 1e-12, pixels.mean(0), []
    for width in WIDTHS:
        gram, across = (distances.div(-2 * width * unit).exp_() for distances in (apart, away))
        for penalty in PENALTIES:
            factor, _ = torch.linalg.cholesky_ex(gram + penalty * torch.eye(len(gram), device=gram.device))
            shares = torch.cholesky_solve(across, factor)  # of every row in the reconstruction of each held-out image
            error = ((mean + shares.T @ (pixels - mean)).clamp(0, 1) - secret).square().mean()
            errors.append((float(error.nan_to_num(nan=torch.inf)), width, penalty))
    return errors


class _Solution:
    """Kernel ridge regression of ``pixels [N, P]`` on ``features [N, D]``."""

    def __init__(
        self, features: Tensor, pixels: Tensor, *, width: float, penalty: float, centers: Tensor | None = None
    ):
        self.width, self.mean = width, pixels.mean(0)
        self.features = features if centers is None else features[centers]
        targets = pixels - self.mean
        gram = self._kernel(self.features)
        if centers is None:
            system, right = gram, targets
            system.diagonal().add_(penalty)
        else:  # (B^T B + penalty K) w = B^T X, with B the kernel of all rows and the centers
            system, right = penalty * gram, targets.new_zeros(len(centers), targets.shape[1])
            for part, wanted in zip(features.split(CHUNK), targets.split(CHUNK)):
                block = self._kernel(part)
                system.addmm_(block.T, block)
                right.addmm_(block.T, wanted)
            system.diagonal().add_(1e-5 * system.diagonal().mean())
        factor, failed = torch.linalg.cholesky_ex(system)
        if failed:  # rounding of nearly equal rows
            system.diagonal().add_(1e-3 * system.diagonal().mean())
            factor = torch.linalg.cholesky(system)
        self.weights = torch.cholesky_solve(right, factor)

    def _kernel(self, features: Tensor) -> Tensor:
        return _distances(features, self.features).div_(-2 * self.width).exp_()

    def predict(self, features: Tensor) -> Tensor:
        """Returns pixels ``[N, P]``."""
        return torch.cat([self.mean + self._kernel(part) @ self.weights for part in features.split(CHUNK)])


def _distances(one: Tensor, other: Tensor) -> Tensor:
    """Squared distances ``[N, M]``."""
    squares = one.square().sum(1, keepdim=True) + other.square().sum(1)
    return squares.addmm_(one, other.T, alpha=-2).clamp_min_(0)
