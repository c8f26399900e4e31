"""Decoding of many image files by several processes, to uint8."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL.Image import Resampling
from torch.utils.data import DataLoader, Dataset

from cem_fast.data.images import (
    UnreadableImage,
    collected,
    eight_bits,
    is_deep,
    is_grey,
    is_of_unknown_range,
    opened,
    upright,
    upright_size,
)

CHUNK_BYTES = 4 << 20  # of decoded images that a process sends at once
MANY = 2000  # files from which on processes are worth their start

Steps = Callable[[int, int], None]
"""Called with the files decoded and the files in total."""


@dataclass(frozen=True)
class Header:
    """What is known of a file before its pixels.

    Args:
        size: width and height, upright.
        grey: whether it is stored without color.
        deep: whether it has more than 8 bits a channel; its pixels are left out.
        unknown: whether it does not declare which value is white.

    Example:
        >>> from cem_fast.data.decoding import Header
        >>> Header((32, 32), grey=False, deep=False, unknown=False).size
        (32, 32)
    """

    size: tuple[int, int]
    grey: bool
    deep: bool
    unknown: bool


class Decoded(NamedTuple):
    """Decoded files.

    Args:
        images: ``[N, 3, H, W]``, uint8; zeros for a file that is deep or cannot be read. None of them where they are written elsewhere.
        headers: one per file; None for a file that cannot be opened.
        errors: one for each file that cannot be read.

    Example:
        >>> from cem_fast.data.decoding import decode
        >>> decode([], (8, 6), workers=0).images.shape
        (0, 3, 6, 8)
    """

    images: np.ndarray
    headers: list[Header | None]
    errors: list[UnreadableImage]


def decode(
    paths: Sequence[Path],
    size: tuple[int, int],
    *,
    workers: int,
    on_step: Steps = lambda done, total: None,
    into: Callable[[bytes], object] | None = None,
) -> Decoded:
    """Decodes image files: upright, on white where they are transparent, in color, resized to one size with antialiasing.

    The result is the same for any number of workers.

    Args:
        paths: the files.
        size: width and height in pixels.
        workers: processes; 0 for this one. Few files are decoded by this one.
        on_step: called with the files decoded and the files in total.
        into: called with the bytes of a few images at a time, in order, which are then not kept; None keeps all.

    Returns:
        Images, headers and errors, in the order of the files.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from cem_fast.data.decoding import decode
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "grey.png"
        ...     Image.new("L", (8, 8), 51).save(path)
        ...     found = decode([path], (8, 8), workers=0)
        >>> found.images.max(), found.headers[0].grey
        (np.uint8(51), True)
    """
    images = np.zeros((0 if into else len(paths), 3, size[1], size[0]), np.uint8)
    headers: list[Header | None] = []
    errors: list[UnreadableImage] = []
    on_step(0, len(paths))
    for part, found, reasons in _decoded(paths, size, workers):
        if into is None:
            images[len(headers) : len(headers) + len(part)] = part
        else:
            into(part.tobytes())
        errors += [UnreadableImage(paths[len(headers) + index], reason) for index, reason in reasons.items()]
        headers += found
        on_step(len(headers), len(paths))
    return Decoded(images, headers, errors)


Chunk = tuple[np.ndarray, list[Header | None], dict[int, str]]


class _Chunks(Dataset[Chunk]):
    """Chunks of decoded files: images, headers, and by index the reasons why files cannot be read."""

    def __init__(self, paths: Sequence[Path], size: tuple[int, int]):
        self.paths, self.size = paths, size
        self.count = max(1, CHUNK_BYTES // (3 * size[0] * size[1]))

    def __len__(self) -> int:
        return -(-len(self.paths) // self.count)

    def __getitem__(self, index: int) -> Chunk:
        paths = self.paths[index * self.count : (index + 1) * self.count]
        images = np.zeros((len(paths), 3, self.size[1], self.size[0]), np.uint8)
        headers: list[Header | None] = []
        reasons = {}
        for row, path in enumerate(paths):
            header, failed = None, list[UnreadableImage]()
            with collected(failed), opened(path) as image:
                header = Header(upright_size(image), is_grey(image), is_deep(image), is_of_unknown_range(image))
                if not header.deep:
                    found = eight_bits(upright(image))
                    if found.size != self.size:
                        found = found.resize(self.size, Resampling.BILINEAR)
                    images[row] = np.asarray(found).transpose(2, 0, 1)
            headers.append(header)
            if failed:
                reasons[row] = failed[0].reason
        return images, headers, reasons


def _decoded(paths: Sequence[Path], size: tuple[int, int], workers: int) -> Iterator[Chunk]:
    chunks = _Chunks(paths, size)
    workers = min(workers, len(chunks))
    # forked, since a new interpreter would run the caller's script again
    if workers < 2 or len(paths) < MANY or "fork" not in multiprocessing.get_all_start_methods():
        yield from (chunks[index] for index in range(len(chunks)))
        return
    with warnings.catch_warnings():
        # of more processes than cores, and of forks next to threads, which decoding does not use
        warnings.simplefilter("ignore")
        loader = DataLoader(
            chunks,
            batch_size=None,
            num_workers=workers,
            collate_fn=lambda chunk: chunk,
            multiprocessing_context="fork",
            generator=torch.Generator(),  # or a seed would be drawn from the caller's random numbers
        )
        iterator = iter(loader)
    yield from iterator
