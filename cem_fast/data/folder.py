"""A user's own images: a folder with one sub-folder per class, divided into train and test or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from cem_fast._support.warn import warn
from cem_fast.data import attributes
from cem_fast.data.files import files_in, folders_in
from cem_fast.data.images import (
    UnreadableImage,
    collected,
    is_grey,
    is_of_unknown_range,
    opened,
    raise_all,
    read_some,
    require_bright,
    upright_size,
)
from cem_fast.data.splits import Splits, by_fold, check_fold, published

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SIDE = 48  # of images that have no common size of their own
LARGEST = 256  # side of images that are kept at their own size
TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation", "validate")  # the first that a folder has is its test part

Files = dict[str, list[Path]]  # by class


def load(
    path: Path,
    *,
    fold: int,
    image_size: int | None,
    seed: int,
    of_class: tuple[int, int] | None = None,
    skip_corrupt: bool = False,
) -> Splits:
    """Reads every image below ``path/<class>/``, or below ``path/train/<class>/`` and ``path/test/<class>/``.

    The images are grey if all files are, otherwise in color. A folder whose sub-folders are ``train`` and ``test`` (or ``val``, ``valid``,
    ``validation``) keeps these parts: the first trains, the other tests, whatever the fold. Hidden files and folders, ``__MACOSX``,
    ``lost+found`` and dangling links are left out. A file ``attributes.csv`` in the folder gives further columns; see
    :func:`cem_fast.data.attributes.read`.

    Args:
        path: the folder.
        fold: which fold is the test part, 0 to 4; without effect on a folder with parts.
        image_size: side in pixels that the images are resized to. None keeps equal squares of 8 to 256 pixels, and resizes other images
            to 48 with a warning.
        seed: seed of the folds.
        of_class: training and test images that are read of each class of a folder with parts, the first by name; None for all.
        skip_corrupt: whether to leave out files that cannot be read, with a warning that names them.

    Returns:
        The splits, stratified by class.

    Raises:
        ValueError: there are too few classes or images, a class is empty, the parts hold different classes, or files are corrupt. The
            error names these classes and files. Or ``attributes.csv`` lacks an image.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cem_fast.data import folder
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for index in range(10):
        ...         path = Path(root) / ("cats", "dogs")[index % 2] / f"{index}.png"
        ...         path.parent.mkdir(exist_ok=True)
        ...         Image.new("L", (16, 16), 20 * index).save(path)
        ...     splits = folder.load(Path(root), fold=0, image_size=None, seed=0)
        >>> splits.class_names, splits.image_shape, len(splits.train), len(splits.test)
        (('cats', 'dogs'), (1, 16, 16), 8, 2)
    """
    check_fold(fold)
    train, test = _parts(path)
    found = [_files(part) for part in (train, test) if part is not None]
    if test is not None:
        _require_same_classes(train, found[0], test, found[1])
    if test is not None and of_class is not None:
        found = [{name: part[name][:most] for name in part} for part, most in zip(found, of_class)]
    files = [file for part in found for each in part.values() for file in each]
    images, errors = _read(path, files, image_size)
    if errors and not skip_corrupt:
        raise_all(errors, "; --skip-corrupt leaves out such files")
    if errors:
        warn(f"left out {len(errors)} files that cannot be read as images: {', '.join(str(e.path) for e in errors)}")
        unreadable = {error.path for error in errors}
        found = [{name: [f for f in each if f not in unreadable] for name, each in part.items()} for part in found]
        if empty := [name for part in found for name, each in part.items() if not each]:
            raise ValueError(f"{path} holds no image that can be read of {', '.join(empty[:3])}")
    names = list(found[0])
    labels = torch.tensor([label for part in found for label, name in enumerate(names) for _ in part[name]])
    name = path.resolve().name
    credit = f"images of the folder {name}"
    if test is None:
        splits = by_fold(
            name,
            images,
            labels,
            fold=fold,
            seed=seed,
            class_names=names,
            credit=credit,
            unit="images",
            mirrored=False,
        )
    else:
        count = sum(map(len, found[0].values()))
        parts = (images[:count], labels[:count]), (images[count:], labels[count:])
        splits = published(name, *parts, class_names=names, credit=credit, mirrored=False)
    kept = [file for part in found for each in part.values() for file in each]
    return _with_attributes(splits, attributes.read(path, kept))


def _with_attributes(splits: Splits, columns: dict[str, Tensor]) -> Splits:
    """The splits with the columns of every file, whose index is the group of its image."""
    if not columns:
        return splits
    train, test = (
        replace(part, attributes={name: values[part.groups] for name, values in columns.items()})
        for part in (splits.train, splits.test)
    )
    return replace(splits, train=train, test=test, attacker=train)


def _parts(path: Path) -> tuple[Path, Path | None]:
    """The folders of the training part and of the test part; the folder itself and None if it holds classes.

    Raises:
        ValueError: the folder holds one part alone, or parts next to classes.
    """
    entries = folders_in(path)
    train = [entry for name in TRAIN for entry in entries if entry.name.casefold() == name]
    tests = [entry for name in TEST for entry in entries if entry.name.casefold() == name]
    others = [entry.name for entry in entries if entry not in train + tests]
    names = ", ".join(entry.name for entry in train + tests)
    if others and not (train and tests):  # "train" or "test" alone is a class like any other
        return path, None
    if others:
        raise ValueError(f"{path} must hold parts or classes, got the parts {names} next to {', '.join(others[:3])}")
    if len(train) == 1 and tests:
        classes = {entry.name for entry in folders_in(train[0])}
        test = next((t for t in tests if classes & {entry.name for entry in folders_in(t)}), tests[0])
        if unused := [other.name for other in tests if other is not test]:
            warn(f"the test part of {path} is {test.name}; not used: {', '.join(unused)}")
        return train[0], test
    if train or tests:
        raise ValueError(f"{path} must hold one training and one test part, such as train and test, got {names} alone")
    return path, None


def _files(path: Path) -> Files:
    """The image files of every class of a folder, by the class's name."""
    classes = folders_in(path)
    if len(classes) < 2:
        raise ValueError(f"{path} must hold one sub-folder per class, at least 2, got {len(classes)}")
    found = {}
    for entry in classes:
        found[entry.name] = [file for file in files_in(entry, nested=True) if file.suffix.lower() in SUFFIXES]
        if not found[entry.name]:
            raise ValueError(f"{entry} holds no image: expected files ending in {', '.join(sorted(SUFFIXES))}")
    return found


