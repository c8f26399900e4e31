"""All published data sets: fixed parts, missing ones, and runs on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import twins

from cem_fast import data
from cem_fast.cli import main as cli
from cem_fast.config import GridConfig, RunConfig
from cem_fast.data import cifar10, cifar10_jpeg, cifar100, facescrub, fashion_mnist
from cem_fast.experiments import saved_run
from cem_fast.experiments.grid import check
from cem_fast.experiments.run import run


@pytest.fixture
def everything(tmp_path, monkeypatch):
    """All published data sets below one root."""
    twins.cifar(cifar10, tmp_path, monkeypatch)
    for seed, part in enumerate(("train", "test")):
        twins.write_images(tmp_path / "cifar10-jpeg" / part, mode="RGB", seed=seed)
    twins.cifar(cifar100, tmp_path, monkeypatch)
    twins.fashion(tmp_path / "fashion-mnist")
    twins.tiny(tmp_path, monkeypatch)
    twins.faces(tmp_path)
    facescrub.prepare(tmp_path)
    return tmp_path


PUBLISHED = ("cifar10", "cifar10-jpeg", "cifar100", "tiny_imagenet", "facescrub", "fashion_mnist", "fashion_mnist_5k")


def test_every_published_data_set_keeps_its_parts(everything, monkeypatch):
    assert set(PUBLISHED) == set(data.names()) - {"faces", "digits"}
    monkeypatch.setenv("CEM_FAST_DATA", str(everything))
    for name in PUBLISHED:
        splits = data.load(name, fold=0, image_size=16)
        assert splits.name == name
        assert splits.fixed
        assert splits.image_shape[1:] == (16, 16)
        assert splits.train.images.dtype == torch.float32
        assert 0 <= splits.train.images.min() < splits.train.images.max() <= 1
        assert splits.digest() == data.load(name, fold=4, image_size=16, seed=7).digest()
        with pytest.raises(ValueError, match="fold must be an integer from 0 to 4, got 5"):
            data.load(name, fold=5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_data_set_is_one_line_that_names_the_path(name, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "debian")
    monkeypatch.setenv("CEM_FAST_DATA", "elsewhere")
    assert cli.main(["train", "--data", name, "--data-root", str(tmp_path), "--folder", str(tmp_path / "run")]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    whole = name.removesuffix("_5k")
    assert err.startswith(f"cem-fast: {whole} is not there, no {tmp_path}/")
    how = {"facescrub": "cem-fast data prepare", "cifar10-jpeg": "put JPEG copies of CIFAR-10 there"}
    assert how.get(name, f"cem-fast data fetch {whole}") in err


def test_a_run_on_a_published_data_set_and_its_data_again(everything, tmp_path, monkeypatch):
    monkeypatch.setenv("CEM_FAST_DATA", str(everything))
    config = RunConfig(data="cifar10", image_size=16, epochs=2, cem_weight=1.0, cem_components=2)
    config = replace(config, attacks=("ridge",), noise_draws=2)
    record = run(config, tmp_path / "run")
    assert (record.data, record.num_test) == ("cifar10", 10)
    loaded = saved_run.load_run(tmp_path / "run")
    assert len(loaded.data.train) == 50
    monkeypatch.setenv("CEM_FAST_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match="cifar10 is not there, no .*elsewhere/cifar-10-batches-py"):
        _ = saved_run.load_run(tmp_path / "run").data


def test_folds_of_a_fixed_test_part_are_refused(everything, monkeypatch):
    monkeypatch.setenv("CEM_FAST_DATA", str(everything))
    grid = GridConfig(data=("fashion_mnist",), image_size=16, folds=(1, 2))
    with pytest.raises(ValueError, match="folds must list one value for 'fashion_mnist', .*got 1 and 2"):
        check(grid.runs())
    check(replace(grid, folds=(2,)).runs())
    check(replace(grid, validation=True).runs())


def test_a_run_and_its_data_again_under_validation(everything, tmp_path, monkeypatch):
    monkeypatch.setenv("CEM_FAST_DATA", str(everything))
    config = RunConfig(data="cifar10", image_size=16, epochs=1, attacks=("ridge",), cem_components=2, validation=True)
    run(config, tmp_path / "run")
    loaded = saved_run.load_run(tmp_path / "run")
    assert loaded.config == config
    assert len(loaded.data.train) + len(loaded.data.test) == 50
    with pytest.raises(ValueError, match="validation must be false for faces"):
        data.load("faces", fold=0, validation=True)


def test_the_copies_of_cifar10_are_the_first_of_each_class_and_mirrored(everything, monkeypatch):
    monkeypatch.setattr(cifar10_jpeg, "OF_CLASS", (3, 2))
    splits = cifar10_jpeg.load(everything, image_size=16)
    assert (len(splits.train), len(splits.test), splits.num_classes) == (2 * 3, 2 * 2, 2)
    assert splits.mirrored
    assert str(everything) not in splits.credit
