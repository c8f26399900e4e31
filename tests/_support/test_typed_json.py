"""JSON to dataclasses and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest

from cem_fast._support import typed_json


@dataclass(frozen=True)
class Inner:
    size: float = field(metadata={"json": "lambda"})
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"lambda must be at least 0, got {self.size}")


@dataclass(frozen=True)
class Outer:
    inner: dict[str, Inner]
    pair: tuple[int, bool]
    note: str | None
    rest: Any = None


DOCUMENT = {"inner": {"a": {"lambda": 1, "names": ["x"]}}, "pair": [2, True], "note": None, "rest": [{}]}


def test_reading_inverts_writing():
    read = typed_json.read(Outer, DOCUMENT, "file.json")
    assert read == Outer({"a": Inner(1, ("x",))}, (2, True), None, [{}])
    assert typed_json.write(read) == DOCUMENT


@pytest.mark.parametrize(
    "change, message",
    [
        ({"inner": []}, r"file.json: inner must be an object, got \[\]"),
        ({"inner": {"a": {}}}, "file.json: inner.a.lambda is missing"),
        ({"inner": {"a": {"lambda": "1"}}}, "file.json: inner.a.lambda must be a number, got '1'"),
        ({"inner": {"a": {"lambda": True}}}, "file.json: inner.a.lambda must be a number, got True"),
        ({"inner": {"a": {"lambda": -1}}}, "file.json: inner.a: lambda must be at least 0, got -1"),
        ({"inner": {"a": {"lambda": 1, "names": [1]}}}, "file.json: inner.a.names.0 must be a string, got 1"),
        ({"pair": [2]}, r"file.json: pair must be a list of 2 entries, got \[2\]"),
        ({"pair": [2.5, True]}, "file.json: pair.0 must be an integer, got 2.5"),
        ({"pair": [2, 1]}, "file.json: pair.1 must be true or false, got 1"),
        ({"note": 3}, "file.json: note must be a string, got 3"),
    ],
)
def test_wrong_entries_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        typed_json.read(Outer, {**DOCUMENT, **change}, "file.json")


def test_a_number_or_a_list_is_either():
    kind = float | tuple[float, ...]
    assert [typed_json.read(kind, value, "it.json") for value in (0.5, [0.5, 1])] == [0.5, (0.5, 1)]
    with pytest.raises(ValueError, match="it.json: std.1 must be a number, got 'a'"):
        typed_json.read(kind, [0.5, "a"], "it.json", "std")
    with pytest.raises(ValueError, match="it.json: std must be a number, got 'a'"):
        typed_json.read(kind, "a", "it.json", "std")


def test_a_list_or_nothing_is_no_scalar():
    kind = tuple[float, ...] | None
    assert [typed_json.read(kind, value, "it.json") for value in (None, [1])] == [None, (1,)]
    for value in (True, 0.5, "a", {}):
        with pytest.raises(ValueError, match="it.json: mean must be a list, got"):
            typed_json.read(kind, value, "it.json", "mean")
    with pytest.raises(ValueError, match="it.json: std must be a number, got None"):
        typed_json.read(float | tuple[float, ...], None, "it.json", "std")


def test_a_document_of_another_kind_is_named_and_cut_short():
    with pytest.raises(ValueError, match=r"file.json: the document must be an object, got \[0, 0, .*\.\.\.$") as raised:
        typed_json.read(Outer, [0] * 1000, "file.json")
    assert len(str(raised.value)) < 200


def test_unknown_keys_are_ignored_and_missing_ones_have_their_defaults():
    assert typed_json.read(Inner, {"lambda": 0.5, "color": "red"}, "file.json") == Inner(0.5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("[" * 100_000, r"f\.json: damaged, not readable as JSON \(nested too deeply\)"),
        ('{"a": 1, "b": 2, "a": 3}', r"f\.json: damaged, not readable as JSON \(the key 'a' appears twice\)"),
        ("1" * 10_000, r"f\.json: damaged, not readable as JSON \(Exceeds"),
        (b"\xff\xfe", r"f\.json: damaged, not readable as JSON"),
    ],
    ids=["deep", "twice", "digits", "bytes"],
)
def test_text_that_is_no_sound_json(text, message):
    with pytest.raises(ValueError, match=message):
        typed_json.parse(text, "f.json")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e400", "1" + "0" * 400])
@pytest.mark.parametrize("kind", [int, float])
def test_numbers_that_no_result_can_be(text, kind):
    with pytest.raises(ValueError, match=r"f\.json: x must be"):
        typed_json.read(kind, typed_json.parse(text, "f.json"), "f.json", "x")


def test_many_repeated_keys_are_refused_at_once():
    pairs = ", ".join(f'"{i // 2}": 0' for i in range(200_000))
    with pytest.raises(ValueError, match="appears twice"):
        typed_json.parse("{" + pairs + "}", "f.json")
