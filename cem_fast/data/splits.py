"""Data sets divided into a training, a test and an attacker's part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cem_fast._support.lookup import lookup
from cem_fast._support.warn import warn
from cem_fast.data.items import LabeledImages, chosen_items, dataset_of, read_items, require_channels_first
from cem_fast.data.stored import CHUNK, taken

NUM_FOLDS = 5
PROTOCOLS = ("inference", "train")


@dataclass(frozen=True)
class Part:
    """Images of one part of a data set.

    Args:
        images: ``[N, C, H, W]`` float32 in [0, 1]; or ``cem_fast.data.stored.StoredImages``, which are read as they are needed.
        labels: ``[N]`` int64.
        groups: ``[N]`` int64, the units of resampling: images of one group, such as photographs of one person, are not independent.
        attributes: further categories by name, ``[N]`` int64 each, that an attacker may want to know.

    Raises:
        ValueError: the images are not floating point of shape ``[N, C, H, W]``, or the lengths differ.

    Example:
        >>> import torch
        >>> from cem_fast.data import Part
        >>> part = Part(torch.rand(4, 1, 8, 8), torch.tensor([0, 0, 1, 1]), torch.arange(4))
        >>> len(part), part[part.labels == 1].groups
        (4, tensor([2, 3]))
    """

    images: Tensor
    labels: Tensor
    groups: Tensor
    attributes: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or not self.images.is_floating_point():
            raise ValueError(
                f"images of a part must be floating point of shape [N, C, H, W], got {self.images.dtype} of shape "
                f"{tuple(self.images.shape)}"
            )
        require_channels_first(self.images.shape[1:], "images of a part")
        for name, values in {"labels": self.labels, "groups": self.groups, **self.attributes}.items():
            if len(values) != len(self.images):
                raise ValueError(
                    f"{name} of a part must hold one value for each of the {len(self.images)} images, got {len(values)}"
                )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Part:
        attributes = {name: values[index] for name, values in self.attributes.items()}
        return Part(taken(self.images, index), self.labels[index], self.groups[index], attributes)

    def fingerprints(self) -> list[bytes]:
        """One digest per image, equal for equal images.

        Returns:
            N digests of 32 bytes.

        Example:
            >>> import torch
            >>> from cem_fast.data import Part
            >>> part = Part(torch.zeros(2, 1, 8, 8), torch.zeros(2).long(), torch.arange(2))
            >>> first, second = part.fingerprints()
            >>> first == second
            True
        """
        return fingerprints(self.images)

    def num_in(self, other: Part) -> int:
        """Number of images that are also in another part, pixel by pixel.

        Args:
            other: the other part.

        Example:
            >>> import torch
            >>> from cem_fast.data import Part
            >>> part = Part(torch.rand(3, 1, 8, 8), torch.zeros(3).long(), torch.arange(3))
            >>> part[torch.tensor([0, 2])].num_in(part)
            2
        """
        known = set(other.fingerprints())
        return sum(image in known for image in self.fingerprints())


def fingerprints(images: Tensor) -> list[bytes]:
    """Digests of the pixels of each image, for finding equal images.

    Args:
        images: ``[N, C, H, W]``.

    Returns:
        N digests of 32 bytes.

    Example:
        >>> import torch
        >>> from cem_fast.data.splits import fingerprints
        >>> first, second = fingerprints(torch.zeros(2, 1, 8, 8))
        >>> first == second
        True
    """
    found = []
    for part in images.split(CHUNK):
        pixels = part.detach().cpu().contiguous().flatten(1).numpy()
        found += [hashlib.sha256(row.tobytes()).digest() for row in pixels]
    return found


@dataclass(frozen=True)
class Splits:
    """A data set in three parts.

    Args:
        name: name of the data set.
        train: part on which the network and its defense are trained.
        test: part on which accuracy and attacks are measured; nothing is chosen or fitted on it.
        attacker: part to which the attacker fits its attacks: the training part under the protocol ``inference``, images outside both
            other parts under ``train``.
        num_classes: number of classes.
        class_names: names of the classes, by label.
        credit: source of the images, to be cited.
        unit: meaning of a group: ``people`` or ``images``.
        mirrored: whether mirror images keep their class, as those of faces do and those of digits do not.
        fixed: whether the data set came with its parts, which are then the same for every fold.
        protocol: ``inference`` or ``train``; see ``under``.
        num_available: images of the training part before some were drawn; 0 where it is whole.

    Example:
        >>> from cem_fast import data
        >>> splits = data.load("digits", fold=0)
        >>> len(splits.train), len(splits.test), splits.image_shape, splits.num_classes
        (4000, 1000, (1, 32, 32), 10)
        >>> splits.attacker is splits.train, splits.victims is splits.test
        (True, True)
    """

    name: str
    train: Part
    test: Part
    attacker: Part
    num_classes: int
    class_names: tuple[str, ...]
    credit: str = ""
    unit: str = "images"
    mirrored: bool = field(default=False, kw_only=True)
    fixed: bool = field(default=False, kw_only=True)
    protocol: str = field(default="inference", kw_only=True)
    num_available: int = field(default=0, kw_only=True)

    @property
    def victims(self) -> Part:
        """Images that attacks rebuild and the attacker does not hold. The test part; under ``train``, the training part."""
        return self.train if self.protocol == "train" else self.test

    def under(self, protocol: str) -> Splits:
        """The same data, divided for a protocol.

        - ``inference``: the attacker holds the network's training images and rebuilds test images, which are new to it and to the network.
        - ``train``: the attacker rebuilds the network's training images and holds none of them, nor any test image. Half of the training
          images of each class go to the attacker, unless its part already differs from the training part.

        Copies of an image never end up on both sides.

        Args:
            protocol: ``inference`` or ``train``.

        Returns:
            The splits for the protocol.

        Raises:
            ValueError: the protocol is unknown, these splits were made for another one, or no images are left for the attacker.

        Example:
            >>> from cem_fast import data
            >>> splits = data.load("digits", fold=0).under("train")
            >>> len(splits.train), len(splits.attacker), splits.victims is splits.train
            (2000, 2000, True)
        """
        lookup("protocol", protocol, dict.fromkeys(PROTOCOLS))
        if protocol == self.protocol:
            return self
        if protocol == "inference":
            raise ValueError(
                "splits made for the protocol 'train' cannot be attacked under 'inference': load them again"
            )
        train, attacker = self.train, self.attacker
        if attacker is train:
            generator = torch.Generator().manual_seed(0)
            shuffled = torch.randperm(len(train), generator=generator)
            by_class = shuffled[torch.argsort(train.labels[shuffled], stable=True)]
            first = torch.searchsorted(train.labels[by_class], train.labels[by_class])  # start of each one's class
            kept = (torch.arange(len(train)) - first) % 2 == 0
            train, attacker = train[by_class[kept].sort().values], train[by_class[~kept].sort().values]
        unseen = set(train.fingerprints()) | set(self.test.fingerprints())
        own = torch.tensor([image not in unseen for image in attacker.fingerprints()], dtype=torch.bool)
        if not own.any():
            raise ValueError(
                "under the protocol 'train' the attacker needs images that are in no other part, got none: there must be at least two "
                "training images of some class"
            )
        return replace(self, train=train, attacker=attacker[own.nonzero()[:, 0]], protocol=protocol)

    def validation(self, fold: int, *, seed: int = 0) -> Splits:
        """The training part alone, with a fifth of it in place of the test part: settings can be chosen without a look at the test part.

        Args:
            fold: index of that fifth, 0 to 4; they are drawn as the folds of data without a test part.
            seed: seed of the folds.

        Returns:
            The splits, with folds.

        Raises:
            ValueError: the data has folds already, ``fold`` is out of range, or the training part is too small to be split.

        Example:
            >>> import torch
            >>> from cem_fast.data.splits import published
            >>> images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            >>> parts = (images[:20], torch.arange(20) % 2), (images[20:], torch.arange(4) % 2)
            >>> splits = published("noise", *parts, class_names=("a", "b"), credit="", mirrored=True).validation(0)
            >>> len(splits.train), len(splits.test), splits.fixed
            (16, 4, False)
        """
        if not self.fixed:
            raise ValueError(
                f"validation must be false for {self.name}, which has no fixed test part: fold 0 is for choosing settings"
            )
        train, test = _divided(self.train, fold=fold, seed=seed, class_names=self.class_names)
        available = self.num_available * (NUM_FOLDS - 1) // NUM_FOLDS
        return replace(self, train=train, test=test, attacker=train, fixed=False, num_available=available)

    @cached_property
    def num_leaked(self) -> int:
        """Number of test images that are also in the training part, pixel by pixel. Who holds that part has seen them."""
        return self.test.num_in(self.train)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of every image."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def digest(self) -> str:
        """Digest of all images, labels and groups, and of the parts that hold them.

        Returns:
            16 hexadecimal digits.

        Example:
            >>> from cem_fast import data
            >>> splits = data.load("digits", fold=0)
            >>> len(splits.digest()), splits.digest() == splits.under("train").digest()
            (16, False)
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        # cached: takes seconds for gigabytes of images, and every run of a grid needs it
        digest = hashlib.sha256()
        for part in (self.train, self.attacker, self.test):
            for tensor in (*part.images.split(CHUNK), part.labels, part.groups):
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @classmethod
    def from_datasets(
        cls, train: LabeledImages | DataLoader[Any], test: LabeledImages | DataLoader[Any], *, name: str = "custom"
    ) -> Splits:
        """Splits from any two map-style data sets of pairs (image, label), or from their loaders, whose processes then read the items.

        An image is a tensor ``[C, H, W]`` or ``[H, W]``, an array ``[H, W, C]`` or ``[H, W]``, or a PIL image. Numbers are floating point
        in [0, 1] or uint8.

        Args:
            train: images and labels of the training part, which is also the attacker's.
            test: images and labels of the test part.
            name: name of the data set in results.

        Returns:
            The splits. Images of a part that takes more than 2 GB as float32 are kept in a file.

        Raises:
            TypeError: an item is not a pair of an image and an integer label.
            ValueError: a data set is empty, shapes differ, channels are not where expected, or pixels lie outside [0, 1]. A label is
                negative, or only in the test set.

        Example:
            >>> import torch
            >>> from cem_fast.data import Splits
            >>> images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
            >>> pairs = [(image, index % 2) for index, image in enumerate(images)]
            >>> splits = Splits.from_datasets(pairs[:4], pairs[4:])
            >>> splits.image_shape, splits.num_classes, len(splits.train)
            ((3, 8, 8), 2, 4)
        """
        parts: list[Part] = []
        for argument, source in (("train", train), ("test", test)):
            dataset = dataset_of(source)
            if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
                kind = type(dataset).__name__
                raise TypeError(
                    f"{argument} must be a map-style data set or a list of pairs (image, label), got {kind}"
                )
            images, labels = read_items(chosen_items(source, range(len(dataset))), argument, len(dataset))
            groups = torch.arange(len(labels)) + sum(map(len, parts))
            parts.append(Part(images, labels, groups))
        shapes = [tuple(part.images.shape[1:]) for part in parts]
        if shapes[0] != shapes[1]:
            raise ValueError(f"test images must have the shape of the training images {shapes[0]}, got {shapes[1]}")
        num_classes = int(parts[0].labels.max()) + 1
        known = parts[0].labels.unique()
        if num_classes > len(parts[0]):
            raise ValueError(
                f"train labels must number the classes from 0, got {len(known)} classes and the label {num_classes - 1}"
            )
        if unknown := parts[1].labels[~torch.isin(parts[1].labels, known)].unique().tolist():
            raise ValueError(f"test labels must be among the {len(known)} training classes, got {unknown[0]}")
        names = tuple(str(name) for name in getattr(dataset_of(train), "classes", ()))
        if len(names) != num_classes:
            names = tuple(str(label) for label in range(num_classes))
        return cls(name, parts[0], parts[1], parts[0], num_classes, names)


