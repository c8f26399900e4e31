"""Loading by name or path, and the baselines of an attacker without features."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from cem_fast import GaussianMixture, data, load_run
from cem_fast.data.splits import Splits


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.load("facs", fold=0), r"unknown data set 'facs': .*the nearest is 'faces'"),
        (lambda: data.load("no/such/folder", fold=0), r"no/such/folder is not a folder"),
        (lambda: data.load("faces", fold=5), r"fold must be an integer from 0 to 4, got 5"),
        (lambda: data.load("faces", fold=0, image_size=4), r"image_size must be at least 8, got 4"),
        (lambda: data.load("faces", fold=0, image_size=10**9), r"image_size must be at most 2048, got 1000000000"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: data.load(None, fold=0), "name_or_path must be a path .* got NoneType"),
        (lambda: data.load("digits", fold=0, image_size="16"), "image_size must be an integer .* got '16'"),
        (lambda: data.load("digits", fold=0, image_size=16.5), "image_size must be an integer .* got 16.5"),
        (lambda: load_run(None), "path must be a path .* got NoneType"),
        (lambda: GaussianMixture.load(5), "path must be a path .* got int"),
    ],
)
def test_arguments_of_another_type_are_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_class_mean_baseline_is_the_better_one():
    found = data.baselines(data.load("faces", fold=0, image_size=16))
    assert 0 < found["class_mean_mse"] < 0.7 * found["mean_image_mse"]


def test_baselines_by_hand():
    images = torch.tensor([0.0, 0.2, 0.6, 1.0]).reshape(4, 1, 1, 1)
    train = TensorDataset(images, torch.tensor([0, 0, 1, 1]))
    test = TensorDataset(torch.tensor([0.1, 0.9]).reshape(2, 1, 1, 1), torch.tensor([0, 1]))
    found = data.baselines(Splits.from_datasets(train, test))
    assert found["mean_image_mse"] == pytest.approx(((0.1 - 0.45) ** 2 + (0.9 - 0.45) ** 2) / 2)
    assert found["class_mean_mse"] == pytest.approx((0 + 0.1**2) / 2)
