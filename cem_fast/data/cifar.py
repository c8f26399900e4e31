"""The pickles of the CIFAR data sets, opened without running anything that they ask for."""

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

from cem_fast.data.files import require_regular
from cem_fast.data.images import resized
from cem_fast.data.root import missing
from cem_fast.data.splits import Splits, published

CREDIT = "Krizhevsky, 'Learning multiple layers of features from tiny images', 2009."
SIDE = 32

# all that a pickled array may call, whatever the version of numpy that wrote it
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
    """Opens one file of the data set, once it is known to be the published one.

    Args:
        path: the file.
        md5: digest of the published file.
        name: name of the data set, for the errors.

    Returns:
        What the file holds; strings of Python 2 are read as Latin-1.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the published file, or is no pickle of a dictionary of arrays and lists.
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
    """Images and labels of some of the data set's files, one after the other.

    Args:
        folder: the folder of the files.
        digests: file name -> md5.
        name: name of the data set, for the errors.
        labels: key of the labels.
        num_classes: number of classes.
        image_size: side in pixels that the images are resized to; None for their own 32.

    Returns:
        ``[N, 3, image_size, image_size]`` float32 in [0, 1] and ``[N]`` int64.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or does not hold the rows that it should.
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
    """The names of the classes.

    Args:
        path: the file of the data set's names.
        md5: digest of the published file.
        name: name of the data set, for the errors.
        key: key of the names.
        num_classes: how many there must be.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is damaged, or does not hold that many names.
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
        folder: where its files are.
        name: of the data set.
        title: its name for people.
        train: digests of the files to train on, by name.
        test: those of the files to test on.
        meta: that of the file with the names of the classes.
        labels: key of the labels in the files of images.
        label_names: key of the names in the other one.
        num_classes: number of classes.
        image_size: side in pixels that the images are resized to; None for 32.

    Raises:
        FileNotFoundError: the data set, or one of its files, is missing.
        ValueError: a file is damaged.
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
