"""Decoded images of large folders, kept for the next time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np
import PIL

from cem_fast.data.stored import StoredImages

VERSION = 2
WORTH = 1000  # files from which on they are kept
LARGEST = 4 << 30  # bytes of all that is kept; what was used the longest time ago goes first
PART = ".part"  # suffix of a file that is being written
ABANDONED = 86400  # seconds after which such a file is one that a killed process has left


def place() -> Path:
    """The folder of kept images, ``$XDG_CACHE_HOME/cem_fast/images``, or ``~/.cache/cem_fast/images``.

    Raises:
        RuntimeError: it lies in a home directory that is unknown.

    Example:
        >>> import os
        >>> from unittest import mock
        >>> from cem_fast.data import cache
        >>> with mock.patch.dict(os.environ, XDG_CACHE_HOME="/tmp/mine"):
        ...     print(cache.place())
        /tmp/mine/cem_fast/images
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return root / "cem_fast" / "images"


def key(root: Path, paths: Sequence[Path], **settings: object) -> str:
    """Digest of the paths, sizes and times of files, and of what else decides their decoded images.

    Args:
        root: folder that holds the files.
        paths: the files.
        settings: further settings, such as the side.

    Raises:
        OSError: a file is not there.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data import cache
        >>> len(cache.key(Path(), [], side=8))
        32
    """
    digest = hashlib.sha256(json.dumps([VERSION, PIL.__version__, str(root.resolve()), settings], default=str).encode())
    for path in paths:
        found = os.stat(path)
        digest.update(f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def find(name: str, count: int) -> tuple[StoredImages, str] | None:
    """Kept images ``[count, C, H, W]`` uint8, not yet read, and their note; None if there are none. Never a pickle or a link.

    Args:
        name: their key.
        count: number of images.

    Example:
        >>> from cem_fast.data import cache
        >>> cache.find("no such images", 1)
    """
    try:
        path = next(place().glob(f"{name}*.npy"))
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
            images = StoredImages(file)
    except (StopIteration, OSError, ValueError, RuntimeError):
        return None
    if images.kind != np.uint8 or len(images) != count:
        return None
    with suppress(OSError):
        os.utime(path)  # used now
    return images, path.stem[len(name) + 1 :]


@contextmanager
def scratch(size: int) -> Iterator[IO[bytes]]:
    """An empty file for so many bytes, among the kept images; at the end it loses its name, unless its images are kept.

    Args:
        size: number of bytes.

    Yields:
        The file, open for reading and writing.

    Raises:
        ValueError: the folder cannot be written to, or has too little space.

    Example:
        >>> import os, tempfile
        >>> from unittest import mock
        >>> from cem_fast.data import cache
        >>> with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        ...     with cache.scratch(1000) as file:
        ...         print(len(list(cache.place().iterdir())))
        ...     print(len(list(cache.place().iterdir())))
        1
        0
    """
    try:
        place().mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(place()).free
        if free < size:
            raise ValueError(
                f"the images take {size / 1e9:.1f} GB of {place()}, which has {free / 1e9:.1f} GB left: XDG_CACHE_HOME names "
                "another folder for them"
            )
        file = tempfile.NamedTemporaryFile("w+b", dir=place(), suffix=PART, delete=False)  # noqa: SIM115, closed below
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"images that do not fit into memory need a folder that can be written to, and XDG_CACHE_HOME gives none ({error})"
        ) from error
    try:
        with file:
            yield file
    finally:
        Path(file.name).unlink(missing_ok=True)


def keep(name: str, images: np.ndarray | StoredImages, note: str = "") -> None:
    """Keeps images. Does nothing where the folder cannot be written to, or with an array that takes more than half of the room.

    Args:
        name: their key.
        images: ``[N, C, H, W]`` uint8; the file of stored images becomes the kept one, whatever its size.
        note: a few letters and digits, for the name of the file.

    Example:
        >>> import os, tempfile
        >>> from unittest import mock
        >>> import numpy as np
        >>> from cem_fast.data import cache
        >>> with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, XDG_CACHE_HOME=folder):
        ...     cache.keep("mine", np.zeros((2, 1, 4, 4), np.uint8), "small")
        ...     images, note = cache.find("mine", 2)
        >>> images.shape, note
        (torch.Size([2, 1, 4, 4]), 'small')
    """
    if isinstance(images, np.ndarray):
        if images.nbytes <= LARGEST // 2:
            with suppress(OSError, ValueError), scratch(images.nbytes) as file:
                np.save(file, images, allow_pickle=False)
                keep(name, StoredImages(file), note)
        return
    with suppress(OSError, RuntimeError):
        _make_room(images.nbytes // 4)
        os.replace(images.name, place() / f"{name}-{note}.npy")


def _make_room(size: int) -> None:
    """Removes what was used the longest time ago, and what a killed process has left, for so many more bytes."""
    for part in place().glob(f"*{PART}"):
        if time.time() - part.stat().st_mtime > ABANDONED:
            part.unlink()
    others = sorted(place().glob("*.npy"), key=lambda each: each.stat().st_mtime)
    left = sum(each.stat().st_size for each in others) + size - LARGEST
    for each in others:
        if left > 0:
            left -= each.stat().st_size
            each.unlink()
