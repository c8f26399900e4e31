"""The command line, in this process and in one of its own."""

from __future__ import annotations

import subprocess
import sys

from cem_fast.cli import main as cli


def status(*arguments: str) -> int:
    """Exit status of the command line in this process."""
    return cli.main(arguments)


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "cem_fast", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
