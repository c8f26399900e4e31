"""Files: reading strangers' safely, writing atomically, and an early check that they can be written."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

MIB = 1 << 20
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def require_path(name: str, value: Any) -> None:
    """Raises unless an argument is a path.

    Args:
        name: name of the argument, for the error.
        value: the argument.

    Raises:
        TypeError: it is something else.

    Example:
        >>> from cem_fast._support.files import require_path
        >>> require_path("path", None)
        Traceback (most recent call last):
        ...
        TypeError: path must be a path (str or os.PathLike), got NoneType
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path (str or os.PathLike), got {type(value).__name__}")


def require_regular(path: Path) -> None:
    """Raises unless a path is a regular file, or a link to one: reading a FIFO or a device could block forever.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is something else.

    Example:
        >>> import os
        >>> from pathlib import Path
        >>> from cem_fast._support.files import require_regular
        >>> require_regular(Path(os.devnull))
        Traceback (most recent call last):
        ...
        ValueError: /dev/null must be a regular file, got a character device
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} must be a regular file, got {KINDS.get(stat.S_IFMT(mode), 'something else')}")


def read_bytes(path: str | Path, *, at_most: int) -> bytes:
    """Reads a regular file of limited size, which somebody else may have made.

    Args:
        path: the file.
        at_most: largest accepted number of bytes.

    Raises:
        FileNotFoundError: there is no such file.
        OSError: it cannot be read.
        ValueError: it is larger, or no regular file.

    Example:
        >>> import tempfile
        >>> from cem_fast._support.files import read_bytes
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(b"12345")
        ...     file.flush()
        ...     read_bytes(file.name, at_most=5)
        b'12345'
    """
    path = Path(path)
    require_regular(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > at_most:
            raise ValueError(f"{path} must have at most {at_most:,} bytes, got {size:,}")
        return file.read(size)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file atomically and durably: it is complete or absent, and survives a power cut after the call.

    Args:
        path: the file; an existing one is replaced.
        content: its bytes.

    Raises:
        OSError: the file cannot be written; the error names it, and an existing file is kept.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_target(folder: str | Path, marks: Mapping[str, bytes]) -> None:
    """Fails early if the output files could not be written later. Creates nothing.

    Args:
        folder: folder for the files; it need not exist.
        marks: by the path of a file in the folder, bytes that the head of an existing one contains if this package wrote it.

    Raises:
        ValueError: the folder cannot be created or written to, or another program wrote one of the files.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from cem_fast._support.files import check_target
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_target(Path(folder) / "new", {"report.html": b"<title>cem_fast"})
        ...     list(Path(folder).iterdir())
        []
    """
    if not str(folder):
        raise ValueError("folder must be the path of a folder, got ''")
    folder = Path(folder)
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            if missing:
                folder.mkdir(parents=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        finally:
            for path in missing:
                with suppress(OSError):
                    path.rmdir()
    except OSError as error:
        raise ValueError(f"folder must be one that can be written to, got {str(folder)!r} ({error.strerror})") from None
    for path, mark in ((folder / name, mark) for name, mark in marks.items()):
        try:
            require_regular(path)
            with open(path, "rb") as file:
                head = file.read(1000)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): choose another folder") from None
        if mark not in head:
            raise ValueError(f"{path} was not written by cem_fast and is left alone: choose another folder")


def expanded(path: str | Path) -> Path:
    """A path with ``~`` replaced by the home directory.

    Args:
        path: the path.

    Raises:
        ValueError: the home directory is unknown.

    Example:
        >>> from cem_fast._support.files import expanded
        >>> expanded("images")
        PosixPath('images')
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # a user without a home, as in some containers
        raise ValueError(f"no home directory is known for {path}: give the path without ~") from error
