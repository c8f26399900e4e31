"""JPEG copies of CIFAR-10 in folders: a subset that networks train on in minutes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cem_fast.data import folder
from cem_fast.data.root import VARIABLE
from cem_fast.data.splits import Splits

NAME = "cifar10-jpeg"
OF_CLASS = (1000, 200)  # training and test images, the first by name
CREDIT = (
    'JPEG copies of CIFAR-10, the first 1,000 training and 200 test images of each class (Krizhevsky, "Learning multiple layers of '
    'features from tiny images", 2009)'
)


def load(root: Path, *, image_size: int | None) -> Splits:
    """Reads the first images of each class in ``cifar10-jpeg/train/<class>/`` and ``cifar10-jpeg/test/<class>/``.

    The pixels differ slightly from those of ``cifar10``, since the copies are compressed.

    Args:
        root: parent of ``cifar10-jpeg``.
        image_size: side in pixels that the images are resized to; None for 32.

    Returns:
        The splits: 10,000 training and 2,000 test images.

    Raises:
        FileNotFoundError: the folder is missing.
        ValueError: the parts hold different classes, or files are corrupt.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data import cifar10_jpeg
        >>> try:
        ...     cifar10_jpeg.load(Path("nowhere"), image_size=None)
        ... except FileNotFoundError as error:
        ...     print(str(error).split(":")[0])
        cifar10-jpeg is not there, no nowhere/cifar10-jpeg
    """
    path = root / NAME
    if not path.is_dir():
        raise FileNotFoundError(
            f"{NAME} is not there, no {path}: put JPEG copies of CIFAR-10 there, train/<class>/*.jpg and test/<class>/*.jpg; --data-root "
            f"or {VARIABLE} names another root"
        )
    splits = folder.load(path, fold=0, image_size=image_size, seed=0, of_class=OF_CLASS)
    return replace(splits, name=NAME, credit=CREDIT, mirrored=True)
