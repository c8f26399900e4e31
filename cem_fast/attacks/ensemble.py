"""Weighted mean of a decoder and ridge regression, pixel by pixel."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import QUERIES, Attack, Observe, hold_out, require_fitted, require_images, require_positive
from cem_fast.attacks.decoder import Decoder
from cem_fast.attacks.ridge import Ridge

SHRINKAGES = (0.0, 0.3, 1.0, 3.0, 10.0, 30.0, 1e6)  # in units of the average pixel's evidence
JUDGES = 500  # maximum number of held-out images on which the weights are chosen
LEAST = 6  # images, so that four fifths of them suffice for ridge


@dataclass(kw_only=True, eq=False)
class Ensemble(Attack):
    """Reconstructs ``x_p = w_p decoder_p + (1 - w_p) ridge_p``, with one weight per pixel.

    The weights are the least-squares solution on a held-out fifth of the attacker's images. They are shrunk toward the best weight common
    to all pixels, as far as the leave-one-out error suggests. Decoder and ridge are then refitted on all images.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        decoder: the decoder attack, not yet fitted.
        draws: observations per held-out image.
        seed: seed of the noise and of the held-out fifth.

    Raises:
        ValueError: ``draws`` is not positive.

    Source:
        Breiman, "Stacked regressions", Machine Learning 1996.

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return torch.nn.functional.avg_pool2d(images, 2)
        >>> decoder = attacks.Decoder(image_shape=(1, 8, 8), epochs=2)
        >>> attack = attacks.Ensemble(image_shape=(1, 8, 8), decoder=decoder)
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> attack.reconstruct(observe(images)).shape
        torch.Size([16, 1, 8, 8])
    """

    name = "ensemble"
    knowledge = QUERIES

    image_shape: tuple[int, int, int]
    decoder: Decoder
    draws: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "draws")
        self.ridge = Ridge(image_shape=self.image_shape, seed=self.seed)

    @property
    def budget(self) -> str:
        return f"{self.decoder.budget}; {self.ridge.budget}"

    def half_budget(self) -> None:
        """Returns None: apart from the decoder, whose own entry shows its convergence, the attack is in closed form."""

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Fits both attacks and their weights; see :meth:`cem_fast.attacks.Attack.fit`.

        Raises:
            ValueError: there are fewer than 6 images.
        """
        require_images(self, images, LEAST)
        held_out, rest = hold_out(images, seed=self.seed)
        decoder, ridge = self._fitted(observe, images[rest], labels[rest])
        secret = images[held_out[:JUDGES]]
        with seeded(self.seed, "ensemble attack"):
            seen = [observe(secret) for _ in range(self.draws)]
        base = torch.stack([ridge.reconstruct(z) for z in seen]).flatten(2).double()  # [draws, N, P]
        apart = torch.stack([decoder.reconstruct(z) for z in seen]).flatten(2).double() - base
        self.weights = _weights(apart, secret.flatten(1).double() - base).float().view(self.image_shape)
        self.members = self._fitted(observe, images, labels)

    def _fitted(self, observe: Observe, images: Tensor, labels: Tensor) -> tuple[Decoder, Ridge]:
        decoder, ridge = replace(self.decoder), replace(self.ridge)
        for member in (decoder, ridge):
            member.fit(observe, images, labels)
        return decoder, ridge

    def reconstruct(self, features: Tensor) -> Tensor:
        require_fitted(self, "members")
        decoder, ridge = (member.reconstruct(features) for member in self.members)
        return ridge + self.weights * (decoder - ridge)


def _weights(apart: Tensor, wanted: Tensor) -> Tensor:
    """Weights ``w [P]`` in [0, 1] that minimize ``|w * apart - wanted|^2``, both ``[draws, N, P]``."""
    products, squares = (apart * wanted).sum(0), apart.square().sum(0)  # [N, P]
    errors = []
    for shrinkage in SHRINKAGES:
        # leave-one-out, [N, P]
        without = _shrunk(products.sum(0) - products, squares.sum(0) - squares, shrinkage)
        errors.append((without.square() * squares - 2 * without * products).sum())
    best = SHRINKAGES[int(torch.stack(errors).argmin())]
    return _shrunk(products.sum(0), squares.sum(0), best)


def _shrunk(products: Tensor, squares: Tensor, shrinkage: float) -> Tensor:
    typical = squares.mean(-1, keepdim=True) + 1e-300
    shared = products.mean(-1, keepdim=True) / typical
    return ((products + shrinkage * typical * shared) / (squares + shrinkage * typical + 1e-300)).clamp(0, 1)
