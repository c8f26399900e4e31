"""Checks of counts."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def require_count(name: str, value: Any, least: int = 1) -> None:
    """Raises unless a value is an integer of at least ``least``.

    Args:
        name: name of the argument, for the error.
        value: the value.
        least: the least that is allowed.

    Raises:
        TypeError: the value is no integer.
        ValueError: the value is too small.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
