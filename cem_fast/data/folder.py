"""A user's own images: a folder with one sub-folder per class."""

from __future__ import annotations

from pathlib import Path

import torch

from cem_fast.data.images import is_grey, opened, read
from cem_fast.data.splits import Splits, by_fold

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def load(path: Path, *, fold: int, image_size: int | None, seed: int) -> Splits:
    """Reads every image below ``path/<class>/``, as grey images if all of them are grey, otherwise in color.

    Files and folders whose names begin with a dot are not the user's images: editors and operating systems leave copies there.

    Args:
        path: the folder.
        fold: which fold is the test part.
        image_size: side in pixels that the images are resized to; None for 48.
        seed: seed of the folds.

    Returns:
        The splits, stratified by class.

    Raises:
        ValueError: there are fewer than two classes, a class holds no image, there are too few to be split, or a file is corrupt; the error
            names it.
    """
    classes = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(classes) < 2:
        raise ValueError(f"{path} must hold one sub-folder per class, at least 2, got {len(classes)}")
    paths, labels = [], []
    for label, entry in enumerate(classes):
        files = sorted(file for file in entry.rglob("*") if _is_image(file.relative_to(entry)) and file.is_file())
        if not files:
            raise ValueError(f"{entry} holds no image: expected files ending in {', '.join(sorted(SUFFIXES))}")
        paths += files
        labels += [label] * len(files)
    grey = []
    for file in paths:
        with opened(file) as image:
            grey.append(is_grey(image))
    mode = "L" if all(grey) else "RGB"
    return by_fold(
        path.resolve().name,
        torch.stack([read(file, image_size or 48, mode) for file in paths]),
        torch.tensor(labels),
        fold=fold,
        seed=seed,
        class_names=[entry.name for entry in classes],
        credit=f"images of the folder {path.resolve().name}",
        unit="images",
        mirrored=False,
    )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)
