"""Output that any terminal can print."""

from __future__ import annotations

import sys
import warnings
from io import BytesIO, TextIOWrapper

from rich.table import Table

from cem_fast.cli import console, progress
from cem_fast.config import RunConfig


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


def test_names_cannot_command_the_terminal(capfd, monkeypatch):
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)  # restored after the test
    console.escape_warnings()
    name = "cats\x1b[2J\x9b\u202e"
    table = Table(title=name)
    table.add_column(name)
    table.add_row(name)
    made = console.make()
    made.print(table)
    made.print(name)
    console.say(made, name)
    console.fail(name)
    progress.Lines(made).failed(0, 1, RunConfig(data=name), name, again=False)
    printed = "".join(capfd.readouterr()) + warnings.formatwarning(name, UserWarning, "file.py", 1)
    assert printed.count(r"\x1b[2J") >= 7
    assert all(c.isprintable() or c in "\n\t" for c in printed)


def test_a_very_long_error_is_shortened(capfd):
    console.fail("x" * 100_000)
    assert len(capfd.readouterr().err) < 2100
