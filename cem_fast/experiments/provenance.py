"""What a result was made with: the command, the commit, the versions, the code itself."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cem_fast.data import Splits
from cem_fast.experiments.records import Identity

PACKAGE = Path(__file__).parents[1]
# They show results and cannot change one, so a finished run outlives an edit to them.
PRESENTATION = ("cli/", "report/")


def package_version() -> str:
    """Version of the installed package; ``unknown`` where it runs from a folder that was never installed."""
    return _version("cem_fast") or "unknown"


def versions() -> dict[str, str | None]:
    """Versions of everything that a number may depend on."""
    installed = {package: _version(package) for package in ("numpy", "triton", "safetensors", "pytorch_msssim")}
    own = {"cem_fast": package_version(), "python": platform.python_version(), "torch": torch.__version__}
    return {**own, **installed}


def commit() -> str | None:
    """Commit of this code's repository, with ``-dirty`` after it if files changed since; None outside one."""
    git = ["git", "-C", str(PACKAGE)]
    try:
        top = _output([*git, "rev-parse", "--show-toplevel"])
        # A virtual environment often lies inside some other project's repository, whose commit says nothing here.
        if Path(top) / PACKAGE.name != PACKAGE.resolve():
            return None
        return _output([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> str:
    """The command that is running, ready to be pasted into a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@cache
def source_digest() -> str:
    """Digest of the Python sources that a result depends on: a finished run is not reused after they change.

    It is taken once, because the code in force is the code that was read when the process started.
    """
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(PRESENTATION):
            digest.update(name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def identity(splits: Splits) -> Identity:
    """What a result depends on besides its settings: the version, the code and the images."""
    return Identity(version=package_version(), code=source_digest(), images=splits.digest())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, stdin=subprocess.DEVNULL)
    return done.stdout.strip()
