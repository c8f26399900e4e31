"""Readers of the CIFAR data sets, whose pickles are opened without executing any code of theirs."""

from __future__ import annotations

import codecs
import hashlib
import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cem_fast._support.files import require_regular
from cem_fast.data.images import resized
from cem_fast.data.root import missing
from cem_fast.data.splits import Splits, published

CREDIT = "Krizhevsky, 'Learning multiple layers of features from tiny images', 2009."
SIDE = 32

# all names that a pickled array needs, of numpy 1 and 2
_reconstruct = np.zeros(0).__reduce__()[0]
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays are allowed")
        return ALLOWED[module, name]


def read_pickle(path: Path, md5: str, *, name: str) -> dict[str, Any]:
    """Reads one file of a data set after comparing its digest with the published one.

    Args:
        path: the file.
        md5: digest of the published file.
        name: name of the data set, for the errors.

    Returns:
        The dictionary in the file; strings of Python 2 are read as Latin-1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the published file, or is not a pickle of a dictionary of arrays and lists.

    Example:
        >>> import hashlib, pickle, tempfile
        >>> from pathlib import Path
        >>> from cem_fast.data.cifar import read_pickle
        >>> content = pickle.dumps({"labels": [3, 1]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "test_batch"
        ...     _ = path.write_bytes(content)
        ...     read_pickle(path, hashlib.md5(content).hexdigest(), name="cifar10")
        {'labels': [3, 1]}
    """
    try:
        require_regular(path)
        content = path.read_bytes()
    except FileNotFoundError:
        raise missing(name, path) from None
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != md5:
        raise ValueError(
            f"{path} has {len(content):,} bytes with md5 {found}, expected {md5}: it is damaged or not the published file; remove "
            f"{path.parent} and get it again with `cem-fast data fetch {name}`"
        )
    try:
        table = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"cannot read {path} as a pickle of arrays: {error}") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} must hold a dictionary, got {type(table).__name__}")
    return table


def read_batches(
    folder: Path, digests: Mapping[str, str], *, name: str, labels: str, num_classes: int, image_size: int | None
) -> tuple[Tensor, Tensor]:
    """Images and labels of several files of a data set, concatenated.

    Args:
        folder: the folder of the files.
        digests: md5 by file name.
        name: name of the data set, for the errors.
        labels: key of the labels.
        num_classes: number of classes.
        image_size: side in pixels that the images are resized to; None for their own 32.

    Returns:
        ``[N, 3, image_size, image_size]`` float32 in [0, 1] and ``[N]`` int64.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds other rows than expected.

    Example:
        >>> import hashlib, pickle, tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from cem_fast.data.cifar import read_batches
        >>> content = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [3, 1]})
        >>> digests = {"test_batch": hashlib.md5(content).hexdigest()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "test_batch").write_bytes(content)
        ...     images, labels = read_batches(
        ...         Path(folder), digests, name="cifar10", labels="labels", num_classes=10, image_size=None
        ...     )
        >>> images.shape, labels
        (torch.Size([2, 3, 32, 32]), tensor([3, 1]))
    """
    images, found = [], []
    for file, md5 in digests.items():
        path = folder / file
        table = read_pickle(path, md5, name=name)
        pixels, classes = table.get("data"), table.get(labels)
        if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape[1:] == (3 * SIDE**2,)):
            raise ValueError(f"{path} must hold uint8 'data' of {3 * SIDE**2} pixels a row, got {_described(pixels)}")
        if not (isinstance(classes, list) and len(classes) == len(pixels)):
            raise ValueError(
                f"{path} must hold a list {labels!r} of {len(pixels)} entries, one a row, got {_described(classes)}"
            )
        if wrong := [each for each in classes if type(each) is not int or not 0 <= each < num_classes]:
            raise ValueError(f"{labels} in {path} must be integers from 0 to {num_classes - 1}, got {wrong[0]!r}")
        images.append(torch.from_numpy(pixels.reshape(-1, 3, SIDE, SIDE).copy()))
        found.append(torch.tensor(classes, dtype=torch.int64))
    return resized(torch.cat(images).float().div_(255), image_size), torch.cat(found)


def read_names(path: Path, md5: str, *, name: str, key: str, num_classes: int) -> tuple[str, ...]:
    """Names of the classes of a data set.

    Args:
        path: the file with the names.
        md5: digest of the published file.
        name: name of the data set, for the errors.
        key: key of the names.
        num_classes: expected number of names.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or holds another number of names.

    Example:
        >>> import hashlib, pickle, tempfile
        >>> from pathlib import Path
        >>> from cem_fast.data.cifar import read_names
        >>> content = pickle.dumps({"label_names": ["cat", "dog"]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "batches.meta"
        ...     _ = path.write_bytes(content)
        ...     read_names(path, hashlib.md5(content).hexdigest(), name="cifar10", key="label_names", num_classes=2)
        ('cat', 'dog')
    """
    names = read_pickle(path, md5, name=name).get(key)
    if not (isinstance(names, list) and len(names) == num_classes and all(isinstance(each, str) for each in names)):
        raise ValueError(f"{path} must hold a list {key!r} of {num_classes} names, got {_described(names)}")
    return tuple(names)


def read_split(
    folder: Path,
    *,
    name: str,
    title: str,
    train: Mapping[str, str],
    test: Mapping[str, str],
    meta: Mapping[str, str],
    labels: str,
    label_names: str,
    num_classes: int,
    image_size: int | None,
) -> Splits:
    """Reads the published split of a CIFAR data set.

    Args:
        folder: folder of its files.
        name: name of the data set.
        title: its name in the credit.
        train: md5 of the files of the training part, by name.
        test: md5 of the files of the test part, by name.
        meta: md5 of the file with the names of the classes, by name.
        labels: key of the labels in the files of images.
        label_names: key of the names in the file of names.
        num_classes: number of classes.
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
    if not folder.is_dir():
        raise missing(name, folder)
    ((file, md5),) = meta.items()
    names = read_names(folder / file, md5, name=name, key=label_names, num_classes=num_classes)
    parts = [
        read_batches(folder, digests, name=name, labels=labels, num_classes=num_classes, image_size=image_size)
        for digests in (train, test)
    ]
    return published(name, *parts, class_names=names, credit=f"{title}: {CREDIT}", mirrored=True)


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} of shape {value.shape}"
    return f"a {type(value).__name__} of {len(value)}" if isinstance(value, list) else repr(value)[:80]
