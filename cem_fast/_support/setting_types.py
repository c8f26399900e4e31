"""Types of settings: their names for users, and values of YAML files."""

from __future__ import annotations

from typing import Any, get_args, get_origin

LARGEST_INTEGER = 2**63 - 1


def type_name(kind: Any, *, sequence: str = "list") -> str:
    """Name a type as users read it.

    Args:
        kind: the type.
        sequence: name of a list: ``list`` in YAML, ``tuple`` in Python.

    Example:
        >>> from cem_fast._support.setting_types import type_name
        >>> type_name(tuple[float, ...]), type_name(int | None)
        ('list of float', 'int or null')
    """
    if get_origin(kind) is tuple:
        return f"{sequence} of {type_name(get_args(kind)[0], sequence=sequence)}"
    if get_origin(kind) is dict:
        return "settings"
    if get_args(kind):
        return " or ".join(type_name(option, sequence=sequence) for option in get_args(kind))
    return "null" if kind is type(None) else str(kind.__name__)


def from_yaml(kind: Any, value: Any) -> Any:
    """Convert a value of a YAML file to the type of a setting: lists to tuples, and whole numbers to float where it is expected.

    A value of another type is returned as it is.

    Args:
        kind: type of the setting.
        value: the value.

    Example:
        >>> from cem_fast._support.setting_types import from_yaml
        >>> from_yaml(tuple[float, ...], [0, 0.5])
        (0.0, 0.5)
    """
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(from_yaml(get_args(kind)[0], each) for each in value)
    return float(value) if kind is float and is_of(int, value) and abs(value) <= LARGEST_INTEGER else value


def is_of(kind: Any, value: Any) -> bool:
    """Tell whether a value is of a setting's type; an int is a float, but a bool is no number.

    Args:
        kind: type of the setting.
        value: the value.

    Example:
        >>> from cem_fast._support.setting_types import is_of
        >>> is_of(float, 1), is_of(int, True), is_of(tuple[int, ...], (1, 2))
        (True, False, True)
    """
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(is_of(get_args(kind)[0], each) for each in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict)
    if get_args(kind):
        return any(is_of(option, value) for option in get_args(kind))
    return isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))
