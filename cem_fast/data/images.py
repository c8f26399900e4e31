"""Image files and PIL images as tensors in [0, 1], and images inside installed packages."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from cem_fast._support.files import require_regular

# Named explicitly, whatever the suffix of a file: Pillow would start Ghostscript for an EPS file called image.png.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
NAMED = 3  # files of which an error gives the reason
DIM = 0.25  # brightness that some image of a data set must exceed if its file does not declare what white is
# tags of TIFF
BITS, PHOTOMETRIC, ORIENTATION, WHITEST, SAMPLE_FORMAT = 258, 262, 274, 281, 339


def package_folder(package: str) -> Path:
    """Folder of an installed package, found without importing the package.

    Args:
        package: name of the package.

    Returns:
        The folder that holds its modules.

    Raises:
        FileNotFoundError: the package is not installed; the error gives the command that installs it.

    Example:
        >>> from cem_fast.data.images import package_folder
        >>> package_folder("numpy").name
        'numpy'
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"these images come inside the package {package!r}, which is missing: pip install {package}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


class UnreadableImage(ValueError):
    """A file that cannot be read as an image.

    Args:
        path: the file.
        reason: why not.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data.images import UnreadableImage
        >>> raise UnreadableImage(Path("cat.png"), "it is empty")
        Traceback (most recent call last):
        ...
        cem_fast.data.images.UnreadableImage: cannot read cat.png as an image: it is empty
    """

    def __init__(self, path: Path, reason: str):
        super().__init__(f"cannot read {path} as an image: {reason}")
        self.path, self.reason = path, reason


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """Opens an image file in one of ``FORMATS``, whatever its suffix.

    Args:
        path: the file.

    Yields:
        The image, not yet decoded.

    Raises:
        UnreadableImage: the file is not a regular file, or the block fails; the error names the file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cem_fast.data.images import opened
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "grey.png"
        ...     Image.new("L", (8, 6)).save(path)
        ...     with opened(path) as image:
        ...         print(image.mode, image.size)
        L (8, 6)
    """
    try:
        require_regular(path)
        with warnings.catch_warnings():
            # below the limit that raises, a large photograph is no reason to warn
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        with image:
            yield image
    except FileNotFoundError:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, f"it is damaged, or none of {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise UnreadableImage(path, f"{str(error).rstrip('.')}; scale it down or remove it") from error
    except Exception as error:  # the decoders' errors on damaged files have no common class
        raise UnreadableImage(path, str(error) or type(error).__name__) from error


@contextmanager
def collected(errors: list[UnreadableImage]) -> Iterator[None]:
    """Appends an UnreadableImage of the block to a list instead of raising it.

    Args:
        errors: the list.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data.images import UnreadableImage, collected
        >>> errors = []
        >>> with collected(errors):
        ...     raise UnreadableImage(Path("cat.png"), "it is empty")
        >>> errors[0].path
        PosixPath('cat.png')
    """
    try:
        yield
    except UnreadableImage as error:
        errors.append(error)


def raise_all(errors: Sequence[UnreadableImage], remedy: str = "") -> None:
    """Raises one error for all files that cannot be read; nothing if there is none.

    Args:
        errors: one error per file.
        remedy: end of the message, such as what the user can do.

    Raises:
        ValueError: there are errors. Its message holds the first few, and the names of the other files.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data.images import UnreadableImage, raise_all
        >>> raise_all([])
        >>> raise_all([UnreadableImage(Path(name), "empty") for name in "abcde"])
        Traceback (most recent call last):
        ...
        ValueError: 5 files are not usable: cannot read a as an image: empty; ...; and d, e
    """
    if len(errors) == 1:
        raise ValueError(f"{errors[0]}{remedy}")
    if errors:
        named = [str(error) for error in errors[:NAMED]]
        others = ", ".join(str(error.path) for error in errors[NAMED:])
        more = [f"and {others}"] if others else []
        raise ValueError(f"{len(errors)} files are not usable: {'; '.join(named + more)}{remedy}")


def read_all(paths: Sequence[Path], size: int, mode: str, *, side: int | None = None) -> Tensor:
    """Reads image files: upright, on white where they are transparent, and resized to squares with antialiasing.

    Args:
        paths: the files.
        size: side of the squares in pixels.
        mode: ``L`` for grey, ``RGB`` for color.
        side: side in pixels that every file must have; None for any.

    Returns:
        ``[N, 1 or 3, size, size]`` float32 in [0, 1].

    Raises:
        ValueError: a file is corrupt, is not an image, has other sides, or does not say which value is white. The error names all
            such files, the first few with the reason.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cem_fast.data.images import read_all
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "grey.png"
        ...     Image.new("L", (8, 6), 51).save(path)
        ...     images = read_all([path], 4, "RGB")
        >>> images.shape, round(float(images.mean()), 3)
        (torch.Size([1, 3, 4, 4]), 0.2)
    """
    images, errors = read_some(paths, (size, size), mode, side=side)
    raise_all(errors)
    return images


