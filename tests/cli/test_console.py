"""Output that any terminal can print."""

from __future__ import annotations

import sys
from io import BytesIO, TextIOWrapper

from cem_fast.cli import console


def test_characters_that_the_encoding_lacks_are_replaced(monkeypatch):
    stream = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(stream, encoding="ascii"))
    console.replace_what_cannot_be_printed()
    print("caf\u00e9 \u00b1 1")
    console.say(console.make(), "[bold]caf\u00e9 :smile: [/x]")
    sys.stdout.flush()
    assert stream.getvalue() == b"caf? ? 1\n[bold]caf? :smile: [/x]\n"


def test_an_error_is_one_line(capfd):
    console.fail("one\n  two")
    assert capfd.readouterr().err == "cem-fast: one two\n"
