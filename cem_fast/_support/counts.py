"""Checks of counts and of other numbers."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

IMAGE_SIDES = (8, 2048)  # the least and the greatest side of an image to learn from, in pixels


def require_count(name: str, value: Any, least: int = 1, most: int = 2**63 - 1) -> None:
    """Raises unless a value is an integer of at least ``least``, and at most ``most``.

    Args:
        name: name of the argument, for the error.
        value: the value.
        least: the least that is allowed.
        most: the greatest that is allowed.

    Raises:
        TypeError: the value is no integer.
        ValueError: the value is too small or too large.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer of at least {least}, got {value!r}")
    count = int(value)
    if count < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if count > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def require_number(name: str, value: Any) -> float:
    """Raises unless a value is a real number, and returns it as a float; one too large for a float as infinity.

    Args:
        name: name of the argument, for the error.
        value: the value.

    Raises:
        TypeError: the value is no real number.
    """
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(number)
    except OverflowError:  # of an integer
        return math.inf if number > 0 else -math.inf
