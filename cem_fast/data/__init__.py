"""Real images, split for training, testing and attacking."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from cem_fast._support.counts import IMAGE_SIDES, require_count
from cem_fast._support.files import expanded, require_path
from cem_fast._support.lookup import lookup
from cem_fast.data import (
    cifar10,
    cifar10_jpeg,
    cifar100,
    digits,
    faces,
    facescrub,
    fashion_mnist,
    folder,
    tiny_imagenet,
)
from cem_fast.data.decoding import Steps
from cem_fast.data.root import SKIP_CORRUPT, data_root
from cem_fast.data.splits import NUM_FOLDS, PROTOCOLS, Part, Splits, check_fold

__all__ = ["NUM_FOLDS", "PROTOCOLS", "Part", "Splits", "baselines", "class_means", "data_root", "load", "names"]

_BUNDLED = {"faces": faces.load, "digits": digits.load}
_PUBLISHED = {
    "cifar10": cifar10.load,
    "cifar10-jpeg": cifar10_jpeg.load,
    "cifar100": cifar100.load,
    "tiny_imagenet": tiny_imagenet.load,
    "facescrub": facescrub.load,
    "fashion_mnist": fashion_mnist.load,
    "fashion_mnist_5k": fashion_mnist.load_subset,
}
SOURCES = {module.NAME: module.SOURCE for module in (cifar10, cifar100, tiny_imagenet, fashion_mnist)}


def names() -> tuple[str, ...]:
    """Names of the data sets: the bundled ones, then those read from the data root.

    Example:
        >>> from cem_fast import data
        >>> data.names()[:3]
        ('faces', 'digits', 'cifar10')
    """
    return (*_BUNDLED, *_PUBLISHED)


def load(
    name_or_path: str,
    *,
    fold: int,
    image_size: int | None = None,
    seed: int = 0,
    validation: bool = False,
    root: str | Path | None = None,
    skip_corrupt: bool | None = None,
    at_most: tuple[int | None, int | None] = (None, None),
    memory: int | None = None,
    on_step: Steps = lambda done, total: None,
) -> Splits:
    """Loads a data set and splits it.

    Args:
        name_or_path: one of :func:`cem_fast.data.names`, or the path of a folder with one sub-folder per class, or of one with such
            folders ``train`` and ``test``.
        fold: index of the test fold, 0 to 4; without effect on a data set that came with a test part, unless ``validation`` is set.
        image_size: side of the square images in pixels, 8 to 2048; None for the data set's own (``faces``, ``facescrub`` 48,
            ``tiny_imagenet`` 64, the others 32). A folder keeps the one size of its images if its sides have 8 to 256
            pixels, otherwise 48 with a warning.
        seed: seed of the folds; must be equal in all runs that are compared.
        validation: whether a fifth of the training part, chosen by ``fold``, takes the place of a fixed test part.
        root: folder of downloaded data sets; None for :func:`cem_fast.data.data_root`.
        skip_corrupt: whether to leave out files of a folder that cannot be read, with a warning that names them; None for what the
            environment variable ``CEM_FAST_SKIP_CORRUPT`` says, which is 1 or nothing.
        at_most: images of a folder that are drawn by ``seed`` for training and for testing, at most; only they are decoded. None for all.
        memory: bytes of images of a folder for training, and as many for testing, at most, by such a draw; None for any.
        on_step: called with the files of a folder that are decoded and their total.

    Returns:
        The splits; the attacker's part is the training part.

    Raises:
        FileNotFoundError: the package that contains the images is missing, or they have not been downloaded.
        TypeError: the name is no text or path, or image_size no integer.
        ValueError: the name is unknown and no such folder exists, a file is corrupt, or an argument is out of range.

    Example:
        >>> from cem_fast import data
        >>> splits = data.load("faces", fold=0, image_size=16)
        >>> splits.image_shape, len(splits.train), len(splits.test), splits.unit
        ((1, 16, 16), 320, 80, 'people')
    """
    require_path("name_or_path", name_or_path)
    if image_size is not None:
        require_count("image_size", image_size, *IMAGE_SIDES)
    if not name_or_path:
        raise ValueError(f"the data set must be one of {', '.join(names())} or the path of a folder, got ''")
    check_fold(fold)
    if name_or_path in _BUNDLED:
        splits = _BUNDLED[name_or_path](fold=fold, image_size=image_size, seed=seed)
    elif name_or_path in _PUBLISHED:
        splits = _PUBLISHED[name_or_path](data_root() if root is None else Path(root), image_size=image_size)
    else:
        skip = os.environ.get(SKIP_CORRUPT) == "1" if skip_corrupt is None else skip_corrupt
        splits = folder.load(
            _folder(name_or_path),
            fold=fold,
            image_size=image_size,
            seed=seed,
            skip_corrupt=skip,
            at_most=at_most,
            memory=memory,
            on_step=on_step,
        )
    return splits.validation(fold, seed=seed) if validation else splits


def _folder(name_or_path: str) -> Path:
    """The folder of a path, or an error that names the nearest data set."""
    path = expanded(name_or_path)
    if path.is_dir():
        return path
    if len(path.parts) == 1:
        lookup("data set", name_or_path, dict.fromkeys(names()))  # raises
    raise ValueError(
        f"{path} is not a folder: expected one with a sub-folder per class, or one of {', '.join(names())}"
    )


def baselines(splits: Splits) -> dict[str, float]:
    """Errors of reconstructions without features, on the images under attack.

    Args:
        splits: the data set.

    Returns:
        ``mean_image_mse``: mean squared error of the mean of the attacker's images. ``class_mean_mse``: that of the mean of its images
        of the true class, which an attacker who only has the label can reach.

    Example:
        >>> from cem_fast import data
        >>> errors = data.baselines(data.load("digits", fold=0, image_size=16))
        >>> errors["class_mean_mse"] < errors["mean_image_mse"]
        True
    """
    own, victims = splits.attacker, splits.victims
    answers = class_means(splits)[victims.labels]
    return {
        "mean_image_mse": float((victims.images - own.images.mean(0)).square().mean()),
        "class_mean_mse": float((victims.images - answers).square().mean()),
    }


def class_means(splits: Splits) -> Tensor:
    """Mean of the attacker's images of each class; the mean of all of them for a class without images.

    Args:
        splits: the data set.

    Returns:
        ``[classes, C, H, W]``.

    Example:
        >>> from cem_fast import data
        >>> data.class_means(data.load("digits", fold=0)).shape
        torch.Size([10, 1, 32, 32])
    """
    images, labels = splits.attacker.images, splits.attacker.labels
    sums = torch.zeros(splits.num_classes, *splits.image_shape).index_add_(0, labels, images)
    counts = torch.bincount(labels, minlength=splits.num_classes)[:, None, None, None]
    return torch.where(counts > 0, sums / counts.clamp_min(1), images.mean(0))
