"""Looking a name up in a table of options, with an error that helps."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TypeVar

Option = TypeVar("Option")


def lookup(kind: str, name: str, options: Mapping[str, Option]) -> Option:
    """Returns ``options[name]``.

    Args:
        kind: what is being looked up, for the error (``"defense"``).
        name: the name that the user gave.
        options: every valid name and what it stands for.

    Raises:
        ValueError: the name is not among the options; the error names the nearest one.
    """
    if name in options:
        return options[name]
    nearest = difflib.get_close_matches(str(name), options, n=1, cutoff=0.0)
    raise ValueError(f"unknown {kind} {name!r}: expected one of {', '.join(options)}; the nearest is {nearest[0]!r}")
