"""What every data set becomes: a training, a test and an attacker's part."""

from __future__ import annotations

import hashlib
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from cem_fast._support.lookup import lookup
from cem_fast.data.images import is_grey, is_of_unknown_range, pixels, require_bright

NUM_FOLDS = 5
PROTOCOLS = ("inference", "train")
CHANNELS = (1, 3, 4)  # of ordinary images: grey, color, and color with transparency


class LabeledImages(Protocol):
    """A map-style data set of pairs (image, label): a ``torch.utils.data.Dataset`` with a length, or a list."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True)
class Part:
    """Images of one part of a data set.

    Args:
        images: ``[N, C, H, W]`` float32 in [0, 1].
        labels: ``[N]`` int64.
        groups: ``[N]`` int64, the unit of resampling: images of one group (the photographs of a person) are not independent.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or not self.images.is_floating_point():
            raise ValueError(
                f"images of a part must be floating point of shape [N, C, H, W], got {self.images.dtype} of shape "
                f"{tuple(self.images.shape)}"
            )
        _require_channels_first(self.images.shape[1:], "images of a part")
        for name in ("labels", "groups"):
            if len(getattr(self, name)) != len(self.images):
                raise ValueError(
                    f"{name} of a part must hold one value for each of the {len(self.images)} images, got {len(getattr(self, name))}"
                )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Tensor) -> Part:
        return Part(self.images[index], self.labels[index], self.groups[index])

    def fingerprints(self) -> list[bytes]:
        """A digest of every image, equal for equal images."""
        pixels = self.images.cpu().contiguous().flatten(1).numpy()
        return [hashlib.sha256(row.tobytes()).digest() for row in pixels]


@dataclass(frozen=True)
class Splits:
    """A data set, split.

    Args:
        name: name of the data set.
        train: what the network and its defense are trained on.
        test: what accuracy and attacks are measured on; nothing is ever chosen or fitted on it.
        attacker: what the attacker holds and fits everything to: the training part under the ``inference`` protocol; under ``train``,
            images that are in neither of the other parts.
        num_classes: number of classes.
        class_names: their names, by label.
        credit: whom the images are owed to.
        unit: what a group is: ``people`` or ``images``.
        mirrored: whether the mirror image of an image is as good an image of its class (a face is, a digit is not).
        fixed: whether the parts are those that the data set was published with, the same for every fold.
        protocol: what is attacked; see :meth:`under`.
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

    @property
    def victims(self) -> Part:
        """Images that attacks rebuild and the attacker does not hold. The test part; under ``train``, the training part."""
        return self.train if self.protocol == "train" else self.test

    def under(self, protocol: str) -> Splits:
        """The same data, split for a protocol.

        - ``inference``: the attacker holds the network's training images, the strongest attacker there is, and rebuilds test images,
          which neither it nor the network has seen.
        - ``train``: the attacker rebuilds the network's training images. It holds none of them and no test image: of every class, the
          network keeps half of the images to train on, and the attacker gets the others. Where the attacker's part has images of its
          own from the start, nothing is divided.

        An image that is there twice never ends on both sides.

        Args:
            protocol: ``inference`` or ``train``.

        Raises:
            ValueError: the protocol is unknown, these splits were made for another one, or the attacker would be left without images.
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
            first = torch.searchsorted(train.labels[by_class], train.labels[by_class])  # where the class of each begins
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

    @cached_property
    def num_leaked(self) -> int:
        """Number of test images that are also in the training part, pixel by pixel. Who holds that part has seen them."""
        known = set(self.train.fingerprints())
        return sum(image in known for image in self.test.fingerprints())

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(channels, height, width)`` of every image."""
        _, channels, height, width = self.train.images.shape
        return channels, height, width

    def digest(self) -> str:
        """16 hexadecimal digits that change with any image, label or group, and with the part that it is in."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        # once: it takes seconds for gigabytes of images, and every run of a grid asks for it
        digest = hashlib.sha256()
        for part in (self.train, self.attacker, self.test):
            for tensor in (part.images, part.labels, part.groups):
                digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @classmethod
    def from_datasets(cls, train: LabeledImages, test: LabeledImages, *, name: str = "custom") -> Splits:
        """Takes any two map-style datasets of (image, label).

        Args:
            train: images and labels to train on; they are also what the attacker knows.
            test: images and labels that nobody sees before the test.
            name: name of the data set in results.

        Returns:
            The splits, all images in memory. An image may be a tensor ``[C, H, W]`` or ``[H, W]``, an array ``[H, W]`` or
            ``[H, W, C]``, float in [0, 1] or uint8, or a PIL image.

        Raises:
            TypeError: an item is not a pair of an image and an integer label.
            ValueError: a dataset is empty, image shapes differ, pixels lie outside [0, 1], or a label is negative or in the test set only.
        """
        first = _read(train, "train")
        parts = [first, _read(test, "test", first_group=len(first))]
        shapes = [tuple(part.images.shape[1:]) for part in parts]
        if shapes[0] != shapes[1]:
            raise ValueError(f"test images must have the shape of the training images {shapes[0]}, got {shapes[1]}")
        num_classes = int(parts[0].labels.max()) + 1
        known = parts[0].labels.unique()
        if unknown := parts[1].labels[~torch.isin(parts[1].labels, known)].unique().tolist():
            raise ValueError(f"test labels must be among the {len(known)} training classes, got {unknown[0]}")
        names = tuple(str(name) for name in getattr(train, "classes", ()))
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
    """Splits a data set into one of its five folds (the test part) and the other four (training and attacker).

    Every class is dealt out evenly, in an order that depends on ``seed`` alone, so that the five test parts cover every image once.

    Args:
        name: name of the data set.
        images: ``[N, C, H, W]`` float32 in [0, 1].
        labels: ``[N]`` int64.
        fold: which fold is the test part, 0 to 4.
        seed: seed of the dealing; keep it the same for every run that is compared.
        class_names: names of the classes, by label.
        credit: whom the images are owed to.
        unit: ``people`` if the classes are people (they become the groups), otherwise ``images``.
        mirrored: whether mirror images keep their class.

    Returns:
        The splits.

    Raises:
        ValueError: ``fold`` is out of range, a class has fewer than two images, or a fold would have.
    """
    check_fold(fold)
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
    groups = labels if unit == "people" else torch.arange(len(labels))
    whole = Part(images, labels, groups)
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
    train, test = whole[torch.nonzero(folds != fold)[:, 0]], whole[torch.nonzero(folds == fold)[:, 0]]
    return Splits(name, train, test, train, len(class_names), tuple(class_names), credit, unit, mirrored=mirrored)


