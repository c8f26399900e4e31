"""The folder of downloaded data sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cem_fast import data
from cem_fast.config import RunConfig
from cem_fast.experiments import build


def test_the_data_root(monkeypatch, tmp_path):
    monkeypatch.delenv("CEM_FAST_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.data_root() == tmp_path / ".cache" / "cem_fast"
    monkeypatch.setenv("CEM_FAST_DATA", "~/elsewhere")
    assert data.data_root() == tmp_path / "elsewhere"


def test_a_user_without_a_home_directory_needs_it_for_published_sets_alone(monkeypatch, tiny_images):
    monkeypatch.delenv("CEM_FAST_DATA", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where the user has no entry with a home
    monkeypatch.setattr(Path, "home", classmethod(lambda _: (_ for _ in ()).throw(RuntimeError("no home"))))
    assert len(build.load_data(RunConfig(data=str(tiny_images), fold=0, image_size=16)).test) > 0
    with pytest.raises(
        ValueError, match="no home directory is known for ~/.cache/cem_fast: --data-root or CEM_FAST_DATA"
    ):
        data.load("cifar10", fold=0)
    with pytest.raises(ValueError, match="no home directory is known for ~/images: give the path without ~"):
        data.load("~/images", fold=0)
