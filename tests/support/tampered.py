"""JSON documents with one entry changed or removed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

VALUES = [..., None, True, -1, 2, 1.5, "2", [], [1], {}, {"a": 1}]


def places(value: Any, *above: str | int) -> Iterator[tuple[str | int, ...]]:
    """Every place in a document, in lists only the first entry."""
    if above:
        yield above
    if isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, *above, key)
    elif isinstance(value, list) and value:
        yield from places(value[0], *above, 0)


def changed(document: Any, place: tuple[str | int, ...], value: Any) -> Any:
    """A copy with another value in one place; ``...`` removes it."""
    document = inner = json.loads(json.dumps(document))
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return document
