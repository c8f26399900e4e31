"""A run, a grid, and results.json."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from cem_fast import training
from cem_fast.config import GridConfig, RunConfig
from cem_fast.data import Part
from cem_fast.experiments import gains, saved_run
from cem_fast.experiments.attack import choose_pictures
from cem_fast.experiments.build import load_data
from cem_fast.experiments.grid import check_folder, evaluate
from cem_fast.experiments.results import RESULTS, Measured, cell_name, make_rows
from cem_fast.experiments.run import run
from cem_fast.experiments.watch import Watch
from cem_fast.schedule import CEMSchedule

RUN_KEYS = {
    "data", "protocol", "model", "cut", "defense", "cem", "config", "seed", "fold", "accuracy", "num_test", "attacks",
    "leakage", "seconds", "checkpoint",
}  # fmt: skip


def test_results_have_the_documented_schema(finished):
    results = json.loads((finished.folder / RESULTS).read_text())
    assert results == finished.results
    assert set(results) == {
        "schema", "command", "git", "versions", "baseline", "runs", "pairs", "frontier", "failed",
    }  # fmt: skip
    assert results["schema"] == 1
    assert results["command"] == "cem-fast evaluate"
    assert results["versions"]["torch"] == torch.__version__
    assert set(results["baseline"]["tiny"]) == {"mean_image_mse", "class_mean_mse"}
    assert len(results["runs"]) == 2 * 5
    for record in results["runs"]:
        assert set(record) == RUN_KEYS
        assert record["cem"] == (record["config"]["lambda"] > 0)
        assert 0 <= record["accuracy"] <= 1
        assert record["num_test"] == 6
        assert set(record["attacks"]) == {"decoder", "ridge"}
        for name, attack in record["attacks"].items():
            assert set(attack) == {
                "mse", "psnr", "ssim", "ssim_paper", "recognized", "mse_half_budget", "knowledge", "budget",
            }  # fmt: skip
            assert (attack["mse_half_budget"] is None) == (name == "ridge")
        noiseless = record["config"]["noise_std"] == 0
        assert set(record["leakage"]) == {"plugin_nats", "heldout_nats", "heldout_se"}
        assert all((value is None) == noiseless for value in record["leakage"].values())
        assert RunConfig.from_json(record["config"]).to_json() == record["config"]
        assert (finished.folder / record["checkpoint"] / saved_run.DESCRIPTION).is_file()
    for entry in [*results["pairs"], *results["frontier"]]:
        assert entry["interval"][0] <= entry["gain"] <= entry["interval"][1]


def test_cem_is_compared_to_the_run_that_differs_in_nothing_else(finished):
    (pair,) = finished.results["pairs"]
    on = [r for r in finished.results["runs"] if r["cem"]]
    off = [r for r in finished.results["runs"] if not r["cem"] and r["config"]["noise_std"] == 0.1]
    ignored = {"lambda"}
    for a, b in zip(on, off, strict=True):
        assert {k: v for k, v in a["config"].items() if k not in ignored} == {
            k: v for k, v in b["config"].items() if k not in ignored
        }
    strongest = [np.mean([min(a["mse"] for a in r["attacks"].values()) for r in runs]) for runs in (off, on)]
    assert pair["gain"] == pytest.approx(strongest[1] / strongest[0] - 1, rel=1e-5)


def test_finished_runs_are_not_repeated_and_changed_ones_are(tiny_grid, tmp_path, monkeypatch):
    grid = replace(tiny_grid, noise_levels=(), attacks=("ridge",))
    trained = []
    train = training.train
    monkeypatch.setattr(training, "train", lambda *a, **k: trained.append(k["config"]) or train(*a, **k))
    first = evaluate(grid, tmp_path)
    assert len(trained) == 3
    assert evaluate(grid, tmp_path)["runs"] == first["runs"]
    assert len(trained) == 3
    larger = replace(grid, cem_weights=(0.0, 0.35, 2.0))
    evaluate(larger, tmp_path)
    assert len(trained) == 4
    description = tmp_path / first["runs"][0]["checkpoint"] / saved_run.DESCRIPTION
    description.write_text(description.read_text()[:100])
    evaluate(larger, tmp_path)
    assert len(trained) == 5
    (tmp_path / RESULTS).unlink()
    again = evaluate(replace(grid, undefended=(), cem_weights=(0.0,)), tmp_path, fresh=True)
    assert len(trained) == 6
    assert again["runs"][0]["attacks"] == first["runs"][1]["attacks"]


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
    kept = json.loads((tmp_path / RESULTS).read_text())
    assert [r["attacks"] for r in kept["runs"]] == [r["attacks"] for r in complete["runs"]]

    calls.clear()
    with pytest.raises(KeyboardInterrupt):
        evaluate(grid, tmp_path / "new", fresh=True)
    assert len(json.loads((tmp_path / "new" / RESULTS).read_text())["runs"]) == 1


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
    assert after.description["record"]["accuracy"] == pytest.approx(accuracy)
    assert after.description["record"]["attacks"] == {}


def test_nothing_is_written_when_a_setting_is_wrong(tiny_grid, tmp_path):
    for change in ({"cut": 99}, {"defenses": ("nois",)}, {"attacks": ("rigde",)}, {"folds": (9,)}, {"model": "slmi"}):
        with pytest.raises(ValueError):
            evaluate(replace(tiny_grid, **change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"noise_std": -1.0}, "noise_std must be at least 0, got -1.0"),
        ({"noise_std": math.nan}, "noise_std must be at least 0, got nan"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"accumulate": 33}, "accumulate must be at most batch_size 32, got 33"),
        ({"attack_batch_size": 1}, "attack_batch_size must be at least 2, got 1"),
        ({"attack_dropout": 1.0}, "attack_dropout must be at least 0 and below 1, got 1.0"),
        ({"precision": "fp8"}, "unknown precision 'fp8': expected one of fp32, bf16, fp16"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"cem_variant": "offical"}, "the nearest is 'official'"),
        ({"cem_weight": 1.0, "noise_std": 0.0}, "noise_std must be positive where cem_weight is"),
        ({"protocol": "training"}, "unknown protocol 'training': expected one of inference, train"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**change)


def test_grid_plans_every_run_once():
    grid = GridConfig(defenses=("noise", "adversarial"), noise_levels=(0.1, 0.3), seeds=(0, 1), folds=(1, 2))
    plan = grid.runs()
    assert len(plan) == len(set(plan)) == (1 + 2 * 2 + 1) * 2 * 2
    assert all(run.noise_std == 0 and run.cem_weight == 0 for run in plan if run.defense == "bottleneck")
    with pytest.raises(ValueError, match="the grid is empty"):
        GridConfig(undefended=(), defenses=())
    with pytest.raises(ValueError, match="seeds must list at least one value"):
        GridConfig(seeds=())
    with pytest.raises(ValueError, match="name must be usable as the name of a folder"):
        GridConfig(name="../elsewhere")


def test_a_grids_defense_may_have_settings_of_its_own():
    own = {"defense": "noise_arl", "noise_std": 0.15, "adversary_weight": 1}
    grid = GridConfig(undefended=(), defenses=("bottleneck", own), cem_weights=(0.0, 0.5), seeds=(0,))
    cells = [(run.defense, run.noise_std, run.adversary_weight, run.cem_weight) for run in grid.runs()]
    shared = RunConfig()
    assert cells == [
        ("bottleneck", shared.noise_std, shared.adversary_weight, 0.0),
        ("bottleneck", shared.noise_std, shared.adversary_weight, 0.5),
        ("noise_arl", 0.15, 1.0, 0.0),
        ("noise_arl", 0.15, 1.0, 0.5),
    ]
    assert grid.runs()[2].to_json() == replace(grid.runs()[2], adversary_weight=1.0).to_json()


def test_settings_of_cem_multiply_only_the_cells_with_cem():
    ablation = {"defense": "noise", "cem_weight": 0.5, "cem_by_class": False, "cem_components": 1}
    plain = {"defense": "noise", "cem_components": 2}
    runs = GridConfig(defenses=("noise", plain, ablation), cem_weights=(0.0, 0.5), seeds=(0,)).runs()
    assert [(r.defense, r.cem_weight, r.cem_by_class, r.cem_components) for r in runs] == [
        ("bottleneck", 0.0, True, 5),
        ("noise", 0.0, True, 5),
        ("noise", 0.5, True, 5),
        ("noise", 0.5, True, 2),
        ("noise", 0.5, False, 1),
    ]


@pytest.mark.parametrize(
    "cell, error, message",
    [
        ({"noise_std": 0.1}, ValueError, "defenses must each have a name under 'defense', got {'noise_std': 0.1}"),
        ({"defense": "noise", "nose_std": 1.0}, ValueError, "unknown setting of a defense 'nose_std': .*'noise_std'"),
        ({"defense": "noise", "seed": 1}, ValueError, "unknown setting of a defense 'seed'"),
        ({"defense": "noise", "attacks": ["ridge"]}, ValueError, "unknown setting of a defense 'attacks'"),
        ({"defense": "noise", "noise_std": -1}, ValueError, "noise_std must be at least 0, got -1.0"),
        ({"defense": "noise", "noise_std": "big"}, TypeError, "noise_std must be float, got 'big'"),
        ({"defense": "noise", "cem_by_class": 1}, TypeError, "cem_by_class must be bool, got 1"),
        (3, TypeError, r"defenses must be tuple of str or settings, got \(3,\)"),
    ],
)
def test_bad_settings_of_a_grids_defense_are_named(cell, error, message):
    with pytest.raises(error, match=message):
        GridConfig(defenses=(cell,))


def test_a_data_set_may_have_settings_of_its_own():
    own = {"epochs": 10, "noise_std": 1, "cem_weights": [0, 2], "defenses": ["dropout", {"defense": "noise", "cut": 1}]}
    shared = {"defenses": ("noise",), "cem_weights": (0.0, 0.5), "seeds": (0,), "epochs": 3}
    grid = GridConfig(data=("faces", "digits"), per_data={"digits": own}, **shared)
    apart = [
        GridConfig(data=("faces",), **shared),
        GridConfig(
            data=("digits",),
            **{**shared, "defenses": tuple(own["defenses"]), "epochs": 10, "noise_std": 1.0, "cem_weights": (0.0, 2.0)},
        ),
    ]
    assert grid.runs() == [run for each in apart for run in each.runs()]
    assert grid.runs()[-1].to_json() == apart[1].runs()[-1].to_json()  # 1.0 where the settings said 1


@pytest.mark.parametrize(
    "own, error, message",
    [
        ({"digit": {}}, ValueError, "unknown data set of per_data 'digit': expected one of faces, digits"),
        ({"digits": {"epoch": 1}}, ValueError, "unknown setting of digits in per_data 'epoch': .*nearest is 'epochs'"),
        ({"digits": {"data": ["faces"]}}, ValueError, "unknown setting of digits in per_data 'data'"),
        ({"digits": {"epochs": 0}}, ValueError, "epochs must be at least 1, got 0"),
        ({"digits": {"epochs": "ten"}}, TypeError, "epochs must be int, got 'ten'"),
        ({"digits": {"seeds": 0}}, TypeError, "seeds must be tuple of int, got 0"),
        ({"digits": 10}, TypeError, "per_data must have settings under 'digits', got 10"),
        ([], TypeError, r"per_data must be settings, got \[\]"),
    ],
)
def test_bad_settings_of_a_data_set_are_named(own, error, message):
    with pytest.raises(error, match=message):
        GridConfig(data=("faces", "digits"), per_data=own)


def test_one_gaussian_without_labels_is_a_mixture_of_one(tiny_grid, tmp_path):
    ablation = {"defense": "noise", "cem_weight": 0.5, "cem_by_class": False, "cem_components": 1}
    grid = replace(
        tiny_grid, undefended=(), defenses=("noise", ablation), cem_weights=(0.0,), noise_levels=(), attacks=("ridge",)
    )
    results = evaluate(grid, tmp_path)
    off, on = results["runs"]
    run = saved_run.load_run(tmp_path / on["checkpoint"])
    assert run.loss.mixture.means.shape[:2] == (1, 1)
    features = training.clean_features(run.model, run.data.train.images).flatten(1)
    assert torch.allclose(run.loss.mixture.means[0, 0], features.mean(0), atol=1e-5)
    assert run.description["history"][1]["cem"] > 0
    (pair,) = results["pairs"]  # with the run without CEM, whatever its settings of CEM
    assert pair["run"] == 1
    assert pair["gain"] == pytest.approx(on["attacks"]["ridge"]["mse"] / off["attacks"]["ridge"]["mse"] - 1, rel=1e-5)


def test_pictures_are_one_per_class_and_do_not_depend_on_any_result():
    labels = torch.arange(40).repeat_interleave(2)
    part = Part(torch.rand(80, 1, 4, 4), labels, labels)
    chosen = choose_pictures(part)
    assert len(chosen) == 6
    assert len(labels[chosen].unique()) == 6
    few = Part(torch.rand(9, 1, 4, 4), torch.tensor([0, 1, 2] * 3), torch.arange(9))
    assert choose_pictures(few).tolist() == list(range(6))


def measured(defense, noise, weight, accuracy, mse, seed=0, images=200, **own):
    """A run whose per-image errors and correctness have exactly these means."""
    config = RunConfig(defense=defense, noise_std=noise, cem_weight=weight, seed=seed, **own).to_json()
    correct = (torch.arange(images) < round(accuracy * images)).float()
    shape = 1 + 0.5 * torch.sin(torch.arange(images).double())
    record = {
        "data": "faces", "defense": defense, "cem": weight > 0, "config": config, "seed": seed, "fold": 1,
        "attacks": {"ridge": {"mse": mse}},
    }  # fmt: skip
    errors = {"mse.ridge": mse * shape / shape.mean(), "correct": correct, "groups": torch.arange(images) // 2}
    errors["correct.groups"] = errors["groups"]
    return Measured(record, errors)


def test_frontier_compares_at_equal_accuracy():
    curve = [
        measured("noise", s, 0.0, a, m) for s, a, m in ((0.1, 0.95, 0.010), (0.2, 0.90, 0.020), (0.4, 0.80, 0.030))
    ]
    on = measured("noise", 0.1, 1.0, 0.85, 0.050)
    (entry,) = gains.frontier([*curve, on])
    assert entry["accuracy"] == pytest.approx(0.85)
    assert entry["gain"] == pytest.approx(0.050 / 0.025 - 1)
    assert entry["interval"][0] < entry["gain"] < entry["interval"][1]
    (worse,) = gains.frontier([*curve, measured("noise", 0.1, 1.0, 0.85, 0.020)])
    assert worse["gain"] == pytest.approx(0.020 / 0.025 - 1)


def test_frontier_takes_the_best_plain_noise_and_stays_inside_the_sweep():
    # a level that is both less accurate and easier to invert than another is no competitor
    curve = [
        measured("noise", s, 0.0, a, m) for s, a, m in ((0.1, 0.95, 0.010), (0.2, 0.95, 0.020), (0.4, 0.80, 0.015))
    ]
    (entry,) = gains.frontier([*curve, measured("noise", 0.1, 1.0, 0.90, 0.020)])
    assert entry["gain"] == pytest.approx(0.0, abs=1e-9)
    (above,) = gains.frontier([*curve, measured("noise", 0.1, 1.0, 0.99, 0.030)])
    assert above["gain"] == pytest.approx(0.5)
    assert gains.frontier([*curve, measured("noise", 0.1, 1.0, 0.50, 0.030)]) == []
    assert gains.frontier([curve[0], measured("noise", 0.1, 1.0, 0.90, 0.020)]) == []


def test_pairs_keep_noise_levels_and_weights_apart():
    runs = [
        measured("noise", s, w, 0.9, 0.01 * (1 + w) * s, seed)
        for s in (0.1, 0.2)
        for w in (0.0, 0.5, 1.0)
        for seed in (0, 1)
    ]
    found = {(p["noise_std"], p["lambda"]): p["gain"] for p in gains.pairs(runs)}
    assert found == pytest.approx({(0.1, 0.5): 0.5, (0.1, 1.0): 1.0, (0.2, 0.5): 0.5, (0.2, 1.0): 1.0})


def test_strengths_and_settings_of_cem_are_kept_apart_and_named():
    cells = [(0.3, 5, 0.01, 0.02), (0.6, 5, 0.02, 0.06), (0.6, 1, 0.02, 0.08)]
    runs = []
    for strength, components, off, on in cells:
        runs.append(measured("adversarial", 0.1, 0.0, 0.9, off, adversary_weight=strength))
        runs.append(measured("adversarial", 0.1, 0.5, 0.9, on, adversary_weight=strength, cem_components=components))
    found = gains.pairs(runs)
    assert [(p["run"], p["gain"]) for p in found] == [
        (1, pytest.approx(1)),
        (3, pytest.approx(2)),
        (5, pytest.approx(3)),
    ]
    rows = make_rows(runs)
    assert [cell_name(row, rows) for row in rows] == [
        "adversarial, adversary_weight = 0.3",
        "adversarial, adversary_weight = 0.6",
        "adversarial + CEM, K = 5, adversary_weight = 0.3",
        "adversarial + CEM, K = 5, adversary_weight = 0.6",
        "adversarial + CEM, K = 1, adversary_weight = 0.6",
    ]
    # plain noise has neither strength nor settings of CEM: it is held against every cell
    curve = [measured("noise", s, 0.0, a, m) for s, a, m in ((0.1, 0.95, 0.01), (0.4, 0.80, 0.03))]
    assert [entry["run"] for entry in gains.frontier([*runs, *curve])] == [1, 3, 5]


def test_settings_of_cem_are_named_in_few_words():
    own = {"cem_by_class": False, "cem_components": 1, "cem_covariance": "diag", "cem_variant": "official"}
    rows = make_rows([measured("noise", 0.1, 0.5, 0.9, 0.01, **some) for some in ({}, own)])
    assert [cell_name(row, rows) for row in rows] == [
        "noise + CEM, K = 5, by class, spherical, variant = paper",
        "noise + CEM, K = 1, without labels, diag, variant = official",
    ]


def test_rows_say_their_noise_and_only_without_it_are_they_undefended():
    runs = [measured("bottleneck", s, 0.0, 0.9, 0.01) for s in (0.0, 0.1)] + [measured("noise", 0.1, 0.0, 0.9, 0.01)]
    rows = make_rows(runs)
    names = [cell_name(row, rows) for row in rows]
    assert names == ["bottleneck, σ = 0", "bottleneck, σ = 0.1", "noise"]
    assert [cell_name(row, rows, shown=["noise_std"]) for row in rows] == ["bottleneck"] * 2 + ["noise"]
    assert [row.undefended for row in rows] == [True, False, False]
    assert [row.noise_std for row in rows] == [0.0, 0.1, 0.1]


def test_jobs_side_by_side_give_the_same_results(finished, tmp_path):
    together = evaluate(finished.grid, tmp_path, jobs=2, command="cem-fast evaluate")
    assert len(together["runs"]) == len(finished.results["runs"])
    for record, expected in zip(together["runs"], finished.results["runs"]):
        assert record["config"] == expected["config"]
        assert record["attacks"]["ridge"]["mse"] == pytest.approx(expected["attacks"]["ridge"]["mse"], rel=0.05)
    assert not multiprocessing.active_children()


class Heard(Watch):
    """Writes down which runs ended, and how."""

    def __init__(self):
        self.ends = []

    def finished(self, index, total, config, record, *, reused):
        self.ends.append((index, "found" if reused else "finished"))

    def failed(self, index, total, config, reason, *, again):
        self.ends.append((index, "again" if again else "failed"))


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_failing_run_does_not_end_the_grid_and_is_tried_again_by_the_next_call(tiny_grid, tmp_path, jobs):
    broken = replace(tiny_grid, undefended=(), noise_levels=(), cem_weights=(1e30, 0.0), epochs=3, attacks=("ridge",))
    heard = Heard()
    results = evaluate(broken, tmp_path, jobs=jobs, watch=heard)
    assert sorted(heard.ends) == [(0, "failed"), (1, "finished")]
    (failure,) = results["failed"]
    assert failure["config"] == broken.runs()[0].to_json()
    assert failure["reason"].startswith("the training loss is ")
    assert [run["cem"] for run in results["runs"]] == [False]
    assert json.loads((tmp_path / RESULTS).read_text()) == results
    assert not multiprocessing.active_children()
    assert not list(tmp_path.rglob("*.tmp"))
    if jobs == 1:
        heard.ends.clear()
        assert evaluate(broken, tmp_path, watch=heard)["failed"] == results["failed"]
        assert heard.ends == [(1, "found"), (0, "failed")]


def test_where_every_run_fails_the_old_results_stay(tiny_grid, tmp_path):
    broken = replace(tiny_grid, undefended=(), noise_levels=(), cem_weights=(1e30,), epochs=3)
    results = evaluate(broken, tmp_path)
    assert (results["runs"], len(results["failed"])) == ([], 1)
    assert not (tmp_path / RESULTS).exists()


def test_what_keeps_results_from_being_written_ends_the_grid(tiny_grid, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved_run, "write_atomically", full)
    with pytest.raises(OSError, match="No space left on device"):
        evaluate(replace(tiny_grid, attacks=("ridge",)), tmp_path)


@pytest.mark.parametrize("kills", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_whose_process_is_killed_is_tried_once_more(tiny_grid, tmp_path, kills):
    from cem_fast.experiments import workers

    (config, *_) = replace(tiny_grid, undefended=(), attacks=("ridge",), epochs=10).runs()
    events = []
    for kind, number, details in workers.run_all([(7, config, tmp_path / "run")], jobs=2, device="cpu", fresh=False):
        assert number == 7
        events.append((kind, *details) if kind != "stage" else ("stage",))
        if kind == "stage" and kills:
            kills -= 1
            multiprocessing.active_children()[0].kill()
    ends = [event for event in events if event[0] in ("again", "failed", "finished")]
    died = "its process was killed by signal 9"
    assert ends in ([("again", died), ("finished",)], [("again", died), ("failed", died)])
    assert (tmp_path / "run" / saved_run.DESCRIPTION).exists() == (ends[-1][0] == "finished")
    assert events.count(("started",)) == 2
    assert not multiprocessing.active_children()


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


def test_nothing_is_trained_for_a_folder_that_cannot_be_written_to(tiny_grid, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train", None)
    (tmp_path / "file").write_text("keep")
    config = tiny_grid.runs()[0]
    for folder in (tmp_path / "file", tmp_path / "file/below", "/proc/nope", ""):
        with pytest.raises(ValueError, match="folder must be"):
            run(config, folder)
        with pytest.raises(ValueError, match="folder must be"):
            evaluate(tiny_grid, folder)
    splits = load_data(config.data, config.fold, config.image_size)
    with pytest.raises(ValueError, match="the test part must hold at least 2 images, got 1"):
        run(config, tmp_path / "run", splits=replace(splits, test=splits.test[torch.arange(1)]))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


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
        found.append((record["leakage"], loaded.description["curves"]))
        assert loaded.loss.mixture.num_components == loaded.config.cem_components  # the run's own is what is kept
    assert found[0] == found[1]
    assert found[0][0]["plugin_nats"] > 0


def test_what_is_left_of_a_grid_is_done_on_as_many_processes_and_threads_as_all_of_it(finished, tmp_path, monkeypatch):
    from cem_fast.experiments import workers

    folder = shutil.copytree(finished.folder, tmp_path / "copy")
    shutil.rmtree(folder / finished.results["runs"][3]["checkpoint"])
    asked = []
    monkeypatch.setattr(workers, "run_all", lambda tasks, **how: asked.append(([t[0] for t in tasks], how)) or iter([]))
    results = evaluate(finished.grid, folder, jobs=4, command="cem-fast evaluate")
    assert asked == [([3], {"jobs": 4, "device": "cpu", "fresh": False})]
    assert len(results["runs"]) == len(finished.results["runs"]) - 1
