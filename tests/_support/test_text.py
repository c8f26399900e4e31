"""Text from files and servers: printed and pasted safely."""

from __future__ import annotations

import subprocess

import pytest

from cem_fast._support.text import printable, shell_line


@pytest.mark.parametrize(
    "text, shown",
    [
        ("café ± [bold] \n\t猫", "café ± [bold] \n\t猫"),
        ("\x1b[2J\x07\r\x9b1m", r"\x1b[2J\x07\r\x9b1m"),
        ("photo\u202egnp.exe", r"photo\u202egnp.exe"),
    ],
)
def test_control_characters_are_escaped(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    "recorded",
    [
        "echo a; touch pwned",
        "echo $(touch pwned)",
        "echo `touch pwned`",
        "echo a && touch pwned",
        "echo '; touch pwned",
        "x\ntouch pwned",
    ],
)
def test_a_recorded_command_runs_no_other_one(recorded, tmp_path):
    subprocess.run(["sh", "-c", shell_line(recorded)], cwd=tmp_path, capture_output=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_a_quoted_command_stays_as_it_is():
    assert shell_line("cem-fast evaluate --folder 'my run'") == "cem-fast evaluate --folder 'my run'"