def _require_same_classes(train: Path, in_train: Files, test: Path, in_test: Files) -> None:
    """Raises a ValueError that names the classes of one part alone."""
    alone = [
        f"{', '.join(sorted(here.keys() - there.keys())[:3])} ({len(here.keys() - there.keys())}) in {part} alone"
        for part, here, there in ((train, in_train, in_test), (test, in_test, in_train))
        if here.keys() - there.keys()
    ]
    if alone:
        raise ValueError(f"{train} and {test} must hold the same classes, got {' and '.join(alone)}")


def _read(path: Path, files: list[Path], image_size: int | None) -> tuple[Tensor, list[UnreadableImage]]:
    """The images of all files that can be read, with one size and one number of channels, and the errors of the others."""
    errors: list[UnreadableImage] = []
    readable: list[Path] = []
    sizes: set[tuple[int, int]] = set()
    unknown: list[bool] = []
    grey = True
    for file in files:
        with collected(errors), opened(file) as image:
            sizes.add(upright_size(image))
            grey = grey and is_grey(image)
            unknown.append(is_of_unknown_range(image))
            readable.append(file)
    side = image_size or _own_side(path, sizes)
    images, undecodable = read_some(readable, side, "L" if grey else "RGB")
    bad = {error.path for error in undecodable}
    good = torch.tensor([file not in bad for file in readable], dtype=torch.bool)
    require_bright(images[good & torch.tensor(unknown, dtype=torch.bool)], str(path))
    return images[good], errors + undecodable


def _own_side(path: Path, sizes: set[tuple[int, int]]) -> int:
    """The side of images that are equal squares, or 48 with a warning."""
    if len(sizes) == 1:
        ((width, height),) = sizes
        if width == height and 8 <= width <= LARGEST:
            return width
    if sizes:
        span = " to ".join(f"{width}x{height}" for width, height in dict.fromkeys((min(sizes), max(sizes))))
        warn(f"the images in {path}, of {span} pixels, are resized to {SIDE}x{SIDE}: image_size sets another side")
    return SIDE
