"""Ctrl-C and SIGTERM, while importing and while running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from support.command_line import run

from cem_fast.cli import main, signals
from cem_fast.experiments import saved_run
from cem_fast.experiments.results import RESULTS


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.usefixtures("heeds_ctrl_c")
def test_interruption_keeps_finished_runs_and_the_old_report(config, tmp_path, number, code):
    arguments = ["evaluate", "--config", str(config), "--attacks", "ridge", "--seeds", ",".join(map(str, range(200)))]
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    older = "<title>cem_fast: an older report"
    (folder / "report.html").write_text(older)
    process = subprocess.Popen(
        [sys.executable, "-m", "cem_fast", *arguments],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:
        if line.startswith("[5/"):
            break
    time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.count("\n") == 1
    assert "every run that had finished is kept" in err
    records = json.loads((folder / RESULTS).read_text())["runs"]
    assert len(records) >= 2
    loss = saved_run.load_run(folder / records[0]["checkpoint"]).loss
    assert (loss is None) == (records[0]["config"]["noise_std"] == 0)
    assert (folder / "report.html").read_text() == older
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.parametrize("command", [["serve", "halves"], ["export", "run", "--folder", "out"], ["doctor"]])
@pytest.mark.parametrize("ends, line", [(KeyboardInterrupt, "interrupted"), (signals.Terminated, "terminated")])
def test_commands_without_runs_promise_none(command, ends, line, monkeypatch, capsys):
    def end() -> None:
        raise ends

    monkeypatch.setattr(main, "heed_sigterm", end)
    assert main.main(command) == (130 if ends is KeyboardInterrupt else 143)
    assert capsys.readouterr().err == f"cem-fast: {line}\n"


@pytest.mark.parametrize("module", ["torch", "numpy"])
@pytest.mark.usefixtures("heeds_ctrl_c")
def test_interruption_during_the_imports_is_one_line(module, tmp_path):
    (tmp_path / f"{module}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = run("train", env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"})
    assert (done.returncode, done.stderr) == (130, "cem-fast: interrupted before anything was started\n")


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_interruptions_after_the_imports_are_exceptions_again():
    before = signal.getsignal(signal.SIGINT)
    with signals.clean_imports():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
