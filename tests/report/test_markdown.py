"""Kept results: the documentation has their figures, and they are complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cem_fast.experiments import saved_run
from cem_fast.experiments.results import read
from cem_fast.report import markdown

ROOT = Path(__file__).parents[2]
FOLDERS = [ROOT / "benchmarks" / "results" / name for name in ("evaluation", "fashion_mnist")]


@pytest.fixture(params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture
def results(folder):
    return read(folder)


def test_the_documentation_has_the_tables(results):
    assert markdown.tables(results) in (ROOT / "docs" / "results" / "evaluation.md").read_text()


@pytest.mark.parametrize(
    "folder", sorted((ROOT / "benchmarks" / "results").glob("protect-*")), ids=lambda folder: folder.name, indirect=True
)
def test_the_page_on_dense_bottlenecks_has_the_tables(results):
    _, tables = markdown.tables(results).split("\n\n", 1)  # under a heading of its own
    assert tables in (ROOT / "docs" / "results" / "protect.md").read_text()


def test_the_page_on_dense_bottlenecks_has_the_search():
    tuned = json.loads((ROOT / "benchmarks" / "results" / "tune-faces" / "tune.json").read_text())
    page = (ROOT / "docs" / "results" / "protect.md").read_text()
    for trial in tuned["confirmed_plain"] + tuned["confirmed"]:
        figures = (
            f"{trial['accuracy']:.1%} | {trial['mse']:.5f} | {trial['message_bytes']:,} | {trial['device_macs']:,}"
        )
        assert f"bottleneck = {trial['config']['bottleneck']}, cut = {trial['config']['cut']} | {figures} |" in page


def test_the_readme_has_the_summary(results):
    readme = (ROOT / "README.md").read_text()
    for line in markdown.summary(results).splitlines():
        assert line in readme


def test_gains_are_those_of_the_tables(results):
    assert results.pairs
    for pair in results.pairs:
        off, on = markdown.compared(results, pair)
        assert {run.cem for run in off} == {False}
        assert {run.cem for run in on} == {True}
        assert [run.config.fold for run in off] == [run.config.fold for run in on]
        assert markdown.mse(on) / markdown.mse(off) - 1 == pytest.approx(pair.gain, abs=1e-4)


def test_the_development_fold_is_not_reported(results):
    assert all(run.config.fold != 0 for run in results.runs)


def test_exactly_the_named_runs_are_kept(results, folder):
    kept = {run.checkpoint for run in results.runs} - {None}
    assert kept == {f"runs/{path.parent.name}" for path in (folder / "runs").glob("*/run.json")}
    record = saved_run.read_description(folder / results.runs[-1].checkpoint).record
    assert record.at(results.runs[-1].checkpoint) == results.runs[-1]


def test_half_the_budget_of_the_strongest_attack_costs_at_most_3_percent():
    excess = []
    for run in read(FOLDERS[0]).runs:
        halved = [attack for attack in run.attacks.values() if attack.mse_half_budget is not None]
        strongest = min(halved, key=lambda attack: attack.mse)
        excess.append(strongest.mse_half_budget / strongest.mse - 1)
    assert max(excess) <= 0.03
