"""Checks of counts."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def require_count(name: str, value: Any) -> None:
    """Raises unless a value is an integer of at least 1.

    Args:
        name: name of the argument, for the error.
        value: the value.

    Raises:
        TypeError: the value is no integer.
        ValueError: the value is below 1.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
