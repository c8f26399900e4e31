"""The interface of attacks: fit to the attacker's images, reconstruct others from their released features."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cem_fast._support.counts import require_count
from cem_fast._support.maps import as_maps
from cem_fast._support.seeding import seeded

Observe = Callable[[Tensor], Tensor]
Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in total."""

MEMORY = 512 * 2**20  # bytes of intermediate results of images attacked together, about
PER_VALUE = 800  # bytes per value of an image, for an encoder of ordinary width
TOGETHER = 256  # images attacked together, at most
HELD_OUT = 0.2  # fraction of the attacker's images on which settings are chosen
QUERIES = (
    "holds images of its own and their labels, and sends them through the encoder and the defense as often as it likes; "
    "of an image under attack it sees the features as they are released, once"
)


class Attack(Protocol):
    """Interface of a model inversion attack.

    Attributes:
        name: key of the attack in results.json.
        knowledge: capabilities of the attacker, and its observations of an image under attack, in one sentence.
        on_step: called with the steps done and the steps in total, by attacks that take long.

    Example:
        >>> import torch
        >>> from cem_fast.attacks import Attack
        >>> class MeanImage(Attack):
        ...     name = "mean"
        ...     knowledge = "holds images of its own"
        ...     budget = "one mean"
        ...
        ...     def fit(self, observe, images, labels):
        ...         self.mean = images.mean(0)
        ...
        ...     def reconstruct(self, features):
        ...         return self.mean.expand(len(features), *self.mean.shape)
        >>> attack = MeanImage()
        >>> attack.fit(torch.clone, torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64))
        >>> attack.reconstruct(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 1, 8, 8])
        >>> print(attack.overview())
        mean
          the attacker holds images of its own
          budget: one mean
    """

    name: str
    knowledge: str
    on_step: Progress = staticmethod(lambda done, total: None)

    @property
    def budget(self) -> str:
        """Computation of the attack in a few words, such as epochs or steps."""

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Fits the attack to the attacker's own images.

        Args:
            observe: function from images ``[N, C, H, W]`` to their released features, with fresh noise at every call. Differentiable
                with respect to the images.
            images: the attacker's own images ``[N, C, H, W]``, float32 in [0, 1].
            labels: their classes ``[N]``, int64.
        """

    def reconstruct(self, features: Tensor) -> Tensor:
        """Reconstructs images from released features.

        Args:
            features: released features ``[N, ...]``, one message of each image; ``[R, N, ...]`` for an attack that is built for R > 1
                releases of each image, with independent noise.

        Returns:
            Images ``[N, C, H, W]`` in [0, 1].

        Raises:
            RuntimeError: ``fit`` was not called.
        """

    def half_budget(self) -> Attack | None:
        """Returns an unfitted copy with half the budget, to test convergence; None if the budget cannot be halved."""

    def overview(self) -> str:
        """Returns name, knowledge and budget of the attack in three lines."""
        return f"{self.name}\n  the attacker {self.knowledge}\n  budget: {self.budget}"


@dataclass(kw_only=True, eq=False)
class ClosedForm(Attack):
    """Base class of attacks without iterations, fitted to several observations of each of the attacker's images.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        draws: observations per image.
        seed: seed of the noise and of all other random numbers.

    Raises:
        ValueError: ``draws`` is not positive.

    Example:
        >>> from cem_fast.attacks import Ridge
        >>> attack = Ridge(image_shape=(1, 8, 8))
        >>> attack.draws, attack.half_budget()
        (8, None)
    """

    image_shape: tuple[int, int, int]
    draws: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "draws")

    def half_budget(self) -> None:
        """Returns None: an attack without iterations has no budget to halve."""


class Standardizer:
    """Standardizes features by their mean and standard deviation over the attacker's observations.

    Args:
        features: observations ``[N, ...]``.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.base import Standardizer
        >>> standardize = Standardizer(torch.tensor([[0.0], [2.0]]))
        >>> standardize(torch.tensor([[3.0]]))
        tensor([[2.]])
    """

    def __init__(self, features: Tensor):
        self.mean = features.mean(0)
        deviation = features.std(0, correction=0)
        # A feature that is nearly constant here may vary on other images: limit its amplification.
        self.scale = deviation.clamp_min(1e-3 * float(deviation.square().mean().sqrt()) + 1e-12)

    def __call__(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale


class MapStandardizer(Standardizer):
    """Standardizes features and arranges them as maps ``[N, C, H, W]``: tokens as a grid of patches, vectors as one pixel.

    Args:
        features: observations ``[N, ...]``.
        image_shape: ``(channels, height, width)`` of the images.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.base import MapStandardizer
        >>> for shape in ((8, 4, 4), (16, 8), (17, 8), (9,)):
        ...     print(tuple(MapStandardizer(torch.rand(2, *shape), (3, 32, 32)).mean.shape))
        (8, 4, 4)
        (8, 4, 4)
        (16, 4, 4)
        (9, 1, 1)
    """

    def __init__(self, features: Tensor, image_shape: tuple[int, int, int]):
        self.image_shape = image_shape
        super().__init__(as_maps(features, image_shape))

    def __call__(self, features: Tensor) -> Tensor:
        return super().__call__(as_maps(features, self.image_shape))


def rows_in_memory(image_shape: tuple[int, int, int]) -> int:
    """Number of images to attack together: at most 256, and about 512 MB of intermediate results.

    An encoder of ordinary width keeps 800 bytes of them per value of an image.

    Args:
        image_shape: ``(channels, height, width)`` of the images.

    Example:
        >>> from cem_fast.attacks.base import rows_in_memory
        >>> rows_in_memory((1, 48, 48)), rows_in_memory((3, 224, 224))
        (256, 4)
    """
    return max(1, min(TOGETHER, MEMORY // (PER_VALUE * math.prod(image_shape))))


def in_chunks(messages: Tensor, rebuild: Callable[[Tensor], Tensor], image_shape: tuple[int, int, int]) -> Tensor:
    """Reconstructions in [0, 1], of as many images at a time as :func:`rows_in_memory` says; none of none.

    Args:
        messages: ``[R, N, ...]``.
        rebuild: function from messages to images.
        image_shape: ``(channels, height, width)`` of the images.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.base import in_chunks
        >>> in_chunks(torch.rand(2, 300, 4), lambda messages: messages[0].view(-1, 1, 2, 2), (1, 2, 2)).shape
        torch.Size([300, 1, 2, 2])
    """
    if not messages.shape[1]:
        return messages.new_zeros(0, *image_shape)
    parts = messages.split(rows_in_memory(image_shape), 1)
    return torch.cat([rebuild(part).clamp(0, 1) for part in parts])


def hold_out(images: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a held-out fifth of the attacker's images and of the others, equal for all attacks of one seed.

    Args:
        images: the attacker's images ``[N, C, H, W]``.
        seed: seed of the choice.

    Returns:
        Held-out indices and the others, both int64.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.base import hold_out
        >>> [len(part) for part in hold_out(torch.rand(20, 1, 8, 8), seed=0)]
        [4, 16]
    """
    with seeded(seed, "held-out images"):
        order = torch.randperm(len(images)).to(images.device)
    count = round(HELD_OUT * len(images))
    return order[:count], order[count:]


