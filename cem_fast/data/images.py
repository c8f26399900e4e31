"""Reading image files and finding the ones that come inside installed packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def package_folder(package: str) -> Path:
    """Returns the folder of an installed package without importing the package (its own code never runs).

    Raises:
        FileNotFoundError: the package is not installed; the error says what to type.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"these images come inside the package {package!r}, which is missing: pip install cem_fast[demo]"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def read(path: Path, size: int, mode: str) -> Tensor:
    """Reads one image file, resized to a square with antialiasing.

    Args:
        path: the file.
        size: side of the square, in pixels.
        mode: ``L`` for grey, ``RGB`` for color.

    Returns:
        ``[1 or 3, size, size]`` float32 in [0, 1].

    Raises:
        ValueError: the file is corrupt or is not an image; the error names it.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            resized = image.convert(mode).resize((size, size), Image.Resampling.BILINEAR)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read {path} as an image: {error}") from error
    pixels = torch.from_numpy(np.array(resized)).float() / 255
    return pixels[None] if mode == "L" else pixels.permute(2, 0, 1)
