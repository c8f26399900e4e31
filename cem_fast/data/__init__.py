"""Real images, split for training, testing and attacking."""

from __future__ import annotations

from pathlib import Path

import torch

from cem_fast.data import digits, faces, folder
from cem_fast.data.splits import NUM_FOLDS, Part, Splits
from cem_fast.names import lookup

__all__ = ["NUM_FOLDS", "Part", "Splits", "baselines", "load", "names"]

_BUNDLED = {"faces": faces.load, "digits": digits.load}


def names() -> tuple[str, ...]:
    """Names of the bundled data sets."""
    return tuple(_BUNDLED)


def load(name_or_path: str, *, fold: int, image_size: int | None = None, seed: int = 0) -> Splits:
    """Loads a data set and splits it.

    Args:
        name_or_path: ``faces``, ``digits``, or the path of a folder with one sub-folder per class.
        fold: which of the five folds is the test part, 0 to 4.
        image_size: side of the square images in pixels; None for the data set's own (faces 48, digits 32, folders 48).
        seed: seed of the folds; keep it the same for every run that is compared.

    Returns:
        The splits; the attacker knows the training part and nobody sees the test part.

    Raises:
        FileNotFoundError: the package that the images come in is missing.
        ValueError: the name is unknown and no such folder exists, a file is corrupt, or an argument is out of range.
    """
    if image_size is not None and image_size < 8:
        raise ValueError(f"image_size must be at least 8 pixels, got {image_size}")
    if name_or_path in _BUNDLED:
        return _BUNDLED[name_or_path](fold=fold, image_size=image_size, seed=seed)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return folder.load(path, fold=fold, image_size=image_size, seed=seed)
    if len(path.parts) > 1:
        raise ValueError(
            f"{path} is not a folder: expected one with a sub-folder per class, or one of {', '.join(_BUNDLED)}"
        )
    return lookup("data set", name_or_path, _BUNDLED)(fold=fold, image_size=image_size, seed=seed)


def baselines(splits: Splits) -> dict[str, float]:
    """What an attacker gets without any features, measured on the test part.

    Args:
        splits: the data set.

    Returns:
        ``mean_image_mse``, the error of answering every image with the mean training image, and ``class_mean_mse``, with the mean
        training image of the right class: what the label alone gives away.
    """
    train, test = splits.train, splits.test
    sums = torch.zeros(splits.num_classes, *splits.image_shape).index_add_(0, train.labels, train.images)
    counts = torch.bincount(train.labels, minlength=splits.num_classes).clamp_min(1)
    class_means = sums / counts[:, None, None, None]
    return {
        "mean_image_mse": float((test.images - train.images.mean(0)).square().mean()),
        "class_mean_mse": float((test.images - class_means[test.labels]).square().mean()),
    }