def as_messages(features: Tensor, releases: int) -> Tensor:
    """Released features as messages ``[R, N, ...]``.

    Args:
        features: ``[N, ...]`` for one release of each image, ``[R, N, ...]`` for more.
        releases: R.

    Raises:
        ValueError: R > 1, and the features have another leading size.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.base import as_messages
        >>> as_messages(torch.rand(5, 8), 1).shape
        torch.Size([1, 5, 8])
    """
    if releases == 1:
        return features[None]
    if len(features) != releases or features.dim() < 3:
        raise ValueError(
            f"features must be {releases} messages of each image, [{releases}, N, ...], got shape {tuple(features.shape)}"
        )
    return features


def knowing(knowledge: str, releases: int) -> str:
    """Knowledge of an attacker who sees several releases of each image.

    Args:
        knowledge: that of an attacker who sees one.
        releases: their number.

    Example:
        >>> from cem_fast.attacks.base import knowing
        >>> knowing("sees the features as they are released, once", 3)
        'sees the features as they are released, 3 times'
    """
    return knowledge if releases == 1 else knowledge.replace(", once", f", {releases} times")


def counted(count: int, noun: str) -> str:
    """A number with its noun, in the plural if need be.

    Args:
        count: the number.
        noun: the noun in the singular.

    Example:
        >>> from cem_fast.attacks.base import counted
        >>> counted(1, "epoch"), counted(2, "epoch")
        ('1 epoch', '2 epochs')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def require_positive(attack: Attack, *settings: str) -> None:
    """Raises unless the named settings of an attack are integers of at least 1.

    Args:
        attack: the attack.
        settings: names of its attributes.

    Raises:
        TypeError: a setting is no integer.
        ValueError: a setting is below 1.

    Example:
        >>> from cem_fast.attacks import Ridge
        >>> from cem_fast.attacks.base import require_positive
        >>> require_positive(Ridge(image_shape=(1, 8, 8)), "draws")
    """
    for key in settings:
        require_count(key, getattr(attack, key))


def require_fitted(attack: Attack, attribute: str) -> None:
    """Raises unless ``fit`` has set an attribute of an attack.

    Args:
        attack: the attack.
        attribute: name of the attribute.

    Raises:
        RuntimeError: the attribute is missing.

    Example:
        >>> from cem_fast.attacks import Ridge
        >>> from cem_fast.attacks.base import require_fitted
        >>> require_fitted(Ridge(image_shape=(1, 8, 8)), "weights")
        Traceback (most recent call last):
        ...
        RuntimeError: this ridge attack is not fitted: call fit(observe, images, labels) first
    """
    if not hasattr(attack, attribute):
        raise RuntimeError(f"this {attack.name} attack is not fitted: call fit(observe, images, labels) first")


def require_images(attack: Attack, images: Tensor, least: int) -> None:
    """Raises if the attacker holds too few images.

    Args:
        attack: the attack, for the error.
        images: the attacker's images ``[N, C, H, W]``.
        least: minimum of N.

    Raises:
        ValueError: there are fewer.

    Example:
        >>> import torch
        >>> from cem_fast.attacks import Ridge
        >>> from cem_fast.attacks.base import require_images
        >>> require_images(Ridge(image_shape=(1, 8, 8)), torch.rand(5, 1, 8, 8), least=5)
    """
    if len(images) < least:
        raise ValueError(f"the {attack.name} attack needs at least {least} images, got {len(images)}")
