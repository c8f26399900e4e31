"""Configuration files of the paper's tables: they load, plan every row, and have the paper's settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from support import twins

import cem_fast
from cem_fast import attacks, models
from cem_fast._support.eval_mode import in_eval_mode
from cem_fast.cli import main as cli
from cem_fast.cli.parser import read_grid
from cem_fast.config import GridConfig
from cem_fast.cost import parameters
from cem_fast.data import cifar10, cifar100, facescrub
from cem_fast.experiments.build import build_parts

FOLDER = Path(cem_fast.__file__).parent / "configs" / "paper"
ROWS = ("bottleneck", "distance_correlation", "dropout", "patrol", "ressfl", "noise_nopeek", "noise_arl")
TABLES = {
    "cifar10": {"model": "vgg11", "epochs": 240, "batch_size": 128, "undefended": ("none",)},
    "cifar100": {"model": "vgg11", "epochs": 240, "batch_size": 128, "undefended": ()},
    "facescrub": {"model": "vgg11", "epochs": 240, "batch_size": 256, "undefended": ("none",)},
    "tiny_imagenet": {"model": "resnet20_relu", "epochs": 120, "batch_size": 256, "undefended": ("none",)},
}


def load(name: str) -> GridConfig:
    return read_grid(FOLDER / f"{name}.yaml")


def test_every_table_has_a_file():
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(TABLES)


@pytest.mark.parametrize("name", TABLES)
def test_a_table_plans_every_row_with_and_without_cem(name):
    grid = load(name)
    assert grid.data == (name,)
    assert grid.defenses == ROWS
    shared = {"cut": 2, "noise_std": 0.025, "learning_rate": 0.05, "attack_decoder": "res_norm", "attack_epochs": 50}
    for key, value in {**TABLES[name], **shared}.items():
        assert getattr(grid, key) == value
    runs = grid.runs()
    assert {(run.defense, run.cem_weight) for run in runs if run.noise_std > 0} == {
        (row, weight) for row in ROWS for weight in (0, 16)
    }
    assert [run.defense for run in runs if run.noise_std == 0] == list(TABLES[name]["undefended"])
    assert set(yaml.safe_load((FOLDER / f"{name}.yaml").read_text())) <= {*GridConfig.__dataclass_fields__}


@pytest.mark.parametrize(
    "name, image_shape, num_classes, on_device, features",
    [
        ("cifar10", (3, 32, 32), 10, 85_256, (8, 8, 8)),
        ("cifar100", (3, 32, 32), 100, 85_256, (8, 8, 8)),
        ("facescrub", (3, 48, 48), 530, 85_256, (8, 12, 12)),
        ("tiny_imagenet", (3, 64, 64), 200, 432 + 32 + 2 * (2304 + 32) + 1160, (8, 64, 64)),
    ],
)
def test_the_networks_are_the_papers(name, image_shape, num_classes, on_device, features):
    run = next(run for run in load(name).runs() if run.defense == "bottleneck")
    model, _, _ = build_parts(run, image_shape=image_shape, num_classes=num_classes)
    assert parameters(model.encoder) == on_device
    with in_eval_mode(model):
        assert model.encoder(torch.zeros(1, *image_shape)).shape[1:] == features


@pytest.mark.parametrize("name", TABLES)
def test_a_dry_run_shows_the_plan(name, tmp_path, monkeypatch, capfd):
    if name == "facescrub":
        twins.faces(tmp_path)
        facescrub.prepare(tmp_path)
    elif name == "tiny_imagenet":
        twins.tiny(tmp_path, monkeypatch)
    else:
        twins.cifar(cifar10 if name == "cifar10" else cifar100, tmp_path, monkeypatch)
    monkeypatch.setenv("CEM_FAST_DATA", "elsewhere")
    arguments = ["--config", str(FOLDER / f"{name}.yaml"), "--data-root", str(tmp_path)]
    arguments += ["--defenses", ",".join(ROWS), "--folder", str(tmp_path / "results"), "--dry-run"]
    assert cli.main(["evaluate", *arguments]) == 0
    out = capfd.readouterr().out
    planned = len(TABLES[name]["undefended"]) + 2 * len(ROWS)
    assert f"[{planned}/{planned}] {name} / {ROWS[-1]} + CEM at noise 0.025" in out
    assert not (tmp_path / "results").exists()


def test_the_evaluation_pairs_every_defense_with_itself_and_sweeps_the_noise():
    runs = read_grid(FOLDER.parent / "evaluation.yaml").runs()
    assert 0 not in {run.fold for run in runs}  # where the settings were chosen
    for data in ("faces", "digits"):
        for fold in (1, 2):
            of_fold = [run for run in runs if (run.data, run.fold) == (data, fold)]
            on = {replace(run, cem_weight=0.0) for run in of_fold if run.cem_weight and run.defense in ROWS}
            assert {run.defense for run in on} == set(ROWS)
            assert len({run.cem_weight for run in of_fold if run.defense in ROWS}) == 2
            assert on <= set(of_fold)  # a partner that differs in the weight of CEM alone
            plain = {run.noise_std for run in of_fold if run.defense in ("noise", "bottleneck") and not run.cem_weight}
            assert len(plain) >= 5
            assert 0 in plain


def test_fashion_mnist_is_evaluated_with_the_settings_of_the_digits():
    def cells(runs, data):
        attack = {"attacks": ("ridge",), "attack_gan_epochs": 1}  # fewer attacks, each with the same budget
        return {replace(run, data="", seed=0, fold=1, **attack) for run in runs if run.data == data}

    fashion = cells(read_grid(FOLDER.parent / "fashion_mnist.yaml").runs(), "fashion_mnist_5k")
    assert fashion < cells(read_grid(FOLDER.parent / "evaluation.yaml").runs(), "digits")
    assert {run.defense for run in fashion} >= {*ROWS, "noise"}


@pytest.mark.parametrize("name", ["faces", "digits", "fashion_mnist", "cifar10_jpeg"])
def test_grids_of_the_dense_bottleneck_have_what_equal_accuracy_needs(name):
    grid = read_grid(FOLDER.parent / "protect" / f"{name}.yaml")
    runs = grid.runs()
    plain = [run for run in runs if run.bottleneck == 8 and not run.cem_weight]
    dense = [run for run in runs if str(run.bottleneck).startswith("D")]
    assert len({run.noise_std for run in plain}) >= 6
    assert 0 in {run.noise_std for run in plain}
    assert {run.cem_weight > 0 for run in dense} == {True, False}
    assert len({(run.seed, run.fold) for run in runs}) == 2
    assert 0 not in grid.folds
    assert 9 <= len(runs) / 2 <= 12
    assert set(grid.attacks) <= {*attacks.names()}


@pytest.mark.parametrize("name, image_shape", [("faces", (1, 48, 48)), ("digits", (1, 16, 16))])
def test_grids_of_all_defenses_share_the_settings_of_the_grid_of_the_bottleneck(name, image_shape):
    def read(file):
        return [run for run in read_grid(FOLDER.parent / "protect" / f"{file}.yaml").runs() if run.fold == 1]

    def numbers(run):
        shape = {"image_shape": image_shape, "num_classes": 10}
        encoder = models.build(run.model, cut=run.cut, bottleneck=run.bottleneck, **shape).encoder.eval()
        with torch.no_grad():
            return encoder(torch.zeros(2, *image_shape))[0].numel()

    first, runs = read(name), read(f"{name}_defenses")
    own = {"defense": "noise", "bottleneck": 8, "cut": 2, "noise_std": 0.1, "cem_weight": 0.0}
    own |= {"nopeek_weight": 1.0, "dropout_rate": 0.3, "adversary_weight": 0.3}
    assert len({replace(run, **own) for run in (*first, *runs)}) == 1
    dense = {(run.defense, run.cem_weight > 0) for run in runs if run.bottleneck == "D64" and run.noise_std}
    assert dense == {(row, cem) for row in ("noise", *ROWS[1:]) for cem in (False, True)}
    assert {run for run in first if run.bottleneck == 8 and not run.cem_weight} <= {*runs}
    plain = [run for run in runs if run.defense in ("noise", "bottleneck") and not run.cem_weight]
    controls = [run for run in plain if run not in first]
    assert [run.noise_std for run in controls] == [0, 0.1, 0.1]
    without_noise, convolution, deeper = controls
    assert without_noise.bottleneck == "D64"
    assert 63 <= numbers(convolution) <= 64
    assert deeper == replace(convolution, bottleneck=8, cut=3)
