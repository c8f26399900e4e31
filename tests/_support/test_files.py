"""Reading files that somebody else made."""

from __future__ import annotations

import os

import pytest

from cem_fast._support.files import check_target, read_bytes


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bytes(path, at_most=5) == b"12345"
    with pytest.raises(ValueError, match=r"file must have at most 4 bytes, got 5"):
        read_bytes(path, at_most=4)
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # 1 TB that take no space
    with pytest.raises(ValueError, match="at most 100 bytes"):
        read_bytes(path, at_most=100)


def test_devices_and_fifos_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name, kind in (("fifo", "a FIFO"), ("zero", "a character device"), (".", "a folder")):
        with pytest.raises(ValueError, match=f"must be a regular file, got {kind}"):
            read_bytes(tmp_path / name, at_most=100)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_bytes(tmp_path / "nowhere", at_most=100)


def test_a_fifo_in_the_place_of_an_output_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "results.json")
    with pytest.raises(ValueError, match="results.json must be a regular file, got a FIFO"):
        check_target(tmp_path, {"results.json": b"{"})
