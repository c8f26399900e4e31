"""What make says on a machine that lacks a tool: one line that names it, before anything is downloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def python(folder: Path, lacking: str) -> str:
    """A Python that fails at every piece of code with some text in it."""
    stand_in = folder / "python"
    stand_in.write_text(f'#!/bin/sh\ncase "$*" in *"{lacking}"*) exit 1;; esac\nexec "{sys.executable}" "$@"\n')
    stand_in.chmod(0o755)
    return str(stand_in)


@pytest.mark.parametrize(
    "lacking, message",
    [
        ("sys.version_info", "Python 3.10 or newer is needed as {python} (choose another with PYTHON=...)"),
        ("import venv", "Python's venv module is missing (Debian and Ubuntu: apt install python3-venv)"),
        ("sysconfig", "Python's headers are missing (Debian and Ubuntu: apt install python3-dev)"),
        ("a compiler", "a C++ compiler is needed as c++ (Debian and Ubuntu: apt install g++)"),
    ],
)
def test_a_missing_tool_is_named(lacking, message, tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "make"):
        (tools / tool).symlink_to(shutil.which(tool))
    stand_in = python(tmp_path, lacking)
    settings = {key: value for key, value in os.environ.items() if key not in ("CXX", "MAKEFLAGS", "MAKELEVEL")}
    done = subprocess.run(
        ["make", "test", f"VENV={tmp_path / 'venv'}", f"PYTHON={stand_in}"],
        cwd=ROOT, env={**settings, "PATH": str(tools)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == f"make: {message.format(python=stand_in)}\n"
    assert not (tmp_path / "venv").exists()
