"""Files and folders of a data set: order, clutter, links, and files that are not regular."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cem_fast._support.files import require_regular
from cem_fast.data.files import files_in, folders_in, is_clutter


@pytest.mark.parametrize(
    "path", [".git", "a/.hidden/b.png", "__MACOSX/a.png", "a/lost+found", "._a.png", "@eaDir/a.png"]
)
def test_clutter(path):
    assert is_clutter(Path(path))


@pytest.mark.parametrize("path", ["a.png", "a/b.c/d.png", "macosx/a.png", "lost/a.png"])
def test_names_that_only_resemble_clutter(path):
    assert not is_clutter(Path(path))


def test_a_hidden_parent_does_not_hide_its_files(tmp_path):
    folder = tmp_path / ".cache" / "photos"
    (folder / "cats").mkdir(parents=True)
    (folder / "cats" / "b.png").touch()
    (folder / "cats" / "a.png").touch()
    assert [path.name for path in folders_in(folder)] == ["cats"]
    assert [path.name for path in files_in(folder, nested=True)] == ["a.png", "b.png"]
    assert files_in(folder) == []


def test_links(tmp_path):
    (tmp_path / "cats").mkdir()
    (tmp_path / "cats" / "a.png").touch()
    (tmp_path / "felines").symlink_to(tmp_path / "cats")
    (tmp_path / "cats" / "b.png").symlink_to(tmp_path / "cats" / "a.png")
    (tmp_path / "cats" / "gone.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cats" / "loop.png").symlink_to(tmp_path / "cats" / "loop.png")
    assert [path.name for path in folders_in(tmp_path)] == ["cats", "felines"]
    assert [path.name for path in files_in(tmp_path / "felines")] == ["a.png", "b.png"]
    require_regular(tmp_path / "cats" / "b.png")


def test_files_that_are_not_regular_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    os.mkfifo("fifo")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket")
    listener.close()
    Path("folder").mkdir()
    for name, kind in (
        ("fifo", "a FIFO"),
        ("socket", "a socket"),
        ("folder", "a folder"),
        ("/dev/null", "a character device"),
    ):
        Path("link").unlink(missing_ok=True)
        Path("link").symlink_to(name)
        for path in (Path(name), Path("link")):
            with pytest.raises(ValueError, match=f"^{path} must be a regular file, got {kind}$"):
                require_regular(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        require_regular(Path("nowhere"))