def read_some(
    paths: Sequence[Path], size: tuple[int, int], mode: str, *, side: int | None = None
) -> tuple[Tensor, list[UnreadableImage]]:
    """Reads image files as ``read_all`` does, and collects the errors.

    Args:
        paths: the files.
        size: width and height in pixels.
        mode: ``L`` for grey, ``RGB`` for color.
        side: side in pixels that every file must have; None for any.

    Returns:
        ``[N, 1 or 3, H, W]`` float32 in [0, 1], and one error for each file that cannot be read, whose image is undefined.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data.images import read_some
        >>> images, errors = read_some([], (8, 6), "L")
        >>> images.shape, errors
        (torch.Size([0, 1, 6, 8]), [])
    """
    images = torch.empty(len(paths), 3 if mode == "RGB" else 1, size[1], size[0])
    errors: list[UnreadableImage] = []
    for index, path in enumerate(paths):
        with collected(errors), opened(path) as image:
            if side is not None and image.size != (side, side):
                raise ValueError(f"it must have {side}x{side} pixels, got {image.size[0]}x{image.size[1]}")
            images[index] = pixels(upright(image), mode, size)
    return images, errors


def resized(images: Tensor, size: int | None) -> Tensor:
    """Resizes images to squares with antialiasing.

    Args:
        images: ``[N, C, H, W]`` in [0, 1].
        size: side of the squares in pixels; None keeps the images as they are.

    Returns:
        ``[N, C, size, size]`` in [0, 1].

    Example:
        >>> import torch
        >>> from cem_fast.data.images import resized
        >>> resized(torch.ones(2, 1, 8, 8), 4).shape
        torch.Size([2, 1, 4, 4])
    """
    if size in (None, images.shape[-1]):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp_(0, 1)


def is_grey(image: Image.Image) -> bool:
    """Whether a PIL image is stored without color.

    Args:
        image: the image.

    Example:
        >>> from PIL import Image
        >>> from cem_fast.data.images import is_grey
        >>> is_grey(Image.new("LA", (8, 8))), is_grey(Image.new("RGB", (8, 8)))
        (True, False)
    """
    return image.mode.partition(";")[0] in ("1", "L", "LA", "La", "I", "F")


def is_deep(image: Image.Image) -> bool:
    """Whether a PIL image has more than 8 bits a channel.

    Args:
        image: the image.

    Example:
        >>> from PIL import Image
        >>> from cem_fast.data.images import is_deep
        >>> is_deep(Image.new("I;16", (8, 8))), is_deep(Image.new("RGB", (8, 8)))
        (True, False)
    """
    return image.mode.partition(";")[0] in ("I", "F")


def is_of_unknown_range(image: Image.Image) -> bool:
    """Whether a PIL image holds integers of more than 8 bits and does not declare which value is white.

    Args:
        image: the image, as it was opened.

    Example:
        >>> from PIL import Image
        >>> from cem_fast.data.images import is_of_unknown_range
        >>> is_of_unknown_range(Image.new("I;16", (8, 8))), is_of_unknown_range(Image.new("L", (8, 8)))
        (True, False)
    """
    return image.mode.partition(";")[0] == "I" and _declared_white(image) is None


def require_bright(images: Tensor, source: str) -> None:
    """Raises if deep grey images are so dark that they probably hold fewer bits than assumed.

    Args:
        images: all images of the data set for which ``is_of_unknown_range`` holds, ``[N, C, H, W]`` in [0, 1].
        source: where they come from, for the error.

    Raises:
        ValueError: no pixel exceeds a quarter of the assumed range.

    Example:
        >>> import torch
        >>> from cem_fast.data.images import require_bright
        >>> require_bright(torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)), "photos")
    """
    if len(images) and images.max() <= DIM:
        raise ValueError(
            f"the grey images of more than 8 bits in {source} were read with 65535 as white and reach at most "
            f"{float(images.max()) * 65535:.0f}, as images of 10, 12 or 14 bits do: scale their pixels to the full 16 bits"
        )


