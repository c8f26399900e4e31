"""Warnings that show the caller's line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

_INSIDE = tuple(f"{Path(file).parent}{os.sep}" for file in (Path(__file__).parent, torch.__file__))


def warn(message: str) -> None:
    """Warns at the line of the user's code that led here, below frames of this package and of torch.

    Args:
        message: what the warning says.

    Example:
        >>> import warnings
        >>> from cem_fast._support.warn import warn
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warnings.simplefilter("always")
        ...     warn("these images are small")
        >>> said[0].message
        UserWarning('these images are small')
    """
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
