"""Settings of a run and of a grid."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from cem_fast.config import GridConfig, RunConfig


@pytest.mark.parametrize(
    "change, message",
    [
        ({"noise_std": -1.0}, "noise_std must be at least 0, got -1.0"),
        ({"noise_std": math.nan}, "noise_std must be finite, got nan"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"accumulate": 33}, "accumulate must be at most batch_size 32, got 33"),
        ({"attack_batch_size": 1}, "attack_batch_size must be at least 2, got 1"),
        ({"dropout_rate": float("nan")}, "dropout_rate must be finite, got nan"),
        ({"privacy_clip": float("inf")}, "privacy_clip must be finite, got inf"),
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


def test_secure_draws_are_a_setting_of_runs_that_older_files_lack():
    plain, secure = RunConfig(), RunConfig(secure=True)
    assert "secure" not in plain.to_json()  # the bytes and digests of earlier runs
    assert RunConfig.from_json(plain.to_json()) == plain
    assert RunConfig.from_json(secure.to_json()) == secure != plain
    with pytest.raises(TypeError, match="secure must be bool, got 'yes'"):
        RunConfig(secure="yes")


@pytest.mark.parametrize(
    "settings",
    [{"defenses": ({"defense": "noise", "secure": True},)}, {"per_data": {"faces": {"secure": True}}}],
)
def test_a_grid_refuses_secure_draws(settings):
    with pytest.raises(ValueError, match="secure must not be set in a grid, since evaluations repeat their draws"):
        GridConfig(**settings)


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


def test_mirror_images_are_a_setting_that_files_have_only_where_it_is_set():
    assert "mirror" not in RunConfig().to_json()
    assert RunConfig.from_json(RunConfig(mirror=True).to_json()).mirror
    assert all(run.mirror for run in GridConfig(mirror=True).runs())


def test_noise_of_the_training_alone_is_written_only_where_it_is_set():
    assert "train_noise_std" not in RunConfig().to_json()
    config = RunConfig(train_noise_std=0.3)
    assert config.to_json()["train_noise_std"] == 0.3
    assert RunConfig.from_json(config.to_json()) == config
    assert RunConfig.from_json(RunConfig().to_json()) == RunConfig()
    grid = GridConfig(train_noise_std=0.3, seeds=(0,), cem_weights=(0.0,))
    assert [(run.noise_std, run.train_noise_std) for run in grid.runs()] == [(0.0, None), (0.1, 0.3)]
    with pytest.raises(ValueError, match="train_noise_std must be null without noise_std, got 0.3"):
        RunConfig(noise_std=0.0, train_noise_std=0.3)
    with pytest.raises(ValueError, match="train_noise_std must be at least 0, got -1.0"):
        RunConfig(train_noise_std=-1.0)
