"""A search for settings: budgets, confirmation on another fold, settings to train with, and interruptions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from support import twins

from cem_fast import data, load_run, tune
from cem_fast.cli import main as cli
from cem_fast.config import SEARCHED, RunConfig
from cem_fast.experiments import grid
from cem_fast.tune import Targets, Trial, search

pytest.importorskip("optuna")


@pytest.fixture
def quick(monkeypatch):
    """Two levels of plain noise, and the cheapest attack."""
    monkeypatch.setattr(search, "LEVELS", (0.0, 0.1))
    monkeypatch.setattr(search, "CHEAP", ("nearest",))


def settings(images: Path) -> RunConfig:
    return RunConfig(data=str(images), image_size=16, epochs=1, batch_size=8, attacks=("ridge",), noise_draws=2)


def test_a_search_is_confirmed_on_another_fold_and_continues_after_an_interruption(
    quick, tiny_images, tmp_path, monkeypatch, capfd
):
    config, targets, folder = settings(tiny_images), Targets(max_accuracy_loss=1.0, max_bytes=200), tmp_path / "tune"
    real, done = grid.run_cell, []

    def run_cell(config, *args, **kwargs):
        if len(done) == 5:
            raise KeyboardInterrupt
        done.append(config)
        return real(config, *args, **kwargs)

    monkeypatch.setattr(grid, "run_cell", run_cell)
    with pytest.raises(KeyboardInterrupt):
        tune.tune(config, folder, targets, trials=6)
    assert json.loads((folder / search.TUNED).read_text())["best"] is None
    monkeypatch.setattr(
        grid, "run_cell", lambda each, *args, **kwargs: done.append(each) or real(each, *args, **kwargs)
    )
    tuned = tune.tune(config, folder, targets, trials=6)
    assert len(done) == len(set(done))  # nothing was trained twice
    assert {each.fold for each in done} == {search.SEARCH, search.CONFIRMATION}
    assert len(tuned.trials) == 6
    assert tuned.trials[0].config.bottleneck == "D64"
    assert all(each.state == "over budget" for each in tuned.trials if (each.message_bytes or 0) > 200)
    assert all(each.message_bytes <= 200 for each in tuned.confirmed)
    document = json.loads((folder / search.TUNED).read_text())
    assert document == json.loads(json.dumps(tuned.to_json()))
    if tuned.best is not None:
        best = tuned.confirmed[tuned.best]
        assert best.mse == max(each.mse for each in tuned.confirmed)
        arguments = ["--config", str(folder / search.BEST), "--dry-run", "--folder", str(tmp_path / "run")]
        assert cli.main(["train", *arguments]) == 0
        assert f"bottleneck: {best.config.bottleneck}" in capfd.readouterr().out
    with pytest.raises(ValueError, match="holds a search of other settings"):
        tune.tune(replace(config, epochs=2), folder, targets, trials=6)


def test_a_search_never_reads_a_fixed_test_part(quick, tmp_path):
    for seed, part in enumerate(("train", "test")):
        twins.write_images(tmp_path / "images" / part, count=20, seed=seed)
    config, folder = settings(tmp_path / "images"), tmp_path / "tune"
    tuned = tune.tune(config, folder, Targets(max_accuracy_loss=1.0), trials=2)
    runs = [load_run(folder / "runs" / path.name) for path in (folder / "runs").iterdir()]
    assert {(each.config.fold, each.config.validation) for each in runs} == {
        (search.SEARCH, True),
        (search.CONFIRMATION, True),
    }
    unseen = data.load(str(tmp_path / "images"), fold=0).test
    assert all(unseen.num_in(part) == 0 for each in runs for part in (each.data.train, each.data.test))
    assert tuned.best is not None
    assert yaml.safe_load((folder / search.BEST).read_text())["validation"] is False


def trial(accuracy: float, mse: float, **own) -> Trial:
    return Trial(RunConfig(**own), "done", 256, 1000, accuracy, mse)


def test_the_best_meets_the_targets_on_the_fold_of_the_confirmation():
    plain = [trial(0.95, 0.01), trial(0.90, 0.02)]
    trials = [trial(0.945, 0.03), trial(0.93, 0.09), trial(0.96, 0.02)]
    assert search._best(plain, trials, Targets(max_accuracy_loss=0.01)) == 0
    assert search._best(plain, trials, Targets(max_accuracy_loss=0.03)) == 1
    assert search._best(plain, trials, Targets(max_accuracy_loss=0.0)) == 2
    assert search._best(plain, trials, Targets(max_accuracy_loss=0.01, min_mse=0.05)) is None


def test_the_pareto_set_has_the_accurate_trials_first():
    plain = [trial(0.95, 0.01)]
    trials = [trial(0.99 - 0.02 * i, mse, noise_std=0.1 + 0.01 * i) for i, mse in enumerate((0.01, 0.03, 0.02, 0.05))]
    found = search._pareto(plain, trials, Targets(max_accuracy_loss=0.01))
    assert [each.mse for each in found] == [0.03, 0.01, 0.05]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--trials", "0"], "trials must be an integer of at least 1, got 0"),
        (["--max-accuracy-loss", "2"], r"max_accuracy_loss must be in \[0, 1\], got 2"),
        (["--max-bytes", "0"], "max_bytes must be .*at least 1, got 0"),
        (["--min-mse", "-1"], "min_mse must be at least 0, got -1"),
        (["--validation"], "validation must be False here, since the search sets it, got True"),
        (["--defense", "dropout"], "defense must be 'noise' here, since the search sets it, got 'dropout'"),
        (["--bottleneck", "D64"], "bottleneck must be 8 here, since the search sets it, got 'D64'"),
        (["--noise-std", "0.2"], "noise_std must be 0.1 here, since the search sets it, got 0.2"),
        (["--cem-weight", "1"], "cem_weight must be 0.0 here, since the search sets it, got 1.0"),
        (["--cem-components", "2"], "cem_components must be 5 here, since the search sets it, got 2"),
    ],
)
def test_bad_targets_are_refused_in_one_line(arguments, message, capfd, tmp_path):
    import re

    assert cli.main(["tune", *arguments, "--folder", str(tmp_path)]) == 2
    assert re.search(message, capfd.readouterr().err)


def test_the_help_lists_no_setting_that_is_refused(capfd):
    assert cli.main(["tune", "--help"]) == 0
    listed = capfd.readouterr().out
    assert "--cut" in listed
    assert not [name for name in SEARCHED if f"--{name.replace('_', '-')} " in listed]


def test_the_confirmation_is_by_strong_attacks_by_default(capfd):
    assert cli.main(["tune", "--print-config"]) == 0
    assert yaml.safe_load(capfd.readouterr().out)["attacks"] == ["kernel_ridge", "inversion"]


@pytest.mark.parametrize(
    "target",
    [
        {"max_bytes": 1.5},
        {"max_bytes": True},
        {"max_device_macs": float("nan")},
        {"min_mse": None},
        {"max_accuracy_loss": "a"},
    ],
)
def test_a_target_of_another_type_is_named(target):
    with pytest.raises(TypeError, match=next(iter(target))):
        tune.Targets(**target)
