"""What a result was made with: the command, the commit, the versions and the code."""

from __future__ import annotations

import hashlib
import platform
import shlex
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from cem_fast import __version__
from cem_fast.data import Splits
from cem_fast.experiments.records import Identity

PACKAGE = Path(__file__).parents[1]
# Each module and folder of the package is in exactly one of these two lists.
DECIDES = (  # results depend on these: a finished run is not reused after a change in them
    *("_support", "attacks", "bounds", "config", "data", "defenses", "experiments", "functional", "kernels", "loss"),
    *("metrics", "mixture", "models", "ops", "schedule", "training"),
)
SHOWS = ("__init__", "__main__", "audit", "benchmarks", "cli", "cost", "deploy", "report", "tune")


def versions() -> dict[str, str | None]:
    """Versions of everything that a number may depend on; None for a package that is not installed.

    Example:
        >>> from cem_fast.experiments import provenance
        >>> list(provenance.versions())
        ['cem_fast', 'python', 'torch', 'numpy', 'triton', 'safetensors', 'pytorch_msssim']
    """
    installed = {package: _version(package) for package in ("numpy", "triton", "safetensors", "pytorch_msssim")}
    return {"cem_fast": __version__, "python": platform.python_version(), "torch": torch.__version__, **installed}


def commit() -> str | None:
    """Commit of the repository of this code, followed by ``-dirty`` if files have changed since; None outside a repository.

    Example:
        >>> from cem_fast.experiments import provenance
        >>> found = provenance.commit()
        >>> found is None or len(found.removesuffix("-dirty")) == 40
        True
    """
    git = ["git", "-C", str(PACKAGE)]
    try:
        top = _output([*git, "rev-parse", "--show-toplevel"])
        # A virtual environment often lies in the repository of another project, whose commit means nothing here.
        if Path(top) / PACKAGE.name != PACKAGE.resolve():
            return None
        return _output([*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> str:
    """The running command, quoted for a shell.

    Example:
        >>> from cem_fast.experiments import provenance
        >>> isinstance(provenance.command_line(), str)
        True
    """
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


@cache
def source_digest() -> str:
    """Digest of the Python sources in ``DECIDES``, the same for an editable and a regular installation.

    It is computed once per process, since the running code is the code that was read at the start.

    Example:
        >>> from cem_fast.experiments import provenance
        >>> len(provenance.source_digest())
        16
    """
    digest = hashlib.sha256()
    for name, path in _sources():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def identity(splits: Splits) -> Identity:
    """Version, code and images: what a result depends on apart from its settings.

    Args:
        splits: the images.

    Example:
        >>> from cem_fast.experiments import build, provenance
        >>> from cem_fast.config import RunConfig
        >>> found = provenance.identity(build.load_data(RunConfig(image_size=16)))
        >>> found.code == provenance.source_digest()
        True
    """
    return Identity(version=__version__, code=source_digest(), images=splits.digest())


def _sources() -> list[tuple[str, Path]]:
    """Names relative to the package, and paths, of the files that decide a result."""
    found = []
    for name in DECIDES:
        spec = find_spec(f"cem_fast.{name}")
        assert spec is not None
        if spec.submodule_search_locations is None:
            found.append((f"{name}.py", Path(str(spec.origin))))
        for folder in map(Path, spec.submodule_search_locations or ()):
            found += [(f"{name}/{path.relative_to(folder).as_posix()}", path) for path in folder.rglob("*.py")]
    return sorted(found)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10, stdin=subprocess.DEVNULL)
    return done.stdout.strip()
