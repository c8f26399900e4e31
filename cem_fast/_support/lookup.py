"""Lookup of names in a table of options, with helpful errors."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping
from typing import TypeVar

Option = TypeVar("Option")


def lookup(kind: str, name: str, options: Mapping[str, Option]) -> Option:
    """Returns ``options[name]``.

    Args:
        kind: kind of the option, for the error (``"defense"``).
        name: the user's name.
        options: the options by name.

    Raises:
        ValueError: the name is unknown; the error lists all options and the nearest one.
    """
    if isinstance(name, Hashable) and name in options:
        return options[name]
    nearest = difflib.get_close_matches(str(name), options, n=1, cutoff=0.0)
    raise ValueError(f"unknown {kind} {name!r}: expected one of {', '.join(options)}; the nearest is {nearest[0]!r}")