def by_fold(
    name: str,
    images: Tensor,
    labels: Tensor,
    *,
    fold: int,
    seed: int,
    class_names: Sequence[str],
    credit: str,
    unit: str,
    mirrored: bool,
) -> Splits:
    """Splits a data set into one of five folds, the test part, and the other four, the training and attacker's part.

    The folds are stratified by class and depend on ``seed`` alone; the five test parts cover every image once. Copies of an image share a
    fold.

    Args:
        name: name of the data set.
        images: ``[N, C, H, W]`` float32 in [0, 1].
        labels: ``[N]`` int64.
        fold: index of the test fold, 0 to 4.
        seed: seed of the folds; must be equal in all runs that are compared.
        class_names: names of the classes, by label.
        credit: source of the images, to be cited.
        unit: ``people`` if the classes are people, who become the groups; otherwise ``images``.
        mirrored: whether mirror images keep their class.

    Returns:
        The splits.

    Raises:
        ValueError: ``fold`` is out of range, a class has fewer than two different images, or there are too few images in all.

    Example:
        >>> import torch
        >>> from cem_fast.data.splits import by_fold
        >>> images = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> splits = by_fold(
        ...     "noise", images, torch.arange(20) % 2, fold=0, seed=0, class_names=("even", "odd"), credit="", unit="images", mirrored=True
        ... )
        >>> splits.train.labels.bincount(), splits.test.labels.bincount()
        (tensor([8, 8]), tensor([2, 2]))
    """
    groups = labels if unit == "people" else torch.arange(len(labels))
    train, test = _divided(Part(images, labels, groups), fold=fold, seed=seed, class_names=class_names)
    return Splits(name, train, test, train, len(class_names), tuple(class_names), credit, unit, mirrored=mirrored)


