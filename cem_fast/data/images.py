"""Reading image files and finding the ones that come inside installed packages."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F


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
    """Reads one image file, upright, resized to a square with antialiasing.

    Args:
        path: the file.
        size: side of the square, in pixels.
        mode: ``L`` for grey, ``RGB`` for color.

    Returns:
        ``[1 or 3, size, size]`` float32 in [0, 1].

    Raises:
        ValueError: the file is corrupt, is not an image, or holds numbers of which nobody can tell what is white; the error names it.
    """
    with opened(path) as image:
        return pixels(ImageOps.exif_transpose(image), mode, size)


def read_all(paths: Sequence[Path], size: int, mode: str, *, side: int | None = None) -> Tensor:
    """Reads many image files, each as :func:`read` does.

    Args:
        paths: the files.
        size: side of the squares, in pixels.
        mode: ``L`` for grey, ``RGB`` for color.
        side: side that every file must have; None for any.

    Returns:
        ``[N, 1 or 3, size, size]`` float32 in [0, 1].

    Raises:
        ValueError: a file cannot be read, or has other sides; the error names it.
    """
    images = torch.empty(len(paths), 3 if mode == "RGB" else 1, size, size)
    for index, path in enumerate(paths):
        with opened(path) as image:
            if side is not None and image.size != (side, side):
                raise ValueError(f"it must have {side}x{side} pixels, got {image.size[0]}x{image.size[1]}")
            images[index] = pixels(ImageOps.exif_transpose(image), mode, size)
    return images


def resized(images: Tensor, size: int | None) -> Tensor:
    """Resizes images ``[N, C, H, W]`` in [0, 1] to squares of ``size`` pixels, with antialiasing; None leaves them as they are."""
    if size in (None, images.shape[-1]):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp_(0, 1)


def is_grey(image: Image.Image) -> bool:
    """Whether a PIL image is stored without color."""
    return image.mode.partition(";")[0] in ("1", "L", "LA", "I", "F")


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image file.

    Raises:
        ValueError: something went wrong inside the block; the error names the file.
    """
    try:
        with Image.open(path) as image:
            yield image
    except Exception as error:  # what the decoders raise on damaged files has no common class
        raise ValueError(f"cannot read {path} as an image: {error}") from error


def pixels(image: Image.Image, mode: str, size: int | None = None) -> Tensor:
    """The pixels of a PIL image.

    Args:
        image: with 8 bits a channel or fewer, a palette, 16-bit grey, or floating-point grey in [0, 1].
        mode: ``L`` for grey, ``RGB`` for color.
        size: side of the square that it is resized to with antialiasing; None keeps its own size.

    Returns:
        ``[1 or 3, H, W]`` float32 in [0, 1].

    Raises:
        ValueError: it holds numbers outside that range.
    """
    deep = image.mode.partition(";")[0] in ("I", "F")  # PIL would clip these to 8 bits
    if deep:
        white = 1.0 if image.mode == "F" else 65535.0
        values = np.asarray(image, dtype=np.float32)
        if not 0 <= values.min() <= values.max() <= white:
            raise ValueError(f"its pixels must lie between 0 and {white:g}, got {values.min():g} to {values.max():g}")
        image = Image.fromarray(values / white)
    else:
        image = image.convert(mode)
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    found = torch.from_numpy(np.array(image)).float()
    if deep:
        return found.expand(3 if mode == "RGB" else 1, -1, -1)
    return found[None] / 255 if mode == "L" else found.permute(2, 0, 1) / 255
