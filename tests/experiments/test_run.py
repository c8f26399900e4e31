"""One run."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from cem_fast import training
from cem_fast.config import RunConfig
from cem_fast.experiments import saved_run
from cem_fast.experiments.build import load_data
from cem_fast.experiments.grid import evaluate
from cem_fast.experiments.run import run
from cem_fast.schedule import CEMSchedule


def test_same_seed_gives_the_same_run_and_accuracy_is_that_of_the_documented_measure(finished, tmp_path):
    path = finished.run(cem=True)
    before = saved_run.load_run(path)
    run(before.config, tmp_path / "again", attack=False)
    after = saved_run.load_run(tmp_path / "again")
    for key, value in before.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[key]), key
    accuracy = training.evaluate_accuracy(
        after.model, after.defense, after.data.test, draws=after.config.noise_draws, seed=after.config.seed
    )
    assert after.description.record.accuracy == pytest.approx(accuracy)
    assert after.description.record.attacks == {}


def test_secure_draws_are_for_the_finished_network_alone(finished, tmp_path):
    before = saved_run.load_run(finished.run(cem=False))
    config = replace(before.config, secure=True)
    record = run(config, tmp_path / "run", attack=False)
    after = saved_run.load_run(tmp_path / "run")
    assert record.accuracy == before.description.record.accuracy
    for key, value in before.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[key]), key
    assert (before.defense.secure, after.defense.secure) == (False, True)
    with pytest.raises(ValueError, match="generator must be None where secure is set"):
        after.defense.release(torch.rand(2, 3), torch.Generator())
    with pytest.raises(ValueError, match="secure must be False here, since evaluations repeat their draws from a seed"):
        run(config, tmp_path / "attacked")
    with pytest.raises(ValueError, match="secure must be False in evaluations"):
        training.observer(after.model, after.defense)


@dataclass(frozen=True)
class Plan:
    configs: tuple[RunConfig, ...]

    def runs(self):
        return list(self.configs)


def test_a_plan_with_secure_draws_is_refused_before_anything_is_written(finished, tmp_path):
    config = replace(finished.grid.runs()[0], secure=True)
    with pytest.raises(ValueError, match="secure must be False here"):
        evaluate(Plan((config,)), tmp_path / "grid")
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("kind", ["constant", "official"])
def test_the_weight_of_cem_follows_the_schedule_of_the_settings(kind, tiny_grid, tmp_path, monkeypatch):
    used = []

    class Watched(CEMSchedule):
        def weight_at(self, **now):
            used.append((super().weight_at(**now), now["learning_rate"]))
            return used[-1][0]

    monkeypatch.setattr("cem_fast.experiments.run.CEMSchedule", Watched)
    config = next(run for run in tiny_grid.runs() if run.cem_weight > 0)
    run(replace(config, cem_schedule=kind, attacks=("ridge",)), tmp_path, attack=False)
    ratios = {round(weight * rate / config.cem_weight, 9) if kind == "official" else weight for weight, rate in used}
    assert ratios == ({0.001} if kind == "official" else {config.cem_weight})
    with pytest.raises(ValueError, match="unknown cem_schedule 'offical': .* the nearest is 'official'"):
        replace(config, cem_schedule="offical")


def test_leakage_is_estimated_with_one_kind_of_mixture_whatever_cem_trains_with(tiny_grid, tmp_path):
    plain = next(run for run in tiny_grid.runs() if run.defense == "noise" and run.cem_weight == 0)
    found = []
    for name, own in (("a", {"cem_components": 1, "cem_by_class": False}), ("b", {"cem_covariance": "diag"})):
        record = run(replace(plain, **own), tmp_path / name, attack=False)
        loaded = saved_run.load_run(tmp_path / name)
        found.append((record.leakage, loaded.description.curves))
        assert loaded.loss.mixture.num_components == loaded.config.cem_components  # the run's own is what is kept
    assert found[0] == found[1]
    assert found[0][0].plugin_nats > 0


def test_nothing_is_trained_for_a_folder_that_cannot_be_written_to(tiny_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    (tmp_path / "file").write_text("keep")
    config = tiny_grid.runs()[0]
    for folder in (tmp_path / "file", tmp_path / "file/below", "/proc/nope", ""):
        with pytest.raises(ValueError, match="folder must be"):
            run(config, folder)
        with pytest.raises(ValueError, match="folder must be"):
            evaluate(tiny_grid, folder)
    splits = load_data(config)
    with pytest.raises(ValueError, match="the test part must hold at least 2 images, got 1"):
        run(config, tmp_path / "run", splits=replace(splits, test=splits.test[torch.arange(1)]))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
