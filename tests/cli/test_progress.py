"""Progress on a terminal."""

from __future__ import annotations

import shutil
from dataclasses import replace
from io import StringIO

from rich.console import Console
from support.command_line import status

from cem_fast.cli import console, progress
from cem_fast.cli.progress import Bars
from cem_fast.config import GridConfig, RunConfig
from cem_fast.tune import search


def test_a_run_that_ends_early_leaves_no_bar():
    stream = StringIO()
    with Bars(Console(file=stream, force_terminal=True, width=100)) as bars:
        for again in (True, False):
            bars.started(0, 2, RunConfig())
            bars.stage(0, "training", 1, 40)
            bars.failed(0, 2, RunConfig(), "its process was killed by signal 9", again=again)
            assert not bars.current
            assert bars.done == (0 if again else 1)
    assert "once more, since its process was killed by signal 9" in stream.getvalue()
    assert "failed: its process was killed by signal 9" in stream.getvalue()


def test_progress_on_a_terminal_shows_bars(config, tmp_path, monkeypatch):
    stream = StringIO()
    monkeypatch.setattr(console, "make", lambda: Console(file=stream, force_terminal=True, width=100))
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    assert status("evaluate", "--config", str(config), "--undefended", "[]", "--cem-weights", "0") == 0
    shown = stream.getvalue()
    assert "attack: decoder" in shown
    assert "training" in shown
    assert "left:" in shown
    assert "report:" in shown


def test_classes_of_a_folder_are_named_once_before_training(tiny_images):
    stream, config = StringIO(), RunConfig(data=str(tiny_images), image_size=16)
    lines = progress.Lines(Console(file=stream, width=100))
    for index in range(2):
        lines.started(index, 2, config)
    first, second, third = stream.getvalue().splitlines()
    assert first == "tiny: 3 classes (left, middle, right), images of 1x16x16"
    assert second.endswith("started")
    assert third.endswith("started")


def test_names_are_no_markup():
    stream = StringIO()
    with progress.counted(Console(file=stream, force_terminal=True, width=100)) as count:
        count("[/no] [bold]tag", 1, 2)
    assert "[/no] [bold]tag" in stream.getvalue()


def test_trials_of_a_search_do_not_look_alike():
    first = RunConfig(fold=0, attacks=("ridge",))
    others = search.varied(RunConfig())
    words = {"bottleneck": "bottleneck", "cut": "cut", "cem_weight": "λ", "cem_components": "K"}
    for settings in ({"bottleneck": "D16"}, {"cut": 1}, {"cem_weight": 0.2}, {"cem_weight": 0.2, "cem_components": 1}):
        trial = progress.describe(replace(first, **settings), others)
        assert all(f"{words[key]} = {value}" in trial for key, value in settings.items())
        assert "attacks" not in trial


def test_runs_that_differ_do_not_look_alike():
    plan = GridConfig(
        defenses=("noise", {"defense": "noise", "bottleneck": "D64"}, {"defense": "noise", "cut": 3}),
        cem_weights=(0.0, 0.1, 0.5),
        noise_levels=(0.2,),
    ).runs()
    names = [progress.describe(config, plan) for config in plan]
    assert len(set(names)) == len(plan)
    assert names[:3] == [
        "faces / bottleneck, bottleneck = 8, cut = 2, seed 0, fold 1",
        "faces / noise at noise 0.1, bottleneck = 8, cut = 2, seed 0, fold 1",
        "faces / noise + CEM at noise 0.1, λ = 0.1, bottleneck = 8, cut = 2, seed 0, fold 1",
    ]


def test_a_bar_shows_how_many_files_of_a_folder_are_decoded():
    stream = StringIO()
    with Bars(Console(file=stream, force_terminal=True, width=100)) as bars:
        bars.loading("runs/photos", 0, 60_000)
        bars.loading("runs/photos", 30_000, 60_000)
        bars.bars.refresh()
        bars.loading("runs/photos", 60_000, 60_000)
    assert "images of photos" in stream.getvalue()
    assert "30000/60000" in stream.getvalue()
    assert not bars.images
