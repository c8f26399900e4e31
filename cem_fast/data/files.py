"""Files and folders of a data set: which of them count."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# left in folders by operating systems and archivers, next to names that begin with a dot
CLUTTER = frozenset({"__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information"})


def is_clutter(path: Path) -> bool:
    """Whether any part of a path is hidden, or was left by an operating system.

    Args:
        path: the path, relative to the folder in question.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data.files import is_clutter
        >>> [is_clutter(Path(path)) for path in ("cats/1.png", "cats/.thumbnails/1.png", "__MACOSX/cats/1.png")]
        [False, True, True]
    """
    return any(map(_is_clutter, path.parts))


def _is_clutter(name: str) -> bool:
    return name.startswith(".") or name in CLUTTER


def folders_in(path: Path) -> list[Path]:
    """Folders directly in a folder, sorted; clutter and dangling links are left out.

    Args:
        path: the folder.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from cem_fast.data.files import folders_in
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("dogs", "cats", ".git"):
        ...         (Path(root) / name).mkdir()
        ...     print([path.name for path in folders_in(Path(root))])
        ['cats', 'dogs']
    """
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not is_clutter(Path(entry.name)))


def files_in(path: Path, *, nested: bool = False) -> list[Path]:
    """Files in a folder, sorted; clutter and dangling links are left out, but not FIFOs and devices, which readers refuse.

    Args:
        path: the folder.
        nested: whether files in its sub-folders count.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from cem_fast.data.files import files_in
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("b.png", "a.png", ".a.png"):
        ...         (Path(root) / name).touch()
        ...     print([path.name for path in files_in(Path(root))])
        ['a.png', 'b.png']
    """
    return [path.joinpath(*parts) for parts in sorted(_walk(path, (), nested))]


def _walk(path: Path | str, before: tuple[str, ...], nested: bool) -> Iterator[tuple[str, ...]]:
    """The relative parts of the files in a folder. Links to folders are left out."""
    with os.scandir(path) as entries:
        for entry in entries:
            if _is_clutter(entry.name):
                continue
            if entry.is_dir(follow_symlinks=False):
                if nested:
                    yield from _walk(entry.path, (*before, entry.name), nested)
            elif not entry.is_symlink() or (os.path.exists(entry.path) and not entry.is_dir()):
                yield (*before, entry.name)
