"""The command ``cem-fast bench``: records, comparisons, exit statuses; and the tests of pytest-benchmark."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cem_fast.benchmarks import cases, machine, peers, report, roofline, suite, table
from cem_fast.benchmarks.cases import Case
from cem_fast.benchmarks.peers import Differentiable, Peer, plain_torch
from cem_fast.benchmarks.table import LAST, OK, WRONG
from support.bench_rows import END, ROW, RUN

from cem_fast.cli import main as cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tiny(monkeypatch):
    """One small case with cem_fast and eager torch, and ceilings that are measured quickly."""
    monkeypatch.setenv(machine.MALLOC, "the user's own")
    monkeypatch.setattr(roofline, "COPIED_BYTES", 1 << 16)
    monkeypatch.setattr(roofline, "PRODUCT", {"cpu": 16})
    monkeypatch.setattr(suite, "BUDGET_S", {True: 0, False: 0})
    case = Case("operations", "component_statistics", 20, 5, 3, 2, peers=("torch eager",))
    monkeypatch.setattr(cases, "GROUPS", {"operations": lambda quick: iter([case])})
    for module in (suite.training, suite.startup, suite.streams):
        row = replace(END, group=module.__name__, op=module.__name__, direction="once")
        monkeypatch.setattr(module, "measure", lambda device, *, quick, row=row: [row])


def status(*arguments):
    try:
        return cli.main(["bench", *map(str, arguments)])
    except SystemExit as stop:
        return stop.code


def test_a_run_is_recorded_and_reported(tiny, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    folder = tmp_path / "results"
    assert status("--quick", "--threads", "1", "--save", folder, "--readme", readme) == 0
    out = capsys.readouterr().out
    assert "threads: 1 on cores" in out or "threads: 1, not pinned" in out
    assert "malloc the user's own" in out
    assert "thread pools at the end" in out
    assert "component_statistics N=20 D=5 C=3 K=2 both: cem_fast" in out
    (recorded,) = table.read(folder / table.FILE)
    assert recorded.complete
    assert (recorded.run.mode, recorded.run.device) == ("quick", "cpu")
    assert recorded.run.command.startswith("cem-fast bench --quick")
    assert recorded.run.torch
    assert recorded.run.malloc == "the user's own"
    assert {row.direction for row in recorded.rows if row.group == "ceilings"} == {"start", LAST}
    groups = {row.group.rpartition(".")[2] for row in recorded.rows}
    assert groups == {"ceilings", "operations", "training", "startup", "streams"}
    assert "component_statistics: 20 x 5, C = 3, K = 2" in readme.read_text()
    # a second run is appended and compared with the first
    assert status(
        "--quick", "--only", "operations", "--threads", "1", "--save", folder, "--compare", folder / table.FILE
    ) in (0, 1)
    assert "times compared with" in capsys.readouterr().out
    assert [found.run.mode for found in table.read(folder / table.FILE)] == ["quick", "part"]


def test_wrong_results_of_cem_fast_are_red_and_fail(tiny, tmp_path, monkeypatch, capsys):
    def wrong(problem):
        return Differentiable(problem, lambda x, labels: 1.5 * plain_torch.eager(problem).function(x, labels))

    monkeypatch.setattr(peers, "PEERS", [Peer(peers.OURS, wrong, cases.OPERATIONS), *peers.PEERS[3:4]])
    assert status("--quick", "--threads", "1", "--save", tmp_path) == 1
    assert "cem_fast WRONG: off by" in capsys.readouterr().out
    (recorded,) = table.read(tmp_path / table.FILE)
    ours = [row for row in recorded.rows if row.contender == peers.OURS]
    assert [(row.status, row.p50_ms) for row in ours] == [(WRONG, None)]
    assert any(row.contender == "torch eager" and row.status == OK for row in recorded.rows)


def test_a_failing_group_keeps_the_others(tiny, tmp_path, monkeypatch, capsys):
    def failing(device, *, quick):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(suite.training, "measure", failing)
    assert status("--quick", "--threads", "1", "--save", tmp_path) == 1
    assert "cem_fast failed: RuntimeError: no memory left" in capsys.readouterr().out
    (recorded,) = table.read(tmp_path / table.FILE)
    assert recorded.complete
    assert (tmp_path / report.PAGE).exists()


def test_comparison_lists_slower_times(tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    slower = replace(ROW, p20_ms=1.9, p50_ms=2.0, p80_ms=2.1)
    other = replace(ROW, contender="torch eager")
    table.append(old, RUN, [ROW, other, END])
    table.append(new, replace(RUN, threads="1 on cores 0"), [slower, other, END])
    assert status("--render", "--save", new, "--compare", old / table.FILE) == 1
    out = capsys.readouterr().out
    assert (
        "slower 2.00x  cem_paper N=128 D=512 C=10 K=5 both, cem_fast: 1.00 ms (0.900 ms to 1.10 ms) to 2.00 ms" in out
    )
    assert "runs differ: threads was '2 on cores 0, 1' and is '1 on cores 0'" in out
    assert "1 are slower (1 of cem_fast), 0 faster, the others within the noise" in out
    assert status("--render", "--save", new, "--compare", new / table.FILE) == 0


def test_a_slower_peer_does_not_fail_the_command(tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    other = replace(ROW, contender="torch eager")
    table.append(old, RUN, [other, END])
    table.append(new, RUN, [replace(other, p20_ms=1.9, p50_ms=2.0, p80_ms=2.1), END])
    assert status("--render", "--save", new, "--compare", old / table.FILE) == 0
    assert "1 are slower (0 of cem_fast)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--only", "operatoins"],
            "unknown group 'operatoins': expected one of operations, scaling, fitting, training, startup",
        ),
        (["--threads", "100000"], "threads must be at most the"),
        (["--render"], "No such file or directory"),
        (["--device", "cuda"], "device 'cuda' is not there"),
        (["--comparison", "x"], "unknown setting 'comparison'; did you mean 'compare'?"),
    ],
)
def test_invalid_input_exits_with_2_and_one_line(arguments, message, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv(machine.MALLOC, "the user's own")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert status(*arguments, "--save", tmp_path / "none") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert message in error


def test_the_command_is_part_of_the_installed_package():
    """Runs in a folder without the sources, so only installed packages can be imported."""
    code = "import cem_fast.benchmarks.suite as suite; print(suite.GROUPS)"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_pytest_benchmark_runs_the_same_cases():
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "benchmarks",
        "-k",
        "component_statistics and cem_fast",
        "--benchmark-json=/dev/stdout",
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert '"error": ' in done.stdout
