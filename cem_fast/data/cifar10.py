"""CIFAR-10: 60,000 color photographs of 32x32 pixels in ten classes."""

from __future__ import annotations

from pathlib import Path

from cem_fast.data import cifar
from cem_fast.data.fetch import PublishedFile, Source
from cem_fast.data.splits import Splits

NAME = "cifar10"
SOURCE = Source(
    address="https://www.cs.toronto.edu/~kriz/",
    files={"cifar-10-python.tar.gz": PublishedFile(170498071, "c58f30108f718f92721af3b95e74349a")},
    folder="cifar-10-batches-py",
)
TRAIN = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
}
TEST = {"test_batch": "40351d587109b95175f43aff81a1287e"}
META = {"batches.meta": "5ff9c542aee3614f3951f8cda6e48888"}
CLASSES = 10


def load(root: Path, *, image_size: int | None) -> Splits:
    """Reads the published split: five batches for training, one for testing.

    Args:
        root: parent of ``cifar-10-batches-py``.
        image_size: side in pixels that the images are resized to; None for 32.

    Returns:
        The splits.

    Raises:
        FileNotFoundError: the data set, or one of its files, is missing.
        ValueError: a file is damaged.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data import cifar10
        >>> try:
        ...     cifar10.load(Path("nowhere"), image_size=None)
        ... except FileNotFoundError as error:
        ...     print(str(error).split(":")[0])
        cifar10 is not there, no nowhere/cifar-10-batches-py
    """
    return cifar.read_split(
        root / SOURCE.folder,
        name=NAME,
        title="CIFAR-10",
        train=TRAIN,
        test=TEST,
        meta=META,
        labels="labels",
        label_names="label_names",
        num_classes=CLASSES,
        image_size=image_size,
    )
