"""The folder of downloaded data sets."""

from __future__ import annotations

from cem_fast import data


def test_the_data_root(monkeypatch, tmp_path):
    monkeypatch.delenv("CEM_FAST_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.data_root() == tmp_path / ".cache" / "cem_fast"
    monkeypatch.setenv("CEM_FAST_DATA", "~/elsewhere")
    assert data.data_root() == tmp_path / "elsewhere"
