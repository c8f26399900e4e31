"""Atomic writing of files, and an early check that they can be written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path


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
            with open(path, "rb") as file:
                head = file.read(1000)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}): choose another folder") from None
        if mark not in head:
            raise ValueError(f"{path} was not written by cem_fast and is left alone: choose another folder")
