"""A user's own images: a folder with one sub-folder per class, divided into train and test or not."""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from cem_fast._support.warn import warn
from cem_fast.data import attributes, cache, stored
from cem_fast.data.decoding import Decoded, Steps, decode
from cem_fast.data.files import files_in, folders_in
from cem_fast.data.images import UnreadableImage, collected, opened, raise_all, read_some, require_bright, upright_size
from cem_fast.data.splits import Splits, by_fold, check_fold, published
from cem_fast.data.stored import StoredImages, taken

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SIDE = 48  # of images that have no common size of their own
LARGEST = 256  # side of images that are kept at their own size
Size = tuple[int, int]  # width and height
TRAIN = ("train", "training")
# the first that a folder has is its test part
TEST = ("test", "testing", "val", "valid", "validation", "validate", "eval", "evaluation", "dev", "holdout")
AFTER = re.compile(r"[-_ ]?(set|data|images|imgs|\d{4})$")  # as in trainset, test_images and val2017

Files = dict[str, list[Path]]  # by class


def load(
    path: Path,
    *,
    fold: int,
    image_size: int | None,
    seed: int,
    of_class: tuple[int, int] | None = None,
    at_most: tuple[int | None, int | None] = (None, None),
    memory: int | None = None,
    skip_corrupt: bool = False,
    on_step: Steps = lambda done, total: None,
) -> Splits:
    """Reads every image below ``path/<class>/``, or below ``path/train/<class>/`` and ``path/test/<class>/``.

    The images are grey if all files are, otherwise in color. A folder whose sub-folders are ``train`` and ``test`` (or ``val``, ``dev``,
    ``train_set`` and the like) keeps these parts: the first trains, the other tests, whatever the fold. Hidden files and folders,
    ``__MACOSX``, ``lost+found`` and dangling links are left out. A file ``attributes.csv`` in the folder gives further columns; see
    :func:`cem_fast.data.attributes.read`.

    Large folders are decoded by as many processes as torch has threads. Their images are kept under :func:`cem_fast.data.cache.place`, and
    found there by the paths, sizes and times of the files.

    Args:
        path: the folder.
        fold: which fold is the test part, 0 to 4; without effect on a folder with parts.
        image_size: side in pixels of the squares that the images are resized to. None keeps the size of images that all have one, with
            sides of 8 to 256 pixels, and resizes other images to 48x48 with a warning.
        seed: seed of the folds.
        of_class: training and test images that are read of each class of a folder with parts, the first by name; None for all.
        at_most: training and test images, at most, that are drawn by ``seed`` before anything is decoded, with the same share of every
            class and at least one; None for all.
        memory: bytes of the images of a part, at most, by a draw as for ``at_most``; None for any.
        skip_corrupt: whether to leave out files that cannot be read, with a warning that names them.
        on_step: called with the files decoded and the files in total.

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
    available = sum(map(len, found[0].values()))
    if memory is not None:
        width, height = _size(image_size) or _own_size(_first_size(_listed(found[0]))) or (SIDE, SIDE)
        fitting = max(1, memory // (4 * 3 * width * height))
        at_most = (min(at_most[0] or fitting, fitting), min(at_most[1] or fitting, fitting))
    if test is None and None not in at_most:
        at_most = (sum(filter(None, at_most)), None)
    found = [part if most is None else _drawn(part, most, seed) for part, most in zip(found, at_most)]
    files = [file for part in found for file in _listed(part)]
    images, errors = _read(path, files, image_size, on_step)
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
        parts = (
            (taken(images, slice(count)), labels[:count]),
            (taken(images, slice(count, None)), labels[count:]),
        )
        splits = published(name, *parts, class_names=names, credit=credit, mirrored=False)
    kept = [file for part in found for file in _listed(part)]
    if len(splits.train) < available and at_most[0] is not None and at_most[0] < available:
        splits = replace(splits, num_available=available if test is not None else available * 4 // 5)
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
    train = [entry for name in TRAIN for entry in entries if AFTER.sub("", entry.name.casefold()) == name]
    tests = [entry for name in TEST for entry in entries if AFTER.sub("", entry.name.casefold()) == name]
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


def _listed(files: Files) -> list[Path]:
    return [file for each in files.values() for file in each]


def _require_same_classes(train: Path, in_train: Files, test: Path, in_test: Files) -> None:
    """Raises a ValueError that names the classes of one part alone."""
    alone = [
        f"{', '.join(sorted(here.keys() - there.keys())[:3])} ({len(here.keys() - there.keys())}) in {part} alone"
        for part, here, there in ((train, in_train, in_test), (test, in_test, in_train))
        if here.keys() - there.keys()
    ]
    if alone:
        raise ValueError(f"{train} and {test} must hold the same classes, got {' and '.join(alone)}")


def _drawn(files: Files, most: int, seed: int) -> Files:
    """Files that are drawn, with the same share of every class."""
    total = sum(map(len, files.values()))
    if total <= most:
        return files
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, each in files.items():
        order = torch.randperm(len(each), generator=generator)[: max(1, most * len(each) // total)]
        found[name] = [each[index] for index in order.sort().values.tolist()]
    return found


def _read(
    path: Path, files: list[Path], image_size: int | None, on_step: Steps
) -> tuple[Tensor, list[UnreadableImage]]:
    """The images of all files that can be read, with one size and one number of channels, and the errors of the others."""
    guess = _size(image_size) or _own_size(_first_size(files)) or (SIDE, SIDE)
    large = _bytes(files, guess) > stored.MEMORY
    name = cache.key(path, files, image_size=image_size) if len(files) >= cache.WORTH or large else ""
    if name and (kept := cache.find(name, len(files))):
        _warn_of_sizes(path, kept[1])
        return _fitting(kept[0]), []
    with ExitStack() as scratches:
        found, images, sizes = _decoded(files, guess, image_size, on_step, scratches)
        _warn_of_sizes(path, sizes)
        headers = [header for header in found.headers if header]
        grey = all(header.grey for header in headers)
        if any(header.deep for header in headers):
            return _read_deep(path, files, found, "L" if grey else "RGB")
        if grey:
            images = images[:, :1] if isinstance(images, np.ndarray) else images.grey(_scratch(images, scratches))
        if found.errors:
            bad = {error.path for error in found.errors}
            good = torch.tensor([file not in bad for file in files], dtype=torch.bool)
            return taken(_fitting(images), good), found.errors
        if name:
            cache.keep(name, images, sizes)
        return _fitting(images), []


def _decoded(
    files: list[Path], size: Size, image_size: int | None, on_step: Steps, scratches: ExitStack
) -> tuple[Decoded, np.ndarray | StoredImages, str]:
    """The decoded files, their images, and the least and the largest size such as ``8x6-64x48`` where they are resized unasked.

    Args:
        files: the files.
        size: the size of all images, as far as the first file tells.
        image_size: side of the images; None for their own.
        on_step: called with the files decoded and the files in total.
        scratches: gets the files of images that do not fit into memory.
    """
    found, images = _written(files, size, on_step, scratches)
    if image_size is not None:
        return found, images, ""
    sizes = {header.size for header in found.headers if header}
    own = _own_size(sizes)
    if size != (own or (SIDE, SIDE)):  # the first file is unlike the others
        found, images = _written(files, own or (SIDE, SIDE), on_step, scratches)
    ends = dict.fromkeys((min(sizes), max(sizes))) if sizes and not own else ()
    return found, images, "-".join(f"{width}x{height}" for width, height in ends)


def _written(
    files: list[Path], size: Size, on_step: Steps, scratches: ExitStack
) -> tuple[Decoded, np.ndarray | StoredImages]:
    """The decoded files, and their images in an array, or in a scratch file where they do not fit into memory."""
    workers = torch.get_num_threads()
    if _bytes(files, size) <= stored.MEMORY:
        found = decode(files, size, workers=workers, on_step=on_step)
        return found, found.images
    file = scratches.enter_context(cache.scratch(_bytes(files, size) // 4))
    stored.begin(file, (len(files), 3, size[1], size[0]), "|u1")
    found = decode(files, size, workers=workers, on_step=on_step, into=file.write)
    return found, StoredImages(file)


def _read_deep(path: Path, files: list[Path], found: Decoded, mode: str) -> tuple[Tensor, list[UnreadableImage]]:
    """The images of a folder with more than 8 bits a channel, as :func:`_read`."""
    failed = {error.path for error in found.errors}
    left = [(file, header) for file, header in zip(files, found.headers) if header and file not in failed]
    height, width = found.images.shape[2:]
    images, errors = read_some([file for file, _ in left], (width, height), mode)
    bad = {error.path for error in errors}
    good = torch.tensor([file not in bad for file, _ in left], dtype=torch.bool)
    unknown = torch.tensor([header.unknown for _, header in left], dtype=torch.bool)
    require_bright(images[good & unknown], str(path))
    return images[good], found.errors + errors


def _bytes(files: list[Path], size: Size) -> int:
    """Bytes of the images as float32, in color."""
    return 4 * 3 * size[0] * size[1] * len(files)


def _scratch(images: StoredImages, scratches: ExitStack) -> IO[bytes]:
    """A scratch file for a third of the images."""
    return scratches.enter_context(cache.scratch(images.nbytes // 12))


def _fitting(images: np.ndarray | StoredImages) -> Tensor:
    """The images as a tensor if it fits into memory."""
    if isinstance(images, np.ndarray):
        return torch.from_numpy(images).float().div_(255)
    return images[:] if images.nbytes <= stored.MEMORY else images.as_tensor()


def _first_size(files: list[Path]) -> set[Size]:
    """The size of the first file that can be opened."""
    for file in files:
        with collected([]), opened(file) as image:
            return {upright_size(image)}
    return set()


def _size(side: int | None) -> Size | None:
    return None if side is None else (side, side)


def _own_size(sizes: set[Size]) -> Size | None:
    """The size that all images have, with sides of 8 to 256 pixels; None for others."""
    if len(sizes) != 1:
        return None
    (size,) = sizes
    return size if all(8 <= side <= LARGEST for side in size) else None


def _warn_of_sizes(path: Path, sizes: str) -> None:
    if sizes:
        span = " to ".join(sizes.split("-"))
        warn(f"the images in {path}, of {span} pixels, are resized to {SIDE}x{SIDE}: image_size sets another side")
