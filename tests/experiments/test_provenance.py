"""Provenance: one version, and one digest of the code that decides results, however the package is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import cem_fast
from cem_fast.experiments import provenance

ROOT = Path(cem_fast.__file__).parents[1]
PYTHON_FILES = shutil.ignore_patterns("*.so", "__pycache__", "configs")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The package as a wheel installs it, with kernels and benchmarks inside."""
    package = tmp_path_factory.mktemp("site") / "cem_fast"
    shutil.copytree(ROOT / "cem_fast", package, ignore=PYTHON_FILES)
    for folder in ("kernels", "benchmarks"):
        shutil.copytree(ROOT / folder, package / folder, ignore=shutil.ignore_patterns("results", "__pycache__"))
    return package


def test_every_part_of_the_package_either_decides_or_shows_results(installed):
    parts = {path.stem for path in installed.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts == {*provenance.DECIDES, *provenance.SHOWS}
    assert not {*provenance.DECIDES} & {*provenance.SHOWS}


DIGESTS = """
import cem_fast, pathlib, sys
from cem_fast.experiments import provenance

package = pathlib.Path(sys.argv[1])
assert pathlib.Path(cem_fast.__file__).parent == package


def edit(name):
    paths = [package / f"{name}.py", *(package / name).rglob("*.py")]
    for path in (path for path in paths if path.exists()):
        path.write_text(path.read_text() + "# edited\\n")
    return provenance.source_digest.__wrapped__()


print(provenance.source_digest(), *map(edit, provenance.SHOWS), *map(edit, provenance.DECIDES))
"""


def test_a_wheel_has_the_digest_of_an_editable_install_and_drawings_are_not_in_it(installed):
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, str(installed)],
        cwd=installed.parent, env={**os.environ, "PYTHONPATH": str(installed.parent)},
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    first, *edited = done.stdout.split()
    shown, decided = edited[: len(provenance.SHOWS)], edited[len(provenance.SHOWS) :]
    assert first == provenance.source_digest()
    assert set(shown) == {first}
    assert len({first, *decided}) == 1 + len(provenance.DECIDES)


def test_there_is_one_version():
    assert cem_fast.__version__ == version("cem_fast") == provenance.versions()["cem_fast"]
