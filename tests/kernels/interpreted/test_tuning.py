"""The script that times tile sizes on a GPU, up to its clock: every tile size gives right results, and none ends the script."""

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from cem_fast.benchmarks import tune_kernels
from cem_fast.kernels import _aot, _configs
from support.interpreter import watching
from support.tolerances import RELATIVE, relative_error

from cem_fast.ops import reference

SMALL = tune_kernels.Shape(rows=40, dimension=48, classes=2, components=3)
QUICK = {"reduce", "gradient"}


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """A table of its own for every test, and small problems where the script would sort many rows."""
    monkeypatch.setattr(_configs, "TABLE", copy.deepcopy(_configs.TABLE))
    monkeypatch.setattr(_configs, "PAIRWISE_SORT_ROWS", 520)
    return _configs.TABLE


@pytest.fixture(autouse=True, scope="module")
def listed():
    """What is not in the table is not in the list of what can be launched."""


def right(operator, arguments):
    """Stands in for the clock: runs the operator, and compares it with the reference."""
    exact = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    results, wanted = tune_kernels.OPERATORS[operator](*arguments), getattr(reference, operator)(*exact)
    for found, truth in zip(*((r if isinstance(r, tuple) else (r,)) for r in (results, wanted)), strict=True):
        assert relative_error(found, truth) < RELATIVE[torch.float32]
    return 1.0


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in tune_kernels.CANDIDATES],
)
def test_every_tile_size_is_right(family, table, capsys):
    launched = set()

    def time(operator, arguments):
        under = _configs.config(family, tune_kernels.itemsize(family))
        cases = _aot.cases_under(family, tune_kernels.itemsize(family), under)
        ours = {(case.name, tuple(sorted(case.constexprs.items()))) for case in cases}
        with watching() as seen:
            right(operator, arguments)
        assert ours & {(name, constants) for name, _, _, constants in seen.configurations}
        launched.add(under)
        return float(len(launched))

    best = tune_kernels.tune(family, "*", SMALL, device="cpu", time=time, faults=lambda *_: [])
    fastest = next(tune_kernels.candidates(family))
    staged = {fastest._replace(num_stages=stages) for stages in tune_kernels.STAGES}
    assert launched == {*tune_kernels.candidates(family), *staged}
    assert best == next(tune_kernels.candidates(family)) == _configs.config(family, tune_kernels.itemsize(family))
    assert "left out" not in capsys.readouterr().out


def test_the_table_is_among_what_is_tried():
    assert set(tune_kernels.CANDIDATES) == set(_configs.TABLE)
    for family in _configs.TABLE:
        assert _configs.config(family, tune_kernels.itemsize(family)) in tune_kernels.candidates(family)


def test_what_cannot_be_used_is_left_out_with_the_reason(capsys):
    first, second, third, *_ = tune_kernels.candidates("reduce")
    times = iter([RuntimeError("out of resource: shared memory\nmore"), 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])

    def time(*_):
        value = next(times)
        if isinstance(value, Exception):
            raise value
        return value

    def faults(family, config, architecture):
        return ["reduce_kernel (fp32): 8 spills"] if config == second else []

    assert tune_kernels.tune("reduce", "sm_90", SMALL, device="cpu", time=time, faults=faults) == third
    said = capsys.readouterr().out
    assert f"reduce {first}: left out: RuntimeError: out of resource: shared memory\n" in said
    assert f"reduce {second}: left out: reduce_kernel (fp32): 8 spills\n" in said
    assert f'"reduce": {{"sm_90": {{4: {third}}}}}' in said


def test_a_family_without_any_keeps_its_row(table, capsys):
    def time(*_):
        raise RuntimeError("no such instruction")

    table["reduce"]["sm_90"] = {8: _configs.Config(1, 512, 4)}
    before = copy.deepcopy(table)
    assert tune_kernels.tune("reduce", "sm_90", SMALL, device="cpu", time=time) is None
    assert table == before
    assert "the table keeps its row" in capsys.readouterr().out


def test_a_family_ends_with_its_time(table, capsys):
    first = next(tune_kernels.candidates("reduce"))
    times = dict(time=lambda *_: 1.0, faults=lambda *_: [], deadline=0.0)
    assert tune_kernels.tune("reduce", "sm_90", SMALL, device="cpu", **times) == first
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[2] for line in said[1:3]] == ["no time left for it and what follows"] * 2


def test_where_the_source_tree_is_missing_it_says_so(tmp_path):
    installed = tmp_path / "cem_fast" / "benchmarks" / "tune_kernels.py"
    installed.parent.mkdir(parents=True)
    shutil.copy(tune_kernels.__file__, installed)
    done = subprocess.run([sys.executable, installed, "--check"], capture_output=True, text=True, timeout=60)
    expected = "tune_kernels judges by tests/aot, which is not installed: run it in the source tree\n"
    assert (done.returncode, done.stderr) == (1, expected)
