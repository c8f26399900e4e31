"""A grid of runs."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from dataclasses import replace

import pytest
import torch

from cem_fast import training
from cem_fast.experiments import saved_run, workers
from cem_fast.experiments.grid import check_folder, evaluate
from cem_fast.experiments.results import RESULTS, read
from cem_fast.experiments.run import run
from cem_fast.experiments.watch import Watch


def test_finished_runs_are_not_repeated_and_changed_ones_are(tiny_grid, tmp_path, monkeypatch):
    grid = replace(tiny_grid, noise_levels=(), attacks=("ridge",))
    trained = []
    train = training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: trained.append(k["config"]) or train(*a, **k))
    first = evaluate(grid, tmp_path)
    assert len(trained) == 3
    assert evaluate(grid, tmp_path).runs == first.runs
    assert len(trained) == 3
    larger = replace(grid, cem_weights=(0.0, 0.35, 2.0))
    evaluate(larger, tmp_path)
    assert len(trained) == 4
    description = tmp_path / first.runs[0].checkpoint / saved_run.DESCRIPTION
    description.write_text(description.read_text()[:100])
    evaluate(larger, tmp_path)
    assert len(trained) == 5
    (tmp_path / RESULTS).unlink()
    again = evaluate(replace(grid, undefended=(), cem_weights=(0.0,)), tmp_path, fresh=True)
    assert len(trained) == 6
    assert again.runs[0].attacks == first.runs[1].attacks


def test_an_interrupted_grid_keeps_what_it_has(tiny_grid, tmp_path, monkeypatch):
    grid = replace(tiny_grid, noise_levels=(), attacks=("ridge",))
    complete = evaluate(grid, tmp_path)
    whole, calls = run, []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr("cem_fast.experiments.run.run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(grid, tmp_path, fresh=True)
    kept = read(tmp_path)
    assert [r.attacks for r in kept.runs] == [r.attacks for r in complete.runs]

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(grid, tmp_path / "new", fresh=True)
    assert len(read(tmp_path / "new").runs) == 1


def test_nothing_is_written_when_a_setting_is_wrong(tiny_grid, tmp_path):
    for change in ({"cut": 99}, {"defenses": ("nois",)}, {"attacks": ("rigde",)}, {"folds": (9,)}, {"model": "slmi"}):
        with pytest.raises(ValueError):
            evaluate(replace(tiny_grid, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_gaussian_without_labels_is_a_mixture_of_one(tiny_grid, tmp_path):
    ablation = {"defense": "noise", "cem_weight": 0.5, "cem_by_class": False, "cem_components": 1}
    grid = replace(
        tiny_grid, undefended=(), defenses=("noise", ablation), cem_weights=(0.0,), noise_levels=(), attacks=("ridge",)
    )
    results = evaluate(grid, tmp_path)
    off, on = results.runs
    run = saved_run.load_run(tmp_path / on.checkpoint)
    assert run.loss.mixture.means.shape[:2] == (1, 1)
    features = training.clean_features(run.model, run.data.train.images).flatten(1)
    assert torch.allclose(run.loss.mixture.means[0, 0], features.mean(0), atol=1e-5)
    assert run.description.history[1].cem > 0
    (pair,) = results.pairs  # with the run without CEM, whatever its settings of CEM
    assert pair.run == 1
    assert pair.gain == pytest.approx(on.attacks["ridge"].mse / off.attacks["ridge"].mse - 1, rel=1e-5)


def test_parallel_jobs_give_the_same_results(finished, tmp_path):
    together = evaluate(finished.grid, tmp_path, jobs=2, command="cem-fast evaluate")
    assert len(together.runs) == len(finished.results.runs)
    for record, expected in zip(together.runs, finished.results.runs):
        assert record.config == expected.config
        assert record.attacks["ridge"].mse == pytest.approx(expected.attacks["ridge"].mse, rel=0.05)
    assert not multiprocessing.active_children()


class Heard(Watch):
    """Records which runs ended, and how; and which are repeated, and why."""

    def __init__(self):
        self.ends, self.reasons = [], {}

    def repeated(self, index, total, config, reason):
        self.reasons[index] = reason

    def finished(self, index, total, config, record, *, reused):
        self.ends.append((index, "found" if reused else "finished"))

    def failed(self, index, total, config, reason, *, again):
        self.ends.append((index, "again" if again else "failed"))


def test_a_run_on_disk_that_is_repeated_is_named_with_the_reason(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    paths = [folder / run.checkpoint / saved_run.DESCRIPTION for run in finished.results.runs]
    first, second, third, fourth, fifth = paths[:5]
    written = json.loads(first.read_text())
    written["identity"] |= {"code": "0" * 16, "images": "1" * 16}
    first.write_text(json.dumps(written, indent=1))
    written = json.loads(fourth.read_text())
    written["record"]["config"]["epochs"] += 1
    fourth.write_text(json.dumps(written, indent=1))
    written = json.loads(fifth.read_text())
    written["record"]["attacks"].popitem()
    fifth.write_text(json.dumps(written, indent=1))
    second.write_text(second.read_text()[:100])
    shutil.rmtree(third.parent)
    monkeypatch.setattr(workers, "run_all", lambda tasks, **how: iter([]))
    heard = Heard()
    evaluate(finished.grid, folder, jobs=2, command="cem-fast evaluate", watch=heard)
    assert heard.reasons == {
        0: "the run on disk is of other code and images",
        1: "the run on disk is damaged",
        3: "the run on disk is of other settings",
        4: "the run on disk is of other attacks",
    }
    assert heard.ends == [(index, "found") for index in range(5, len(paths))]
    heard.reasons.clear()
    evaluate(finished.grid, folder, jobs=2, fresh=True, command="cem-fast evaluate", watch=heard)
    assert not heard.reasons


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_run_does_not_end_the_grid_and_is_tried_again_by_the_next_call(tiny_grid, tmp_path, jobs):
    broken = replace(tiny_grid, undefended=(), noise_levels=(), cem_weights=(1e30, 0.0), epochs=3, attacks=("ridge",))
    heard = Heard()
    results = evaluate(broken, tmp_path, jobs=jobs, watch=heard)
    assert sorted(heard.ends) == [(0, "failed"), (1, "finished")]
    (failure,) = results.failed
    assert failure.config == broken.runs()[0]
    assert failure.reason.startswith("the training loss is ")
    assert [run.cem for run in results.runs] == [False]
    assert read(tmp_path) == results
    assert not multiprocessing.active_children()
    assert not list(tmp_path.rglob("*.tmp"))
    if jobs == 1:
        heard.ends.clear()
        assert evaluate(broken, tmp_path, watch=heard).failed == results.failed
        assert heard.ends == [(1, "found"), (0, "failed")]


def test_where_every_run_fails_the_old_results_stay(tiny_grid, tmp_path):
    broken = replace(tiny_grid, undefended=(), noise_levels=(), cem_weights=(1e30,), epochs=3)
    results = evaluate(broken, tmp_path)
    assert (results.runs, len(results.failed)) == ((), 1)
    assert not (tmp_path / RESULTS).exists()


def test_what_keeps_results_from_being_written_ends_the_grid(tiny_grid, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_run, "write_atomically", full)
    with pytest.raises(OSError, match="No space left on device"):
        evaluate(replace(tiny_grid, attacks=("ridge",)), tmp_path)


def test_results_of_other_runs_are_not_replaced(finished, tmp_path):
    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    results = (folder / RESULTS).read_text()
    with pytest.raises(ValueError, match=r"results\.json holds the results of 4 runs .*: give it a --name or --folder"):
        evaluate(replace(finished.grid, noise_std=0.3), folder)
    assert (folder / RESULTS).read_text() == results
    check_folder(folder, finished.grid.runs())
    check_folder(folder, replace(finished.grid, seeds=(0, 1, 2)).runs())  # nothing is lost
    (folder / RESULTS).write_text('{"accuracy": 1}')
    with pytest.raises(ValueError, match=r"results\.json was not written by cem_fast and is left alone"):
        evaluate(finished.grid, folder)
    assert (folder / RESULTS).read_text() == '{"accuracy": 1}'


def test_the_rest_of_a_grid_runs_on_as_many_processes_and_threads_as_all_of_it(finished, tmp_path, monkeypatch):

    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    shutil.rmtree(folder / finished.results.runs[3].checkpoint)
    asked = []
    monkeypatch.setattr(workers, "run_all", lambda tasks, **how: asked.append(([t[0] for t in tasks], how)) or iter([]))
    results = evaluate(finished.grid, folder, jobs=4, command="cem-fast evaluate")
    assert asked == [([3], {"jobs": 4, "device": "cpu", "fresh": False})]
    assert len(results.runs) == len(finished.results.runs) - 1