def upright(image: Image.Image) -> Image.Image:
    """A PIL image as it is to be looked at: turned as its EXIF orientation says, with one scale for deep grey.

    Args:
        image: an image, as it was opened.

    Returns:
        The image. Grey of more than 8 bits becomes floating point in [0, 1] if its range is the one assumed or declared.

    Raises:
        ValueError: it holds values outside of that range.

    Example:
        >>> from PIL import Image
        >>> from cem_fast.data.images import upright
        >>> image = upright(Image.new("I;16", (8, 6), 13107))
        >>> image.mode, round(image.getpixel((0, 0)), 3)
        ('F', 0.2)
    """
    return ImageOps.exif_transpose(_scaled(image))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image file after its EXIF orientation is applied, without decoding it.

    Args:
        image: an image, as it was opened.

    Example:
        >>> from PIL import Image
        >>> from cem_fast.data.images import upright_size
        >>> image = Image.new("L", (8, 6))
        >>> image.getexif()[0x0112] = 6
        >>> upright_size(image)
        (6, 8)
    """
    width, height = image.size
    return (height, width) if image.getexif().get(ORIENTATION) in (5, 6, 7, 8) else (width, height)


def pixels(image: Image.Image, mode: str, size: tuple[int, int] | None = None) -> Tensor:
    """Pixels of a PIL image; transparent ones are laid on white.

    Args:
        image: with 8 bits a channel or fewer, a palette, 16-bit grey, or floating-point grey in [0, 1].
        mode: ``L`` for grey, ``RGB`` for color.
        size: width and height in pixels that it is resized to with antialiasing; None keeps its own.

    Returns:
        ``[1 or 3, H, W]`` float32 in [0, 1].

    Raises:
        ValueError: it holds values outside of that range.

    Example:
        >>> from PIL import Image
        >>> from cem_fast.data.images import pixels
        >>> pixels(Image.new("RGBA", (8, 8), (255, 0, 0, 0)), "RGB").mean((1, 2))  # transparent
        tensor([1., 1., 1.])
    """
    image = _scaled(image)
    deep = image.mode == "F"
    if not deep:
        image = _opaque(image).convert(mode)
    if size is not None:
        image = image.resize(size, Image.Resampling.BILINEAR)
    found = torch.from_numpy(np.array(image)).float()
    if deep:
        return found.expand(3 if mode == "RGB" else 1, -1, -1)
    return found[None] / 255 if mode == "L" else found.permute(2, 0, 1) / 255


def eight_bits(image: Image.Image) -> Image.Image:
    """A PIL image in color with 8 bits a channel; transparent pixels are laid on white.

    Args:
        image: as for ``pixels``.

    Raises:
        ValueError: as for ``pixels``.

    Example:
        >>> from PIL import Image
        >>> from cem_fast.data.images import eight_bits
        >>> eight_bits(Image.new("I;16", (8, 8), 13107)).getpixel((0, 0))
        (51, 51, 51)
    """
    image = _scaled(image)
    if image.mode == "F":
        image = Image.fromarray(np.rint(255 * np.asarray(image)).astype(np.uint8))
    return _opaque(image).convert("RGB")


def _declared_white(image: Image.Image) -> float | None:
    """The value of white that a file of grey integers declares; None where it leaves that to the reader."""
    if image.format == "PPM":  # Pillow scales these by the maximum in their header
        return 65535.0
    tags = getattr(image, "tag_v2", {})
    if whitest := tags.get(WHITEST):
        return float(np.max(whitest))
    bits = int(np.max(tags.get(BITS, 16))) - (tags.get(SAMPLE_FORMAT) == (2,))  # a sign takes one
    return float(2**bits - 1) if bits < 16 else None


def _scaled(image: Image.Image) -> Image.Image:
    """Deep grey as floating point in [0, 1], which PIL would clip to 8 bits; any other image unchanged."""
    if not is_deep(image):
        return image
    values = np.array(image, dtype=np.float32)
    white = 1.0 if image.mode.startswith("F") else _declared_white(image) or 65535.0
    if not 0 <= values.min() <= values.max() <= white:
        raise ValueError(f"its pixels must lie between 0 and {white:g}, got {values.min():g} to {values.max():g}")
    if getattr(image, "tag_v2", {}).get(PHOTOMETRIC) == 0:  # white is zero; Pillow inverts 8 bits alone
        values = white - values
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = white
    scaled = Image.fromarray(values / white)
    scaled.info.update({key: value for key, value in image.info.items() if key != "transparency"})
    if orientation := image.getexif().get(ORIENTATION):
        scaled.getexif()[ORIENTATION] = orientation
    return scaled


def _opaque(image: Image.Image) -> Image.Image:
    """The image on white; itself where no pixel is transparent."""
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image
    colored = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), colored)
