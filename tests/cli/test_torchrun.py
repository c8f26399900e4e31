"""``cem-fast train`` under torchrun: one process writes, and all of them end together."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from cem_fast.cli import main as cli
from cem_fast.cli import torchrun
from cem_fast.experiments import saved_run


def launch(folder, *settings: str) -> list[subprocess.Popen]:
    """cem-fast train on two processes, each without torchrun's supervision."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cem_fast", "train", "--folder", str(folder), *settings]
    return [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **own, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip


SETTINGS = ("--image-size", "16", "--batch-size", "8", "--cem-components", "2", "--cem-weight", "0.5")


def test_torchrun_trains_and_only_the_first_process_writes_and_prints(tiny_images, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cem_fast"]
    arguments = ["train", "--data", str(tiny_images), "--folder", str(folder), "--epochs", "3", *SETTINGS]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved in") == 1
    run = saved_run.load_run(folder)
    assert [entry.epoch for entry in run.description.history] == [1, 2, 3]
    assert len(list(folder.iterdir())) == 3


def test_a_process_that_dies_ends_the_other_with_one_line(tiny_images, tmp_path):
    processes = launch(tmp_path / "run", "--data", str(tiny_images), "--epochs", "100000", *SETTINGS)
    kept = tmp_path / "run" / "training.safetensors"
    deadline = time.monotonic() + 200
    while not kept.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert kept.exists()
    processes[1].kill()
    _, err = processes[0].communicate(timeout=60)
    processes[1].communicate()
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL]
    assert err.startswith("cem-fast: process 0 of 2 has lost another one, which has ended")
    assert err.count("\n") == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_of_several_exits_without_the_interpreters_shutdown(processes, monkeypatch):
    def at_once(status):
        raise InterruptedError(status)

    monkeypatch.setattr(os, "_exit", at_once)
    monkeypatch.setattr(torchrun, "count", lambda: processes)
    with pytest.raises(InterruptedError if processes > 1 else SystemExit, match="3"):
        torchrun.leave(3)


def test_other_commands_refuse_torchrun(monkeypatch, capfd):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["doctor"]) == 2
    signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err.startswith("cem-fast: torchrun starts cem-fast train alone")
