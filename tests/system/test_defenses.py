"""Defenses: what they release, what they add to the loss, and that an adversary trained against loses."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cem_fast import defenses
from cem_fast.defenses.adversarial import ProxyDecoder
from cem_fast.split import SplitModel


def build(name: str, **changes) -> defenses.Defense:
    return defenses.build(name, **{"noise_std": 0.1, "adversary_weight": 0.5, "seed": 0, **changes})


def test_every_name_builds_and_only_none_goes_without_a_bottleneck():
    assert defenses.names() == ("none", "bottleneck", "noise", "adversarial", "noise_arl")
    assert [name for name in defenses.names() if not build(name).uses_bottleneck] == ["none"]


@pytest.mark.parametrize("name", ["none", "bottleneck", "adversarial"])
def test_no_noise_where_none_is_promised(name):
    features = torch.rand(3, 2, 4, 4)
    assert build(name).release(features) is features


@pytest.mark.parametrize("name", ["noise", "noise_arl"])
@pytest.mark.parametrize("std", [0.05, 0.4])
@pytest.mark.parametrize("training", [True, False])
def test_noise_has_the_stated_variance_in_training_and_in_use(name, std, training):
    defense = build(name, noise_std=std).train(training)
    features = torch.rand(64, 8, 16, 16)
    first, second = defense.release(features) - features, defense.release(features) - features
    assert first.var().item() == pytest.approx(std**2, rel=0.02)
    assert first.mean().abs().item() < 5 * std / features.numel() ** 0.5
    correlation = (first * second).mean().item() / std**2
    assert abs(correlation) < 5 / features.numel() ** 0.5  # fresh at every call


def test_noise_lets_the_gradient_through():
    features = torch.rand(2, 3, requires_grad=True)
    build("noise").release(features).sum().backward()
    assert torch.equal(features.grad, torch.ones(2, 3))


def test_noise_arl_penalizes_what_the_noisy_features_give_away():
    assert isinstance(build("noise_arl"), defenses.AdversarialRepresentation)


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    images = F.interpolate(torch.rand(24, 1, 3, 3), 8, mode="bilinear")
    model = SplitModel(
        nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), nn.Sigmoid()),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 2)),
    )
    return model, images, torch.zeros(24, dtype=torch.int64)


def rounds(defense, model, images, labels, *, count, learning_rate) -> float:
    """Trains the encoder against the defense's penalty alone; returns the proxy's mean error over the last half."""
    defense.start(model, images)
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=learning_rate)
    errors = []
    for _ in range(count):
        features = model.encoder(images)
        released = defense.release(features)
        penalty = defense.penalty(images, features, released, labels)
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        errors.append(F.mse_loss(defense.proxy(released), images).item())
        defense.after_step(images, released.detach())
    return sum(errors[count // 2 :]) / (count - count // 2)


@pytest.mark.parametrize("name", ["adversarial", "noise_arl"])
def test_the_adversary_rebuilds_less_when_the_encoder_is_trained_against_it(tiny, name):
    model, images, labels = tiny
    defense = build(name, adversary_weight=1.0, noise_std=0.02)
    alone = rounds(defense, model, images, labels, count=120, learning_rate=0.0)
    against = rounds(defense, model, images, labels, count=120, learning_rate=0.5)
    assert alone < 0.6 * defense.variance.item()  # it works where nobody trains against it
    assert against > 1.5 * alone


def test_the_proxy_learns_and_the_penalty_is_the_variance_it_explains(tiny):
    model, images, labels = tiny
    defense = build("adversarial", adversary_weight=0.5)
    rounds(defense, model, images, labels, count=120, learning_rate=0.0)
    released = model.encoder(images)
    penalty = defense.penalty(images, released, released, labels)
    with torch.no_grad():
        explained = 1 - (defense.proxy(released) - images).square().mean() / images.var(0, correction=0).mean()
    assert penalty.item() == pytest.approx(0.5 * explained.item(), rel=1e-5)
    assert explained > 0.6


def test_the_penalty_trains_the_encoder_and_the_step_trains_the_proxy(tiny):
    model, images, labels = tiny
    defense = build("adversarial")
    rounds(defense, model, images, labels, count=30, learning_rate=0.0)
    defense.proxy.zero_grad()
    released = model.encoder(images)
    defense.penalty(images, released, released, labels).backward()
    assert all(p.grad is None for p in defense.proxy.parameters())
    assert model.encoder[0].weight.grad.abs().sum() > 0
    weights, before = model.encoder[0].weight.clone(), defense.proxy.first.weight.clone()
    defense.after_step(images, released.detach())
    assert torch.equal(model.encoder[0].weight, weights)
    assert not torch.equal(defense.proxy.first.weight, before)


def test_the_proxy_depends_on_the_seed_alone_and_leaves_the_networks_mode(tiny):
    model, images, _ = tiny
    first, same, other = build("adversarial", seed=3), build("adversarial", seed=3), build("adversarial", seed=4)
    model.train()
    state = torch.get_rng_state()
    for defense in (first, same, other):
        defense.start(model, images)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.proxy.first.weight, same.proxy.first.weight)
    assert not torch.equal(first.proxy.first.weight, other.proxy.first.weight)


@pytest.mark.parametrize("feature, image", [((2, 3, 3), (1, 12, 12)), ((2, 4, 4), (3, 18, 18)), ((2, 8, 8), (1, 8, 8))])
def test_the_proxy_fits_any_ratio_of_sizes(feature, image):
    assert ProxyDecoder(feature, image)(torch.rand(2, *feature)).shape == (2, *image)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("nois", {}, "unknown defense 'nois': .*the nearest is 'noise'"),
        ("noise", {"noise_std": 0.0}, "noise_std must be positive, got 0.0"),
        ("noise_arl", {"noise_std": float("nan")}, "noise_std must be positive, got nan"),
        ("adversarial", {"adversary_weight": 0.0}, "adversary_weight must be positive, got 0.0"),
    ],
)
def test_bad_requests(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(name, **changes)


def test_a_setting_that_a_defense_does_not_use_does_not_matter():
    build("bottleneck", noise_std=0.0, adversary_weight=0.0)


def test_an_adversary_needs_feature_maps(tiny):
    _, images, _ = tiny
    flat = SplitModel(nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid()), nn.Linear(8, 2))
    with pytest.raises(
        ValueError, match=r"need features that are maps \[N, C, H, W\], got shape \(1, 8\): cut the network"
    ):
        build("adversarial").start(flat, images)
