"""The images that attacks work on: as many as fit into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from cem_fast.data.splits import Part, Splits
from cem_fast.data.stored import MEMORY, StoredImages

NUMBERS = (9, 8)  # float32 numbers in memory at once, of each pixel and of each feature of the attacker's images


def room(image_shape: Sequence[int], feature_shape: Sequence[int] = ()) -> int:
    """Number of images of the attacker that fit into 2 GB, at least 100.

    Args:
        image_shape: shape of an image.
        feature_shape: shape of its features; nothing while it is unknown.

    Example:
        >>> from cem_fast.data.memory import room
        >>> room((3, 32, 32)), room((3, 32, 32), (64, 8, 8))
        (18084, 8275)
    """
    pixels, features = math.prod(image_shape), math.prod(feature_shape) if feature_shape else 0
    return max(100, MEMORY // (4 * (NUMBERS[0] * pixels + NUMBERS[1] * features)))


def draws(images: int, feature_shape: Sequence[int]) -> int:
    """Observations of each image that an attack in closed form can keep in 1.5 GB, in float64 with two copies; at least 1.

    Args:
        images: number of images.
        feature_shape: shape of the features of an image.

    Example:
        >>> from cem_fast.data.memory import draws
        >>> draws(1000, (64, 8, 8)), draws(8275, (64, 8, 8))
        (15, 1)
    """
    return max(1, 3 * MEMORY // 4 // (24 * images * max(1, math.prod(feature_shape))))


@lru_cache(maxsize=1)
def held(splits: Splits, most: int, victims: int, *, mirror: bool, seed: int) -> Splits:
    """Splits with at most so many of the attacker's images and of the victims, drawn by ``seed``.

    The last result is kept, and with it what is fitted to these images alone: a search for noise audits them many times.

    Args:
        splits: the images.
        most: images of the attacker, at most, with their mirror images.
        victims: images under attack, at most.
        mirror: whether the attacker also learns from mirror images of its own.
        seed: seed of the draws.

    Example:
        >>> from cem_fast import data
        >>> from cem_fast.data.memory import held
        >>> splits = held(data.load("digits", fold=0), 300, 50, mirror=True, seed=0)
        >>> len(splits.attacker), len(splits.victims), splits.num_available
        (300, 50, 4000)
    """
    own, available = splits.attacker, splits.num_available or len(splits.attacker)
    own = _drawn(own, most // 2 if mirror else most, seed)
    if mirror:
        attributes = {name: torch.cat([values, values]) for name, values in own.attributes.items()}
        labels, groups = torch.cat([own.labels, own.labels]), torch.cat([own.groups, own.groups])
        own = Part(torch.cat([own.images, own.images.flip(3)]), labels, groups, attributes)
    available = available if own is not splits.attacker or splits.num_available else 0
    if splits.protocol == "train":
        return replace(splits, train=_drawn(splits.train, victims, seed), attacker=own, num_available=available)
    return replace(splits, train=own, attacker=own, test=_drawn(splits.test, victims, seed), num_available=available)


def _drawn(part: Part, most: int, seed: int) -> Part:
    part = drawn(part, most, seed=seed)
    return replace(part, images=part.images[:]) if isinstance(part.images, StoredImages) else part


def drawn(part: Part, most: int, *, seed: int) -> Part:
    """Some of the images of a part, drawn by a seed; the part itself if it has no more. Images in a file are not read.

    Args:
        part: the images.
        most: number of images, at most.
        seed: seed of the draw.

    Example:
        >>> import torch
        >>> from cem_fast.data import Part
        >>> from cem_fast.data.memory import drawn
        >>> part = Part(torch.rand(6, 1, 8, 8), torch.arange(6), torch.arange(6))
        >>> drawn(part, 9, seed=0) is part, drawn(part, 3, seed=0).labels
        (True, tensor([2, 3, 5]))
    """
    return part if len(part) <= most else part[chosen(len(part), most, seed=seed)]


def chosen(count: int, most: int, *, seed: int) -> Tensor:
    """Indices of some of ``count`` images, drawn by a seed, in ascending order.

    Args:
        count: number of images.
        most: number of indices, at most.
        seed: seed of the draw.

    Example:
        >>> from cem_fast.data.memory import chosen
        >>> chosen(6, 3, seed=0)
        tensor([2, 3, 5])
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values
