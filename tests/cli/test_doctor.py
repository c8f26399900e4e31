"""The report on an installation, with and without the libraries of the command line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support.command_line import status

from cem_fast.cli import doctor
from cem_fast.ops import agreement, backend


def test_doctor_says_what_is_in_force_and_finds_a_wrong_operation(capfd, monkeypatch):
    assert status("doctor", "--check") == 0
    out = capfd.readouterr().out
    assert "torch:" in out
    assert "every operation agrees with the reference" in out
    assert "WRONG" not in out
    right = agreement.reference.mixture_log_prob_bwd
    monkeypatch.setattr(agreement.reference, "mixture_log_prob_bwd", lambda *arguments: 1.05 * right(*arguments))
    assert status("doctor", "--check") == 1
    wrong = [line for line in capfd.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == len(agreement.TOLERANCE)
    assert all("mixture_log_prob_bwd" in line for line in wrong)


def test_doctor_says_which_kernel_is_not_used(capfd, monkeypatch):
    def broken(*_):
        raise OSError("no such instruction")

    monkeypatch.setitem(doctor.OPERATORS, "kmeans", backend._once_it_agrees("kmeans", broken))
    assert status("doctor", "--check") == 1
    wrong = [line for line in capfd.readouterr().out.splitlines() if line.startswith("WRONG")]
    assert len(wrong) == 1
    assert wrong[0].startswith("WRONG  the kernel of kmeans failed (OSError: no such instruction) on cpu")


BLOCKED = ("click", "docstring_parser", "jinja2", "matplotlib", "pytorch_msssim", "rich", "yaml")


def test_doctor_needs_no_library_of_the_command_line():
    program = f"""
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
sys.argv[1:] = ["--device", "cpu"]
runpy.run_module("cem_fast.cli.doctor", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "torch:" in done.stdout


def test_doctor_names_a_bad_device(capfd):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--device", "tpu"])
    assert "device must be cpu, cuda or cuda:<index>, got 'tpu'" in capfd.readouterr().err
