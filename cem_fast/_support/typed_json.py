"""JSON to frozen dataclasses and back. A file may have been edited, so every entry is checked."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache, partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from cem_fast._support.files import MIB, read_bytes

T = TypeVar("T")
_NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}
_LONGEST = 100  # characters of a wrong value in an error
_LARGEST = 32 * MIB  # of a file, a hundred times the largest that is written
_MOST_INTEGER = 2**63  # what other programs and torch can take


def load(path: str | Path) -> Any:
    """Reads a JSON file that somebody else may have made.

    Args:
        path: the file, of 32 MiB at most.

    Returns:
        What ``json.loads`` returns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, nested too deeply, too large or no regular file, or an object names a key twice.

    Example:
        >>> import tempfile
        >>> from cem_fast._support import typed_json
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(b'{"x": 1}')
        ...     file.flush()
        ...     typed_json.load(file.name)
        {'x': 1}
    """
    return parse(read_bytes(path, at_most=_LARGEST), path)


def load_document(path: str | Path, expected: str, schema: int) -> dict[str, Any]:
    """Reads a JSON file that holds an object of a known schema.

    Args:
        path: the file, of 32 MiB at most.
        expected: description of the object, for the error.
        schema: its value under ``schema``.

    Returns:
        The object.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: as :func:`load`, or it is of another schema.

    Example:
        >>> import tempfile
        >>> from cem_fast._support import typed_json
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(b'{"schema": 1, "x": 2}')
        ...     file.flush()
        ...     typed_json.load_document(file.name, "points of schema 1", schema=1)["x"]
        2
    """
    document = load(path)
    found = document.get("schema") if isinstance(document, dict) else document
    if not isinstance(document, dict) or found != schema:
        raise ValueError(f"{path}: expected {expected}, got {_shown(found)}")
    return document


def parse(content: str | bytes, file: str | Path) -> Any:
    """Parses JSON that somebody else may have written.

    Args:
        content: the text.
        file: the file that it is from, for the error.

    Returns:
        What ``json.loads`` returns.

    Raises:
        ValueError: as :func:`load`.

    Example:
        >>> from cem_fast._support import typed_json
        >>> typed_json.parse('{"x": 1, "x": 2}', "points.json")
        Traceback (most recent call last):
        ValueError: points.json: damaged, not readable as JSON (the key 'x' appears twice)
    """
    try:
        return json.loads(content, object_pairs_hook=_without_repeated_keys)
    except ValueError as error:
        raise ValueError(f"{file}: damaged, not readable as JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{file}: damaged, not readable as JSON (nested too deeply)") from None


def read(kind: type[T], value: object, file: str | Path, *keys: str) -> T:
    """Reads an entry of a JSON file as a type.

    Dataclasses are read field by field. Unknown keys are ignored, since newer versions may have written them. A missing key takes the
    default of its field. A field is called ``field.metadata["json"]`` in the file, where it has one. A class with a method ``from_json``
    reads itself.

    Args:
        kind: ``int``, ``float``, ``str``, ``bool``, ``dict[str, X]``, ``tuple[X, ...]``, ``tuple[X, Y]``, ``X | None``,
            ``X | tuple[X, ...]``, ``Any``, or a dataclass of these.
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

    A field with ``later`` in its metadata is left out while it has its default, so that files of earlier versions keep their bytes.

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
    found = {field: getattr(value, field.name) for field in fields(value)}
    return {
        _key(field): write(each)
        for field, each in found.items()
        if not (field.metadata.get("later") and each == field.default)
    }


def _read(kind: Any, value: Any, file: str | Path, keys: tuple[str, ...]) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if hasattr(kind, "from_json"):
        return _built(partial(kind.from_json, _object(value, file, keys)), file, keys)
    if is_dataclass(kind) and isinstance(kind, type):
        return read_fields(kind, value, file, *keys)
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        present = [each for each in arguments if each is not NoneType]
        chosen = (each for each in present if (get_origin(each) is tuple) == isinstance(value, list))
        return _read(next(chosen, present[0]), value, file, keys)
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
    if isinstance(value, float):
        _require(math.isfinite(value), "finite", value, file, keys)
    elif isinstance(value, int):
        _require(-_MOST_INTEGER <= value < _MOST_INTEGER, "an integer of 64 bits", value, file, keys)
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
        found = _shown(value)
        raise ValueError(f"{file}: {'.'.join(keys) or 'the document'} must be {expected}, got {found}")


def _shown(value: object) -> str:
    try:
        found = repr(value)
    except (RecursionError, ValueError):  # nested too deeply to be shown, or an integer of too many digits
        found = f"a {type(value).__name__}"
    return found if len(found) <= _LONGEST else found[:_LONGEST] + "..."


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (key, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {_shown(key)} appears twice")
    return found


@cache
def _fields(kind: Any) -> dict[Field[Any], Any]:
    hints = get_type_hints(kind)
    return {field: hints[field.name] for field in fields(kind)}


def _key(field: Field[Any]) -> str:
    return field.metadata.get("json", field.name)
