"""The folder of downloaded data sets, and the error for a missing one."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "CEM_FAST_DATA"
SKIP_CORRUPT = "CEM_FAST_SKIP_CORRUPT"  # 1: folders are read without the files that cannot be read
DEFAULT = "~/.cache/cem_fast"


def data_root() -> Path:
    """Folder of downloaded data sets: the environment variable ``CEM_FAST_DATA``, or ``~/.cache/cem_fast``.

    Raises:
        ValueError: it lies in a home directory that is unknown.

    Example:
        >>> import os
        >>> from unittest import mock
        >>> from cem_fast import data
        >>> with mock.patch.dict(os.environ, CEM_FAST_DATA="/tmp/images"):
        ...     print(data.data_root())
        /tmp/images
    """
    path = Path(os.environ.get(VARIABLE) or DEFAULT)
    try:
        return path.expanduser()
    except RuntimeError as error:  # a user without a home, as in some containers
        raise ValueError(
            f"no home directory is known for {path}: --data-root or {VARIABLE} names a folder for data sets"
        ) from error


def missing(name: str, path: Path) -> FileNotFoundError:
    """Error for a data set that is missing.

    Args:
        name: name of the data set.
        path: missing file or folder.

    Returns:
        The error, to be raised.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.data.root import missing
        >>> print(missing("cifar10", Path("cifar-10-batches-py")))
        cifar10 is not there, no cifar-10-batches-py: `cem-fast data fetch cifar10` gets it; --data-root or CEM_FAST_DATA names another root
    """
    return FileNotFoundError(
        f"{name} is not there, no {path}: `cem-fast data fetch {name}` gets it; --data-root or {VARIABLE} names another root"
    )
