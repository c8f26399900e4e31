"""JSON to frozen dataclasses and back. A file may have been edited, so every entry is checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
_LONGEST = 100  # characters of a wrong value in an error


def read(kind: type[T], value: object, file: str | Path, *keys: str) -> T:
    """Reads an entry of a JSON file as a type.

    Dataclasses are read field by field. Unknown keys are ignored, since newer versions may have written them. A missing key takes the
    default of its field. A field is called ``field.metadata["json"]`` in the file, where it has one. A class with a method ``from_json``
    reads itself.

    Args:
        kind: ``int``, ``float``, ``str``, ``bool``, ``dict[str, X]``, ``tuple[X, ...]``, ``tuple[X, Y]``, ``X | None``, ``Any``, or a
            dataclass of these.
        value: the entry, as ``json.loads`` returned it.
        file: the file, for the error.
        keys: where in the file the entry is, for the error.

    Returns:
        An instance of ``kind``.

    Raises:
        ValueError: an entry is missing or of another type, or a constructor refuses it; the error names the file and the key.

    Example:
        >>> from dataclasses import dataclass
        >>> from cem_fast._support import typed_json
        >>> @dataclass(frozen=True)
        ... class Point:
        ...     x: float
        ...     label: str | None = None
        >>> typed_json.read(Point, {"x": 1.5, "color": "red"}, "points.json", "first")
        Point(x=1.5, label=None)
        >>> typed_json.read(Point, {"x": "far"}, "points.json", "first")
        Traceback (most recent call last):
        ValueError: points.json: first.x must be a number, got 'far'
    """
    return _read(kind, value, file, keys)


def read_fields(kind: Callable[..., T], value: object, file: str | Path, *keys: str) -> T:
    """Reads a dataclass field by field, also if it has a method ``from_json``, which may call this.

    Args:
        kind: the dataclass.
        value: the entry, as ``json.loads`` returned it.
        file: the file, for the error.
        keys: where in the file the entry is, for the error.

    Returns:
        An instance of ``kind``.

    Raises:
        ValueError: as :func:`read`.

    Example:
        >>> from dataclasses import dataclass
        >>> from cem_fast._support import typed_json
        >>> @dataclass(frozen=True)
        ... class Point:
        ...     x: float
        >>> typed_json.read_fields(Point, {"x": 2}, "points.json")
        Point(x=2)
    """
    entries = _object(value, file, keys)
    found = {}
    for field, hint in _fields(kind).items():
        key = _key(field)
        if key in entries:
            found[field.name] = _read(hint, entries[key], file, (*keys, key))
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{file}: {'.'.join((*keys, key))} is missing")
    return _built(partial(kind, **found), file, keys)


def write(value: object) -> Any:
    """Returns what ``json.dumps`` takes, the inverse of :func:`read`.

    Args:
        value: a dataclass, or a dictionary, list or tuple of dataclasses, numbers, strings, booleans and None. A class with a method
            ``to_json`` writes itself.

    Example:
        >>> from dataclasses import dataclass
        >>> from cem_fast._support import typed_json
        >>> @dataclass(frozen=True)
        ... class Box:
        ...     corners: tuple[int, int]
        >>> typed_json.write({"box": Box((1, 2))})
        {'box': {'corners': [1, 2]}}
    """
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return write_fields(value)
    if isinstance(value, Mapping):
        return {key: write(each) for key, each in value.items()}
    return [write(each) for each in value] if isinstance(value, list | tuple) else value


def write_fields(value: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass under their names in the file, in order.

    Args:
        value: a dataclass.

    Example:
        >>> from dataclasses import dataclass
        >>> from cem_fast._support import typed_json
        >>> @dataclass(frozen=True)
        ... class Point:
        ...     x: float
        >>> typed_json.write_fields(Point(1.5))
        {'x': 1.5}
    """
    return {_key(field): write(getattr(value, field.name)) for field in fields(value)}


def _read(kind: Any, value: Any, file: str | Path, keys: tuple[str, ...]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if hasattr(kind, "from_json"):
        return _built(partial(kind.from_json, _object(value, file, keys)), file, keys)
    if is_dataclass(kind) and isinstance(kind, type):
        return read_fields(kind, value, file, *keys)
    if origin in (Union, UnionType):  # X | None
        return None if value is None else _read(arguments[0], value, file, keys)
    if origin is dict:
        entries = _object(value, file, keys)
        return {key: _read(arguments[1], each, file, (*keys, key)) for key, each in entries.items()}
    if origin is tuple:
        _require(isinstance(value, list), "a list", value, file, keys)
        kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        _require(len(kinds) == len(value), f"a list of {len(kinds)} entries", value, file, keys)
        return tuple(_read(each, v, file, (*keys, str(i))) for i, (each, v) in enumerate(zip(kinds, value)))
    fits = isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))
    _require(fits, _NAMES[kind], value, file, keys)
    return value


def _built(build: Callable[[], T], file: str | Path, keys: tuple[str, ...]) -> T:
    try:
        return build()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {'.'.join(keys)}{': ' if keys else ''}{error}") from None


def _object(value: object, file: str | Path, keys: tuple[str, ...]) -> dict[str, Any]:
    _require(isinstance(value, dict), "an object", value, file, keys)
    assert isinstance(value, dict)
    return value


def _require(fits: bool, expected: str, value: object, file: str | Path, keys: tuple[str, ...]) -> None:
    if not fits:
        found = repr(value)
        found = found if len(found) <= _LONGEST else found[:_LONGEST] + "..."
        raise ValueError(f"{file}: {'.'.join(keys) or 'the document'} must be {expected}, got {found}")


@cache
def _fields(kind: Any) -> dict[Field[Any], Any]:
    hints = get_type_hints(kind)
    return {field: hints[field.name] for field in fields(kind)}


def _key(field: Field[Any]) -> str:
    return field.metadata.get("json", field.name)
