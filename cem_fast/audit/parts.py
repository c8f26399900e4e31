"""The images of an audit: the attacker's and the victims'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cem_fast.audit.targets import as_images
from cem_fast.data import memory
from cem_fast.data.items import LabeledImages, chosen_items, dataset_of, read_items
from cem_fast.data.splits import Splits, by_fold


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
    count = min(len(dataset), most or memory.room(first.shape[1:]))
    order = memory.chosen(len(dataset), count, seed=seed).tolist()
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
