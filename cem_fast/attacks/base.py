"""What every attack is: it learns from the attacker's images and rebuilds others from their released features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cem_fast._support.seeding import seeded

Observe = Callable[[Tensor], Tensor]

HELD_OUT = 0.2  # share of the attacker's own images that settings are chosen on
QUERIES = (
    "holds images of its own and their labels, and sends them through the encoder and the defense as often as it likes; "
    "of an image under attack it sees the features as they are released, once"
)


class Attack(Protocol):
    """A model inversion attack.

    Attributes:
        name: key of the attack in results.json.
        knowledge: one sentence that says what the attacker knows, and what it sees of a victim.
    """

    name: str
    knowledge: str

    @property
    def budget(self) -> str:
        """A few words that say how much the attack computes."""

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Learns to invert.

        Args:
            observe: images ``[N, C, H, W]`` -> features as the cloud sees them, with fresh noise at every call; differentiable where
                the images require a gradient.
            images: the attacker's own images ``[N, C, H, W]``, float32 in [0, 1].
            labels: their classes ``[N]``, int64.
        """

    def reconstruct(self, features: Tensor) -> Tensor:
        """Returns the images rebuilt from released features, ``[N, C, H, W]`` in [0, 1].

        Raises:
            RuntimeError: ``fit`` was not called.
        """

    def half_budget(self) -> Attack | None:
        """Returns an unfitted twin with half the budget, to show whether the attack has converged; None where there is no half."""

    def overview(self) -> str:
        """Returns what a reader needs to judge the attack: who the attacker is, and how hard it tries."""
        return f"{self.name}\n  the attacker {self.knowledge}\n  budget: {self.budget}"


@dataclass(kw_only=True, eq=False)
class ClosedForm(Attack):
    """An attack without iterations, from several observations of each of the attacker's images.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        draws: observations of every image.
        seed: seed of the noise in them, and of every other random choice.

    Raises:
        ValueError: ``draws`` is not positive.
    """

    image_shape: tuple[int, int, int]
    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "draws")

    def half_budget(self) -> None:
        """Returns None: what has no iterations has no budget."""


class Standardizer:
    """Standardizes features by their mean and standard deviation over the attacker's observations.

    Args:
        features: observations ``[N, ...]``.
    """

    def __init__(self, features: Tensor):
        self.mean = features.mean(0)
        deviation = features.std(0, correction=0)
        # a feature that hardly varies here may well vary on other images: do not blow it up
        self.scale = deviation.clamp_min(1e-3 * float(deviation.square().mean().sqrt()) + 1e-12)

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


def hold_out(images: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the held-out fifth of the attacker's images and of the others, the same for every attack of one seed.

    Args:
        images: the attacker's images ``[N, C, H, W]``.
        seed: seed of the choice.
    """
    with seeded(seed, "held-out images"):
        order = torch.randperm(len(images)).to(images.device)
    count = round(HELD_OUT * len(images))
    return order[:count], order[count:]


def counted(count: int, noun: str) -> str:
    """``1 epoch``, ``2 epochs``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def require_positive(attack: Attack, *settings: str) -> None:
    """Raises a ValueError unless every one of these settings of the attack is at least 1."""
    for key in settings:
        if getattr(attack, key) < 1:
            raise ValueError(f"{key} must be at least 1, got {getattr(attack, key)}")


def require_fitted(attack: Attack, attribute: str) -> None:
    """Raises a RuntimeError unless ``fit`` has left ``attribute`` on the attack."""
    if not hasattr(attack, attribute):
        raise RuntimeError(
            f"this {attack.name} attack has learned nothing yet: call fit(observe, images, labels) first"
        )


def require_images(attack: Attack, images: Tensor, least: int) -> None:
    """Raises a ValueError if the attacker holds fewer than ``least`` images."""
    if len(images) < least:
        raise ValueError(f"the {attack.name} attack needs at least {least} images, got {len(images)}")
