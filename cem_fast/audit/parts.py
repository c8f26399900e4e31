"""The images of an audit: the attacker's and the victims', as many as fit into memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cem_fast.audit.targets import as_images
from cem_fast.data.items import LabeledImages, chosen_items, dataset_of, read_items
from cem_fast.data.splits import Part, Splits, by_fold

MEMORY = 2_000_000_000  # bytes of images, of features, and of what attacks make of them
NUMBERS = (9, 8)  # float32 numbers in memory at once, of each pixel and of each feature of the attacker's images


def room(image_shape: Sequence[int], feature_shape: Sequence[int] = ()) -> int:
    """Number of images of the attacker that fit into 2 GB, at least 100.

    Args:
        image_shape: shape of an image.
        feature_shape: shape of its features; nothing while it is unknown.

    Example:
        >>> from cem_fast.audit.parts import room
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
        >>> from cem_fast.audit.parts import draws
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
        >>> from cem_fast.audit.parts import held
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
    if len(part) <= most:
        return part
    chosen = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed))[:most]
    return part[chosen.sort().values]


def read(
    images: Tensor | LabeledImages | DataLoader[Any], labels: Tensor | None, most: int | None, *, seed: int
) -> Splits:
    """Splits of a tensor, a map-style data set or a loader of one.

    Args:
        images: ``[N, C, H, W]``, uint8 or float in [0, 1]; or a data set of pairs (image, label); or its loader, whose processes read
            the items.
        labels: classes ``[N]`` of a tensor; None if there are none.
        most: items of a data set that are drawn and read, at most; None for as many as fit.
        seed: seed of the draw and of the division.

    Raises:
        TypeError: a loader is not one of a map-style data set, or an item is no pair.
        ValueError: images or labels are no such values, or there are labels next to a data set, which has its own.

    Example:
        >>> import torch
        >>> from cem_fast.audit.parts import read
        >>> pairs = [(torch.rand(1, 8, 8), index % 2) for index in range(40)]
        >>> len(read(pairs, None, 20, seed=0).attacker)
        16
    """
    if isinstance(images, Tensor):
        return split(images, labels, seed=seed)
    if labels is not None:
        raise ValueError("labels must be left out with a data set, whose items are pairs of an image and a label")
    dataset = dataset_of(images)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"images must be a tensor, splits, or a data set with a length and items, got {type(dataset).__name__}"
        )
    first, _ = read_items([dataset[0]] if len(dataset) else [], "images")
    count = min(len(dataset), most or room(first.shape[1:]))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:count].sort().values.tolist()
    found = split(*read_items(chosen_items(images, order), "images"), seed=seed)
    return replace(found, num_available=len(dataset) * len(found.attacker) // count if count < len(dataset) else 0)


def split(images: Tensor, labels: Tensor | None, *, seed: int) -> Splits:
    """Divides images: four fifths of each class to the attacker, one fifth as victims; equal images stay together.

    Args:
        images: ``[N, C, H, W]``, uint8 or float in [0, 1].
        labels: classes ``[N]``; None if there are none.
        seed: seed of the division.

    Raises:
        ValueError: shapes or values are others.

    Example:
        >>> import torch
        >>> from cem_fast.audit.parts import split
        >>> splits = split(torch.rand(20, 1, 8, 8), None, seed=0)
        >>> len(splits.attacker), len(splits.victims)
        (16, 4)
    """
    images = as_images(images, "images")
    if labels is None:
        labels = torch.zeros(len(images), dtype=torch.int64)
    if labels.shape != images.shape[:1] or labels.is_floating_point() or (len(labels) and int(labels.min()) < 0):
        raise ValueError(
            f"labels must be {len(images)} integers of at least 0, got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    classes, labels = labels.unique(return_inverse=True)
    names = [str(int(each)) for each in classes]
    return by_fold(
        "images", images, labels, fold=0, seed=seed, class_names=names, credit="", unit="images", mirrored=False
    )
