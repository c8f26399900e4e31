"""Decoded images of large folders, kept for the next time."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL

from cem_fast._support.files import require_regular

VERSION = 2
WORTH = 1000  # files from which on they are kept
LARGEST = 4 << 30  # bytes of all that is kept; what was used the longest time ago goes first


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


def find(name: str, count: int) -> tuple[np.ndarray, str] | None:
    """Kept images ``[count, C, H, W]`` uint8 and their note; None if there are none. Never a pickle.

    Args:
        name: their key.
        count: number of images.

    Example:
        >>> from cem_fast.data import cache
        >>> cache.find("no such images", 1)
    """
    try:
        path = next(place().glob(f"{name}*.npy"))
        require_regular(path)
        images = np.load(path, allow_pickle=False)
    except (StopIteration, OSError, ValueError, EOFError, RuntimeError):
        return None
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or len(images) != count:
        return None
    with suppress(OSError):
        os.utime(path)  # used now
    return images, path.stem[len(name) + 1 :]


def keep(name: str, images: np.ndarray, note: str = "") -> None:
    """Keeps images. Does nothing where the folder cannot be written to.

    Args:
        name: their key.
        images: ``[N, C, H, W]`` uint8.
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
        ((2, 1, 4, 4), 'small')
    """
    if images.nbytes > LARGEST // 2:
        return
    with suppress(OSError, RuntimeError):
        path = place() / f"{name}-{note}.npy"
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        others = sorted(path.parent.glob("*.npy"), key=lambda each: each.stat().st_mtime)
        left = sum(each.stat().st_size for each in others) + images.nbytes - LARGEST
        for each in others:
            if left > 0:
                left -= each.stat().st_size
                each.unlink()
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            try:
                np.save(file, images, allow_pickle=False)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
