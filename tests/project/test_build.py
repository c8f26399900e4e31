"""Builds that fail, and packages that were not compiled."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cem_fast.ops import backend

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.long
def test_what_the_compiler_said_is_kept(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for package in ("cem_fast", "benchmarks", "kernels"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("*.so", "results", "__pycache__")
        )
    compiler = tmp_path / "compiler"
    answers = 'case "$*" in *--version*|*-v*) exec g++ "$@";; esac'
    compiler.write_text(f'#!/bin/sh\n{answers}\necho "x.h: fatal error: no space left" >&2\nexit 1\n')
    compiler.chmod(0o755)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", "built"],
        cwd=tmp_path,
        env={**os.environ, "CXX": str(compiler), "CC": str(compiler), "CEM_FAST_CUDA": "0", "CEM_FAST_CPP": "auto"},
        check=True,
        capture_output=True,
        timeout=300,
    )
    assert (
        tmp_path / "built/cem_fast/_not_built_cpp.txt"
    ).read_text() == f"{compiler} failed: x.h: fatal error: no space left\n"


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
