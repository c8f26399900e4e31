"""Tiny-ImageNet: 110,000 color photographs of 64x64 pixels in 200 classes."""

from __future__ import annotations

from pathlib import Path

import torch

from cem_fast._support.files import require_regular
from cem_fast.data.fetch import PublishedFile, Source
from cem_fast.data.files import is_clutter
from cem_fast.data.images import read_all
from cem_fast.data.root import missing
from cem_fast.data.splits import Splits, published

NAME = "tiny_imagenet"
SOURCE = Source(
    address="http://cs231n.stanford.edu/",
    files={"tiny-imagenet-200.zip": PublishedFile(248100043, "90528d7ca1a48142e341f4ef8d21d0de")},
    folder="tiny-imagenet-200",
)
CREDIT = "Tiny-ImageNet: Le and Yang, 'Tiny ImageNet visual recognition challenge', Stanford CS231N, 2015; photographs of ImageNet."
CLASSES, TRAIN, VALIDATION = 200, 500, 50  # classes, and images of each class
SIDE = 64


def load(root: Path, *, image_size: int | None) -> Splits:
    """Reads the training part and, as test part, the validation part: the labels of the test part were never published.

    The validation images may be in one folder, as published, or in one folder per class. The label of a class is its index among the sorted
    identifiers in both cases. Grey photographs get three equal channels.

    Args:
        root: parent of ``tiny-imagenet-200``.
        image_size: side in pixels that the images are resized to; None for 64.

    Returns:
        The splits.

    Raises:
        FileNotFoundError: the data set, or a list in it, is missing.
        ValueError: an image is damaged, missing, or not of 64x64 pixels, or lists and folders disagree.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data import tiny_imagenet
        >>> try:
        ...     tiny_imagenet.load(Path("nowhere"), image_size=None)
        ... except FileNotFoundError as error:
        ...     print(str(error).split(":")[0])
        tiny_imagenet is not there, no nowhere/tiny-imagenet-200
    """
    folder = root / SOURCE.folder
    if not folder.is_dir():
        raise missing(NAME, folder)
    classes = sorted(set(_lines(folder / "wnids.txt")))
    if len(classes) != CLASSES:
        raise ValueError(f"{folder / 'wnids.txt'} must list {CLASSES} classes, got {len(classes)}")
    train = [(path, wnid) for wnid in classes for path in _images(folder / "train" / wnid)]
    parts = []
    for part, files, each in (
        ("train", train, TRAIN),
        ("val", _validation(folder / "val", set(classes)), VALIDATION),
    ):
        labels = torch.tensor([classes.index(wnid) for _, wnid in files], dtype=torch.int64)
        counts = torch.bincount(labels, minlength=CLASSES)
        if wrong := [label for label in range(CLASSES) if counts[label] != each]:
            raise ValueError(
                f"{folder / part} must hold {each} images of every class, got {int(counts[wrong[0]])} of {classes[wrong[0]]}, one of "
                f"{len(wrong)} such classes: remove {folder} and get it again with `cem-fast data fetch {NAME}`"
            )
        parts.append((read_all([path for path, _ in files], image_size or SIDE, "RGB", side=SIDE), labels))
    return published(NAME, *parts, class_names=_names(folder, classes), credit=CREDIT, mirrored=True)


def _images(folder: Path) -> list[Path]:
    """All images below a folder, sorted by their own names."""
    found = (path for path in folder.rglob("*.JPEG") if not is_clutter(path.relative_to(folder)))
    return sorted(found, key=lambda path: path.name)


def _validation(folder: Path, classes: set[str]) -> list[tuple[Path, str]]:
    """Validation images and their classes, from the folder of an image or from the list."""
    path = folder / "val_annotations.txt"
    listed = dict(line.split("\t")[:2] for line in _lines(path) if "\t" in line) if path.is_file() else {}
    found = []
    for image in _images(folder):
        above = [name for name in image.relative_to(folder).parts if name in classes]
        wnid = above[0] if above else listed.get(image.name)
        if wnid not in classes:
            raise ValueError(
                f"{image} must lie in a folder of its class or be listed in {path}, got {wnid or 'neither'}"
            )
        if listed.get(image.name, wnid) != wnid:
            raise ValueError(f"{image} lies in the folder of {wnid}, and {path} says {listed[image.name]}")
        found.append((image, wnid))
    return found


def _names(folder: Path, classes: list[str]) -> list[str]:
    """First word for each class, or its identifier if there is no list of words."""
    path = folder / "words.txt"
    words = dict(line.split("\t", 1) for line in _lines(path) if "\t" in line) if path.is_file() else {}
    return [words.get(wnid, wnid).split(",")[0] for wnid in classes]


def _lines(path: Path) -> list[str]:
    try:
        require_regular(path)
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        raise missing(NAME, path) from None
    return [line.strip() for line in lines if line.strip()]
