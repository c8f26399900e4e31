"""Builds a source distribution, a wheel from it, and runs the tests of the operations on that, away from the source tree.

usage: python tests/wheel.py [--torch REQUIREMENT]

The source distribution is made without CUDA and must hold the CUDA sources all the same. The wheel has the CUDA kernels if the package
in the source tree has them. They must then load under a torch for CUDA, which needs no GPU.

With ``--torch torch==X`` the same wheel is also installed into a new environment with that release of torch, to show that one
binary serves several. The sources are then built there, too, without any part left out, and tested again; Triton's kernels are
interpreted by the Triton of that release.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTED = ["ops", "test_loss.py", "mixture/test_model.py", "test_bounds.py"]
LOCATE = """
import sys, torch, cem_fast
from cem_fast.ops import backend
serving = cem_fast.backends()["on CPU tensors"]
cuda = len(backend.cuda_operators()) if sys.argv[2] == "cuda" and torch.version.cuda else "no"
print("torch", torch.__version__, "| cem_fast", cem_fast.__file__, "|", serving, "|", cuda, "compiled CUDA operators loaded")
sys.exit(not (cem_fast.__file__.startswith(sys.argv[1]) and serving.startswith("compiled")))
"""


def call(*command: str | Path, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)  # type: ignore[call-overload]


def run_tests(python: str | Path, tests: Path, cuda: bool, *more: str, site: Path | None = None) -> None:
    """Runs the tests with the package, CUDA kernels and all if ``cuda``, installed for ``python`` or in ``site``."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("CEM_FAST", "PYTHON"))}
    if site is not None:
        environment["PYTHONPATH"] = str(site)
    call(python, "-c", LOCATE, tests.parent, "cuda" if cuda else "cpu", cwd=tests, env=environment)
    call(python, "-m", "pytest", "-q", *TESTED, *more, cwd=tests, env=environment)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", help="also run the wheel under this release, for example torch==2.11.0")
    torch_requirement = parser.parse_args().torch
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
        without_cuda = {**os.environ, "CEM_FAST_CUDA": "0"}
        build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", place]
        call(*build, ROOT, env=without_cuda, stdout=subprocess.DEVNULL)
        (archive,) = place.glob("*.tar.gz")
        with tarfile.open(archive) as files:
            files.extractall(place, filter="data")
        source = place / archive.name.removesuffix(".tar.gz")
        cuda = any((ROOT / "cem_fast").glob("_C_cuda.*"))
        must_build = {**os.environ, "CEM_FAST_CPP": "1", "CEM_FAST_CUDA": str(int(cuda))}
        call(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", place / "dist", source, env=must_build)
        (wheel,) = (place / "dist").glob("*.whl")
        print(wheel.name, f"{wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        tests = place / "tests"
        shutil.copytree(source / "tests", tests)
        # the tests' own settings, without the repository around them
        shutil.copy(source / "pyproject.toml", place / "pyproject.toml")
        call(*pip, "install", "--no-deps", "--target", place / "site", wheel)
        run_tests(sys.executable, tests, cuda, site=place / "site")
        if torch_requirement:
            venv.create(place / "env", with_pip=True)
            python = place / "env/bin/python"
            install = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
            # all at once, because torch limits the releases of setuptools, and Triton 3.6 those of NumPy
            tools = ["pytest", "pytest-timeout", "setuptools>=77", "wheel", "pybind11>=3", "ninja", "numpy<2.4"]
            call(*install, wheel, torch_requirement, *tools)
            run_tests(python, tests, cuda)
            print("built from source:", flush=True)
            rebuild = ["--force-reinstall", "--no-deps", "--no-build-isolation", "--editable", source]
            call(*install, *rebuild, env=must_build)
            run_tests(python, source / "tests", cuda, "kernels")


if __name__ == "__main__":
    main()
