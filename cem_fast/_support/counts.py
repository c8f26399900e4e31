"""Checks of counts."""

from __future__ import annotations

from numbers import Integral
from typing import Any

IMAGE_SIDES = (8, 2048)  # the least and the greatest side of an image to learn from, in pixels


def require_count(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """Raises unless a value is an integer of at least ``least``, and at most ``most``.

    Args:
        name: name of the argument, for the error.
        value: the value.
        least: the least that is allowed.
        most: the greatest that is allowed; None for any.

    Raises:
        TypeError: the value is no integer.
        ValueError: the value is too small or too large.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}")
    count = int(value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and count > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
