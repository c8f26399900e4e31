"""Where downloaded data sets are kept, and what is said where one is missing."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "CEM_FAST_DATA"
DEFAULT = "~/.cache/cem_fast"


def data_root() -> Path:
    """The folder of downloaded data sets: what the environment variable ``CEM_FAST_DATA`` names, or ``~/.cache/cem_fast``."""
    return Path(os.environ.get(VARIABLE) or DEFAULT).expanduser()


def missing(name: str, path: Path) -> FileNotFoundError:
    """The error of a data set that is not where it should be.

    Args:
        name: name of the data set.
        path: what was looked for.
    """
    return FileNotFoundError(
        f"{name} is not there, no {path}: `cem-fast data fetch {name}` gets it; --data-root or {VARIABLE} names another root"
    )
