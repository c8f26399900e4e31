"""Entry of the command line: statuses, one-line errors, imports."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from support.command_line import run, status

from cem_fast import __version__


def test_no_traceback_from_a_real_process(tmp_path):
    done = run("train", "--cut", "99", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "cem-fast: cut must be between 1 and 3 stages, got 99\n"


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"CEM_FAST_BACKEND": "tritn"},
            "unknown value of CEM_FAST_BACKEND 'tritn': expected one of auto, triton, cuda, cpu, reference; the nearest is 'triton'",
        ),
        (
            {"CEM_FAST_BACKEND": "reference", "CEM_FAST_CPU_CAPABILITY": "avx2"},
            "CEM_FAST_CPU_CAPABILITY=avx2 needs the compiled kernels, got CEM_FAST_BACKEND=reference",
        ),
    ],
)
def test_an_environment_that_asks_for_what_there_is_not_is_one_line(changes, message):
    done = run("doctor", env={**os.environ, **changes})
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"cem-fast: {message}\n")


def test_version(capfd):
    assert status("--version") == 0
    assert capfd.readouterr().out == f"cem-fast {__version__}\n"


def test_errors_on_the_way_are_one_line(config, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cem_fast._support.files.os.fsync", full)
    assert status("evaluate", "--config", str(config), "--attacks", "ridge", "--jobs", "1") == 1  # in this process
    err = capfd.readouterr().err
    assert re.fullmatch(r"cem-fast: runs/small/runs/.*/\S+: No space left on device\n", err)
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setenv("CEM_FAST_DEBUG", "1")
    assert status("evaluate", "--config", str(config), "--attacks", "ridge", "--jobs", "1") == 1
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.usefixtures("heeds_ctrl_c")
def test_importing_the_package_has_no_side_effects(tmp_path):
    """Whatever the name of the program is; what serves people is not imported either."""
    program = tmp_path / "cem-fast"
    program.write_text(
        "import signal, sys\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "import cem_fast\n"
        "assert 'torch' not in sys.modules\n"
        "from cem_fast import CEMLoss\n"
        "assert signal.getsignal(signal.SIGINT) is before\n"
        "heavy = {'PIL', 'matplotlib', 'rich', 'jinja2', 'click', 'cem_fast.cli', 'cem_fast.data'}\n"
        "print(sorted(heavy & {*sys.modules}))\n"
    )
    done = subprocess.run([sys.executable, str(program), "doctor"], capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("name", ["config.RunConfig", "mixture.GaussianMixture", "defenses.Defense", "load_run"])
def test_public_names_are_attributes_of_the_package(name):
    done = subprocess.run([sys.executable, "-c", f"import cem_fast; cem_fast.{name}"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments, code",
    [(["--version"], 0), (["evaluate", "--help"], 0), (["train", "--foo"], 2), (["train", "--cut", "x"], 2)],
)
def test_torch_is_imported_for_commands_only(arguments, code):
    program = f"import sys; from cem_fast.cli.main import main; s = main({arguments}); print(s, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == f"{code} False"