def check_fold(fold: int) -> None:
    """Raises ValueError if a fold is not one of the five."""
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
    """Keeps the training and the test part that a data set was published with; the attacker knows the training part.

    A warning counts the test images that are in the training part as well. They stay, so that results can be compared with others'.

    Args:
        name: name of the data set.
        train: images ``[N, C, H, W]`` float32 in [0, 1] and labels ``[N]`` int64 to train on.
        test: those to test on.
        class_names: names of the classes, by label.
        credit: whom the images are owed to.
        mirrored: whether mirror images keep their class.
        unit: ``people`` if the classes are people (they become the groups), otherwise ``images``.

    Returns:
        The splits.

    Raises:
        ValueError: one of the parts is empty.
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
        warnings.warn(
            f"{splits.num_leaked} of the {len(tested)} test images of {name} are among its training images as well, as published: an "
            "attacker who holds those has seen them",
            stacklevel=2,
        )
    return splits


def _read(dataset: LabeledImages, argument: str, first_group: int = 0) -> Part:
    if len(dataset) == 0:
        raise ValueError(f"{argument} must hold at least one image, got an empty dataset")
    images: list[Tensor] = []
    labels: list[int] = []
    deep: list[int] = []
    for index in range(len(dataset)):
        item = dataset[index]
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise TypeError(f"{argument}[{index}] must be a pair (image, label), got {type(item).__name__}")
        try:
            label = operator.index(item[1])
        except TypeError:
            raise TypeError(f"the label of {argument}[{index}] must be an integer, got {item[1]!r}") from None
        if label < 0:
            raise ValueError(f"the label of {argument}[{index}] must not be negative, got {label}")
        image = _to_tensor(item[0], f"{argument}[{index}]")
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{argument}[{index}] must have the shape of {argument}[0] {tuple(images[0].shape)}, got {tuple(image.shape)}"
            )
        images.append(image)
        labels.append(label)
        if isinstance(item[0], Image) and is_of_unknown_range(item[0]):
            deep.append(index)
    require_bright(torch.stack([images[index] for index in deep]) if deep else torch.empty(0), argument)
    return Part(torch.stack(images), torch.tensor(labels), torch.arange(len(labels)) + first_group)


def _require_channels_first(shape: Sequence[int], what: str) -> None:
    """Raises a ValueError if the shape of an image looks like ``[H, W, C]``."""
    channels, _, last = shape
    if channels not in CHANNELS and last in CHANNELS:
        raise ValueError(
            f"{what} must have shape [C, H, W], got {tuple(shape)}, which looks like [H, W, C]: permute the channels to the front"
        )


def _to_tensor(image: object, where: str) -> Tensor:
    if isinstance(image, Image):
        try:
            return pixels(image, "L" if is_grey(image) else "RGB")
        except ValueError as error:
            raise ValueError(f"cannot read the image of {where}: {error}") from None
    if not isinstance(image, Tensor):
        array = np.asarray(image)
        if array.dtype == object or array.ndim not in (2, 3):
            raise TypeError(
                f"the image of {where} must be a tensor, an array or a PIL image, got {type(image).__name__}"
            )
        if array.ndim == 3 and array.shape[2] not in CHANNELS and array.shape[0] in CHANNELS:
            raise ValueError(
                f"the array of {where} must have shape [H, W, C], got {array.shape}, which looks like [C, H, W]: pass it as a tensor"
            )
        image = torch.from_numpy(np.array(array))
        image = image if image.dim() == 2 else image.permute(2, 0, 1)
    if image.dim() == 2:
        image = image[None]
    if image.dim() != 3:
        raise ValueError(f"the image of {where} must have shape [C, H, W], got {tuple(image.shape)}")
    _require_channels_first(image.shape, f"the image of {where}")
    if image.dtype == torch.uint8:
        return image.float() / 255
    image = image.float()
    low, high = image.aminmax()
    if not (low >= 0 and high <= 1):
        raise ValueError(
            f"pixels of {where} must lie in [0, 1], got {float(low):.3g} to {float(high):.3g}: leave out the normalization"
        )
    return image
