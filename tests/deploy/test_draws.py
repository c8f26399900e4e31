"""Random draws as inputs: what an exported half computes with given draws is what the defense computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import distributions

from cem_fast import defenses, models
from cem_fast.defenses.quantized import Code
from cem_fast.deploy import draws
from cem_fast.deploy.draws import Draws, RandomInput
from cem_fast.deploy.halves import Device

DEFENSES = {
    "none": {},
    "noise": {"noise_std": 0.1},
    "dropout": {"noise_std": 0.1, "dropout_rate": 0.3},
    "topk_pruning": {"noise_std": 0.1, "pruned_share": 0.5},
    "sca": {"noise_std": 0.1, "sparse_threshold": 0.5, "seed": 0},
    "local_dp": {
        "privacy_mechanism": "laplace",
        "privacy_epsilon": 100.0,
        "privacy_delta": 0.0,
        "privacy_clip": 5.0,
    },
}


class Own(defenses.Defense):
    """A user's defense, with a draw of torch.normal and a bit flip."""

    def release(self, features):
        flips = torch.bernoulli(torch.full_like(features, 0.25))
        return torch.normal(features, 0.2) * (1 - 2 * flips)


@pytest.mark.parametrize("name", DEFENSES)
def test_standard_draws_give_the_distribution_of_the_defense(name):
    settings = {"noise_std": 0.0, **DEFENSES[name]}
    defense = defenses.build(name, **settings)
    features = torch.rand(1, 4, 4, 4, generator=torch.Generator().manual_seed(1)).expand(4000, 4, 4, 4).contiguous()
    inputs = draws.find(defense.release, features[:2])
    torch.manual_seed(0)
    released = defense.release(features)
    with Draws(draws.seeded(inputs, 4000, seed=2)):
        given = defense.release(features)
    assert torch.allclose(given.mean(0), released.mean(0), atol=0.1)
    assert draws.variance(given) == pytest.approx(draws.variance(released), rel=0.03, abs=1e-12)


def test_a_defense_of_ones_own_needs_no_change():
    features = torch.rand(3000, 5)
    found = draws.find(Own().release, features[:2])
    assert [each.distribution for each in found] == ["uniform", "normal"]
    with Draws(draws.seeded(found, 3000, seed=0)):
        given = Own().release(torch.ones(3000, 5))
    assert (given < 0).double().mean() == pytest.approx(0.25, abs=0.03)
    assert given.abs().mean() == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize(
    ("call", "mean", "variance"),
    [
        (lambda like: torch.randn(like.shape), 0, 1),
        (lambda like: torch.randn(*like.shape), 0, 1),
        (lambda like: torch.rand(like.shape), 0.5, 1 / 12),
        (lambda like: torch.rand_like(like), 0.5, 1 / 12),
        (lambda like: torch.normal(1.0, 2.0, like.shape), 1, 4),
        (lambda like: torch.empty_like(like).normal_(1, 2), 1, 4),
        (lambda like: torch.empty_like(like).uniform_(1, 3), 2, 1 / 3),
        (lambda like: torch.empty_like(like).exponential_(2), 0.5, 0.25),
        (lambda like: distributions.Laplace(0.0, 1.0).rsample(like.shape), 0, 2),
        (lambda like: torch.nn.functional.dropout(like, 0.5, training=True), 1, 1),
    ],
)
def test_random_functions_become_standard_draws(call, mean, variance):
    like = torch.ones(2000, 8)
    found = draws.find(call, like[:2])
    assert len(found) == 1
    with Draws(draws.seeded(found, 2000, seed=0)):
        given = call(like)
    assert given.mean() == pytest.approx(mean, abs=0.05)
    assert given.var() == pytest.approx(variance, rel=0.06)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: x + torch.randint_like(x, 3), "torch.randint_like cannot be exported"),
        (lambda x: torch.poisson(x), "torch.poisson cannot be exported"),
        (lambda x: torch.nn.functional.gumbel_softmax(x), "torch.gumbel_softmax cannot be exported"),
        (lambda x: x + torch.randn(3), "every draw must have the shape"),
        (lambda x: x + torch.randn(1, 3), "messages would share it"),
        (lambda x: x + np.random.default_rng().normal(), "draw by torch's functions"),
    ],
)
def test_a_random_function_that_cannot_be_exported_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        draws.find(call, torch.rand(2, 3))


def test_the_network_without_noise_is_that_of_training():
    model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4).eval()
    images = torch.rand(3, 1, 16, 16)
    defense = defenses.GaussianNoise(noise_std=0.1)
    device = Device(model, defense, Code(), mean=[0.5], std=[0.25])
    with torch.no_grad():
        message = device(images, torch.zeros(3, 4, 4, 4))
        assert torch.allclose(message, model.encoder((images - 0.5) / 0.25), atol=1e-6)


def test_a_dense_bottleneck_is_sent_without_its_normalization():
    model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck="D64")
    model(torch.rand(8, 1, 16, 16))
    model.eval()
    device, images = Device(model, defenses.NoDefense(), Code()), torch.rand(3, 1, 16, 16)
    assert not any(isinstance(layer, torch.nn.BatchNorm1d) for layer in device.modules())
    with torch.no_grad():
        assert torch.allclose(device(images), model.encoder(images), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "float16", "uint8"])
def test_codes_lose_at_most_half_a_step(dtype):
    code = Code(dtype, low=-0.4, high=1.4)
    values = torch.linspace(-0.4, 1.4, 999)
    step = {"float32": 0, "float16": 2**-10, "uint8": 1.8 / 255}[dtype]
    assert (code.decode(code.encode(values)) - values).abs().max() <= 0.5001 * step


@pytest.mark.parametrize(("dtype", "low", "high"), [("int4", 0, 1), ("uint8", 1, 1), ("uint8", float("nan"), 1)])
def test_a_wrong_code_is_named(dtype, low, high):
    with pytest.raises(ValueError, match="message"):
        Code(dtype, low, high)


def test_secure_draws_are_standard_and_never_repeat():
    inputs = [RandomInput("noise", "normal", (5000,)), RandomInput("uniform", "uniform", (5000,))]
    (normal, uniform), again = draws.secure(inputs, 2), draws.secure(inputs, 2)
    assert normal.var() == pytest.approx(1, rel=0.1)
    assert normal.double().pow(4).mean() == pytest.approx(3, rel=0.2)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert uniform.mean() == pytest.approx(0.5, abs=0.03)
    assert not torch.equal(normal, again[0])
    assert not torch.equal(normal[0], normal[1])