def _divided(whole: Part, *, fold: int, seed: int, class_names: Sequence[str]) -> tuple[Part, Part]:
    """Four of five folds, stratified by class, and the other; see :func:`by_fold`."""
    check_fold(fold)
    labels = whole.labels
    counts = torch.bincount(labels, minlength=len(class_names))
    if int(counts.min()) < 2:
        scarce = class_names[int(counts.argmin())]
        raise ValueError(f"every class needs at least 2 images to be split, {scarce!r} has {int(counts.min())}")
    if len(labels) < 2 * NUM_FOLDS:
        raise ValueError(f"{2 * NUM_FOLDS} images are needed for {NUM_FOLDS} folds of at least 2, got {len(labels)}")
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[torch.argsort(labels[shuffled], stable=True)]
    folds = torch.empty_like(labels)
    folds[by_class] = torch.arange(len(labels)) % NUM_FOLDS
    first: dict[bytes, int] = {}
    for index, image in enumerate(whole.fingerprints()):  # copies of an image stay together
        folds[index] = folds[first.setdefault(image, index)]
    for label, class_name in enumerate(class_names):
        if len(folds[labels == label].unique()) < 2:
            raise ValueError(
                f"every class needs at least 2 different images to be split, all of {class_name!r} are copies that fall into one fold"
            )
    if not (folds == fold).any():
        raise ValueError(f"fold {fold} is empty: all of its images are copies of images in other folds")
    return whole[torch.nonzero(folds != fold)[:, 0]], whole[torch.nonzero(folds == fold)[:, 0]]


