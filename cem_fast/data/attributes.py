"""Further columns of a folder of images, such as glasses or age group, in a file ``attributes.csv``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

NAME = "attributes.csv"


def read(folder: Path, files: Sequence[Path]) -> dict[str, Tensor]:
    """Reads ``attributes.csv`` of a folder of images.

    Its first line names the columns, of which the first holds the paths of the images, relative to the folder. The values of every other
    column are categories, numbered in the order of their names.

    Args:
        folder: the folder.
        files: images of the folder, each of which must have a line.

    Returns:
        Per column, the category of every file, ``[N]`` int64; empty if there is no such file.

    Raises:
        ValueError: the file is not a table, names a column twice, or lacks an image.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from cem_fast.data import attributes
        >>> with tempfile.TemporaryDirectory() as root:
        ...     _ = (Path(root) / "attributes.csv").write_text("file,glasses\\nann/1.png,no\\nbob/2.png,yes\\n")
        ...     attributes.read(Path(root), [Path(root) / "bob/2.png", Path(root) / "ann/1.png"])
        {'glasses': tensor([1, 0])}
    """
    path = folder / NAME
    if not path.exists():
        return {}
    try:
        lines = [line for line in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a table of comma-separated values ({error})") from None
    columns = lines[0][1:] if lines else []
    if not columns or len(set(columns)) < len(columns) or not all(columns):
        raise ValueError(
            f"{path}: the first line must name the column of files and different further columns, got {lines[:1]}"
        )
    values: dict[str, list[str]] = {}
    for number, (file, *entries) in enumerate(lines[1:], start=2):
        if len(entries) != len(columns):
            raise ValueError(
                f"{path}: expected {1 + len(columns)} values in the line of {file!r} ({number}), got {1 + len(entries)}"
            )
        values[Path(file).as_posix()] = entries
    names = [file.relative_to(folder).as_posix() for file in files]
    if lost := [name for name in names if name not in values]:
        raise ValueError(f"{path}: no line for {len(lost)} of {len(names)} images, such as {lost[0]}")
    found = {}
    for index, column in enumerate(columns):
        categories = {value: number for number, value in enumerate(sorted({values[name][index] for name in names}))}
        found[column] = torch.tensor([categories[values[name][index]] for name in names])
    return found
