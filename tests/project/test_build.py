"""Builds that fail, and packages that were not compiled."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from cem_fast.ops import backend

ROOT = Path(__file__).resolve().parents[2]


def sources(folder: Path) -> None:
    """Copies what an installation from source reads."""
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for package in ("cem_fast", "benchmarks", "kernels"):
        shutil.copytree(
            ROOT / package, folder / package, ignore=shutil.ignore_patterns("*.so", "results", "__pycache__")
        )


def set_up(folder: Path, *command: str, **variables: str) -> None:
    """Runs setup.py without CUDA."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", *command],
        cwd=folder,
        env={**os.environ, "CEM_FAST_CUDA": "0", **variables},
        check=True,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.long
def test_what_the_compiler_said_is_kept(tmp_path):
    sources(tmp_path)
    compiler = tmp_path / "compiler"
    answers = 'case "$*" in *--version*|*-v*) exec g++ "$@";; esac'
    compiler.write_text(f'#!/bin/sh\n{answers}\necho "x.h: fatal error: no space left" >&2\nexit 1\n')
    compiler.chmod(0o755)
    set_up(tmp_path, "build_ext", "--build-lib", "built", CXX=str(compiler), CC=str(compiler), CEM_FAST_CPP="auto")
    assert (
        tmp_path / "built/cem_fast/_not_built_cpp.txt"
    ).read_text() == f"{compiler} failed: x.h: fatal error: no space left\n"


@pytest.mark.long
def test_an_installation_without_cpp_carries_no_library_of_an_earlier_build(tmp_path):
    sources(tmp_path)
    for name in ("_C", "_C_cpu", "_C_cuda"):
        library = tmp_path / "built/cem_fast" / (name + sysconfig.get_config_var("EXT_SUFFIX"))
        library.parent.mkdir(parents=True, exist_ok=True)
        library.write_bytes(b"of an earlier build")
    set_up(tmp_path, "build", "--build-lib", "built", CEM_FAST_CPP="0")
    assert (tmp_path / "built/cem_fast/__init__.py").exists()
    assert not list((tmp_path / "built").rglob("*.so"))
    reasons = [(tmp_path / f"built/cem_fast/_not_built_{part}.txt").read_text() for part in ("cpp", "cuda")]
    assert all("CEM_FAST_CPP=0" in reason for reason in reasons)


@pytest.mark.long
def test_a_source_distribution_made_without_cuda_holds_the_cuda_kernels(tmp_path):
    sources(tmp_path)
    set_up(tmp_path, "sdist", "--dist-dir", "made")
    (archive,) = (tmp_path / "made").iterdir()
    with tarfile.open(archive) as file:
        found = {name.partition("/")[2] for name in file.getnames()}
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} <= found


def test_an_installed_package_hidden_by_sources_is_named(tmp_path, monkeypatch):
    (tmp_path / "cem_fast").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    backend._warn_of_another_package()  # not compiled either
    (tmp_path / "cem_fast" / "_C_cpu.cpython-311.so").touch()
    with pytest.warns(
        UserWarning, match=f"imported from {backend.PACKAGE}, .* and not from {tmp_path}/cem_fast"
    ) as said:
        backend._warn_of_another_package()
    assert said[0].filename == __file__


def test_a_warning_of_a_small_class_shows_the_callers_line():
    import torch

    from cem_fast import CEMLoss, GaussianMixture

    x, labels = torch.tensor([[0.0], [0.0], [1.0]]), torch.zeros(3, dtype=torch.int64)
    for call in (
        lambda: GaussianMixture(num_components=3).fit(x),
        lambda: GaussianMixture(num_components=3).fit_stream([(x, None)]),
        lambda: GaussianMixture(num_components=3).partial_fit(x),
        lambda: CEMLoss(num_classes=1, num_components=3).fit(x, labels),
        lambda: CEMLoss(num_classes=1, num_components=3).fit_loader(torch.nn.Identity(), [(x, labels)]),
    ):
        with pytest.warns(UserWarning, match="1 of 1 classes have fewer distinct rows than num_components=3") as said:
            call()
        assert [one.filename for one in said] == [__file__]