def check_fold(fold: int) -> None:
    """Raises unless a fold is one of the five.

    Args:
        fold: index of the fold.

    Raises:
        ValueError: it is not an integer from 0 to 4.

    Example:
        >>> from cem_fast.data.splits import check_fold
        >>> check_fold(5)
        Traceback (most recent call last):
        ...
        ValueError: fold must be an integer from 0 to 4, got 5
    """
    if isinstance(fold, bool) or not isinstance(fold, int) or not 0 <= fold < NUM_FOLDS:
        raise ValueError(f"fold must be an integer from 0 to {NUM_FOLDS - 1}, got {fold!r}")


def published(
    name: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    *,
    class_names: Sequence[str],
    credit: str,
    mirrored: bool,
    unit: str = "images",
) -> Splits:
    """Splits with the training and test part that a data set came with; the attacker's part is the training part.

    A warning gives the number of test images that are also in the training part. They stay, for comparison with other publications.

    Args:
        name: name of the data set.
        train: images ``[N, C, H, W]`` float32 in [0, 1] and labels ``[N]`` int64 of the training part.
        test: images and labels of the test part.
        class_names: names of the classes, by label.
        credit: whom the images are owed to.
        mirrored: whether mirror images keep their class.
        unit: ``people`` if the classes are people (they become the groups), otherwise ``images``.

    Returns:
        The splits.

    Raises:
        ValueError: one of the parts is empty.

    Example:
        >>> import torch
        >>> from cem_fast.data.splits import published
        >>> images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> parts = (images[:4], torch.tensor([0, 1, 0, 1])), (images[4:], torch.tensor([0, 1]))
        >>> splits = published("noise", *parts, class_names=("a", "b"), credit="", mirrored=True)
        >>> splits.fixed, len(splits.train), len(splits.test)
        (True, 4, 2)
    """
    parts, count = [], 0
    for argument, (images, labels) in (("train", train), ("test", test)):
        if not len(labels):
            raise ValueError(f"the {argument} part of {name} must hold at least one image, got none")
        groups = labels if unit == "people" else torch.arange(count, count + len(labels))
        parts.append(Part(images, labels, groups))
        count += len(labels)
    held, tested = parts
    splits = Splits(
        name, held, tested, held, len(class_names), tuple(class_names), credit, unit, mirrored=mirrored, fixed=True
    )
    if splits.num_leaked:
        warn(
            f"{splits.num_leaked} of the {len(tested)} test images of {name} are among its training images as well: an "
            "attacker who holds those has seen them"
        )
    return splits
