"""Fashion-MNIST: 70,000 grey pictures of clothes, 28x28 pixels, in ten classes."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from cem_fast._support.files import require_regular
from cem_fast.data.fetch import PublishedFile, Source
from cem_fast.data.images import resized
from cem_fast.data.root import missing
from cem_fast.data.splits import Part, Splits, published

NAME = "fashion_mnist"
SUBSET = "fashion_mnist_5k"
OF_CLASS = 400, 100  # first training and test images of each class, in the subset
SOURCE = Source(
    address="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    files={
        "train-images-idx3-ubyte.gz": PublishedFile(26421880, "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        "train-labels-idx1-ubyte.gz": PublishedFile(29515, "25c81989df183df01b3e8a0aad5dffbe"),
        "t10k-images-idx3-ubyte.gz": PublishedFile(4422102, "bef4ecab320f06d8554ea6380940ec79"),
        "t10k-labels-idx1-ubyte.gz": PublishedFile(5148, "bb300cfdad3c16e7a12a480ee83cd310"),
    },
    folder="fashion-mnist",
)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # the package dataset-fashion-mnist
CREDIT = "Fashion-MNIST: Xiao, Rasul and Vollgraf, 'Fashion-MNIST: a novel image dataset for benchmarking', 2017."
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SIDE = 28
MOST = 1_000_000  # images per file


def load(root: Path, *, image_size: int | None) -> Splits:
    """Reads the published split, padded from 28x28 to 32x32, a power of two.

    Args:
        root: parent of ``fashion-mnist``; without that folder, Debian's package is read.
        image_size: side in pixels that the padded images are resized to; None for 32.

    Returns:
        The splits.

    Raises:
        FileNotFoundError: the data set, or one of its files, is missing.
        ValueError: a file is damaged.

    Example:
        >>> import gzip, tempfile
        >>> from pathlib import Path
        >>> from cem_fast.data import fashion_mnist
        >>> def idx(shape, content):
        ...     sizes = b"".join(size.to_bytes(4, "big") for size in shape)
        ...     return gzip.compress(bytes((0, 0, 8, len(shape))) + sizes + content)
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = Path(root) / "fashion-mnist"
        ...     folder.mkdir()
        ...     for brightness, part in ((0, "train"), (9, "t10k")):
        ...         pixels = bytes([brightness]) * (10 * 28 * 28)
        ...         _ = (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx((10, 28, 28), pixels))
        ...         _ = (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx((10,), bytes(range(10))))
        ...     splits = fashion_mnist.load(Path(root), image_size=None)
        >>> splits.name, splits.image_shape, splits.class_names[9]
        ('fashion_mnist', (1, 32, 32), 'Ankle boot')
    """
    folder = root / SOURCE.folder
    if not folder.is_dir() and DEBIAN.is_dir():
        folder = DEBIAN
    if not folder.is_dir():
        raise missing(NAME, folder)
    train, test = (_part(folder, part, image_size) for part in ("train", "t10k"))
    return published(NAME, train, test, class_names=CLASSES, credit=CREDIT, mirrored=True)


def load_subset(root: Path, *, image_size: int | None) -> Splits:
    """Reads a subset of the size of ``digits``: the first 400 training and 100 test images of each class.

    Args:
        root: as for ``load``.
        image_size: as for ``load``.

    Returns:
        The splits: 4000 training and 1000 test images.

    Raises:
        FileNotFoundError: the data set, or one of its files, is missing.
        ValueError: a file is damaged.

    Example:
        >>> import gzip, tempfile
        >>> from pathlib import Path
        >>> from cem_fast.data import fashion_mnist
        >>> def idx(shape, content):
        ...     sizes = b"".join(size.to_bytes(4, "big") for size in shape)
        ...     return gzip.compress(bytes((0, 0, 8, len(shape))) + sizes + content)
        >>> with tempfile.TemporaryDirectory() as root:
        ...     folder = Path(root) / "fashion-mnist"
        ...     folder.mkdir()
        ...     for brightness, part in ((0, "train"), (9, "t10k")):
        ...         pixels = bytes([brightness]) * (10 * 28 * 28)
        ...         _ = (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(idx((10, 28, 28), pixels))
        ...         _ = (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx((10,), bytes(range(10))))
        ...     splits = fashion_mnist.load_subset(Path(root), image_size=None)
        >>> splits.name, splits.image_shape, splits.class_names[9]
        ('fashion_mnist_5k', (1, 32, 32), 'Ankle boot')
    """
    splits = load(root, image_size=image_size)
    train, test = (_first(part, count) for part, count in zip((splits.train, splits.test), OF_CLASS))
    return replace(splits, name=SUBSET, train=train, attacker=train, test=test)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Reads a gzipped file of the idx format: two zeros, the type (8: bytes), the number of dimensions, the sizes, the bytes.

    Args:
        path: the file.
        dimensions: expected number of dimensions.

    Returns:
        The array, uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not gzip, is damaged, holds something else, or has another length than its sizes declare.

    Example:
        >>> import gzip, tempfile
        >>> from pathlib import Path
        >>> from cem_fast.data import fashion_mnist
        >>> def idx(shape, content):
        ...     sizes = b"".join(size.to_bytes(4, "big") for size in shape)
        ...     return gzip.compress(bytes((0, 0, 8, len(shape))) + sizes + content)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "labels.gz"
        ...     _ = path.write_bytes(idx((3,), bytes([5, 0, 9])))
        ...     fashion_mnist.read_idx(path, 1)
        array([5, 0, 9], dtype=uint8)
    """
    try:
        require_regular(path)
        with gzip.open(path) as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes((0, 0, 8, dimensions)) or len(header) < 4 + 4 * dimensions:
                raise ValueError(f"{path} must be an idx file of bytes in {dimensions} dimensions, got {header[:4]!r}")
            sizes = struct.unpack(f">{dimensions}I", header[4:])
            if sizes[0] > MOST or sizes[1:] != (SIDE, SIDE)[: dimensions - 1]:
                raise ValueError(f"{path} must hold at most {MOST:,} images of {SIDE}x{SIDE} pixels, got sizes {sizes}")
            # one byte more than expected: gzip verifies its checksum at the end alone
            content = file.read(math.prod(sizes) + 1)
    except FileNotFoundError:
        raise missing(NAME, path) from None
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path} as gzip: {error}") from error
    if len(content) != math.prod(sizes):
        more = "more" if len(content) > math.prod(sizes) else f"{len(content):,}"
        raise ValueError(f"{path} must hold {math.prod(sizes):,} bytes for its sizes {sizes}, got {more}")
    return np.frombuffer(content, np.uint8).reshape(sizes)


def _part(folder: Path, part: str, image_size: int | None) -> tuple[Tensor, Tensor]:
    images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 3)
    path = folder / f"{part}-labels-idx1-ubyte.gz"
    labels = read_idx(path, 1)
    if len(labels) != len(images):
        raise ValueError(f"{path} must hold a label for each of the {len(images)} images, got {len(labels)}")
    if len(labels) and labels.max() >= len(CLASSES):
        raise ValueError(f"labels in {path} must be from 0 to {len(CLASSES) - 1}, got {labels.max()}")
    pixels = F.pad(torch.from_numpy(images.copy())[:, None], (2, 2, 2, 2)).float().div_(255)
    return resized(pixels, image_size), torch.from_numpy(labels.astype(np.int64))


def _first(part: Part, count: int) -> Part:
    """First ``count`` images of each class, in the original order."""
    by_class = [torch.nonzero(part.labels == label)[:count, 0] for label in range(len(CLASSES))]
    return part[torch.cat(by_class).sort().values]
