"""CIFAR-100: 60,000 color photographs of 32x32 pixels in a hundred classes."""

from __future__ import annotations

from pathlib import Path

from cem_fast.data import cifar
from cem_fast.data.fetch import PublishedFile, Source
from cem_fast.data.splits import Splits

NAME = "cifar100"
SOURCE = Source(
    address="https://www.cs.toronto.edu/~kriz/",
    files={"cifar-100-python.tar.gz": PublishedFile(169001437, "eb9058c3a382ffc7106e4002c42a8d85")},
    folder="cifar-100-python",
)
TRAIN = {"train": "16019d7e3df5f24257cddd939b257f8d"}
TEST = {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}
META = {"meta": "7973b15100ade9c7d40fb424638fde48"}
CLASSES = 100


def load(root: Path, *, image_size: int | None) -> Splits:
    """Reads the published split, with the hundred fine classes.

    Args:
        root: parent of ``cifar-100-python``.
        image_size: side in pixels that the images are resized to; None for 32.

    Returns:
        The splits.

    Raises:
        FileNotFoundError: the data set, or one of its files, is missing.
        ValueError: a file is damaged.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data import cifar100
        >>> try:
        ...     cifar100.load(Path("nowhere"), image_size=None)
        ... except FileNotFoundError as error:
        ...     print(str(error).split(":")[0])
        cifar100 is not there, no nowhere/cifar-100-python
    """
    return cifar.read_split(
        root / SOURCE.folder,
        name=NAME,
        title="CIFAR-100",
        train=TRAIN,
        test=TEST,
        meta=META,
        labels="fine_labels",
        label_names="fine_label_names",
        num_classes=CLASSES,
        image_size=image_size,
    )
