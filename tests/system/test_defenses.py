"""Defenses: what they release, what they add to the loss, and that an adversary trained against loses."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cem_fast import defenses
from cem_fast.config import RunConfig
from cem_fast.defenses.adversarial import ProxyDecoder
from cem_fast.split import SplitModel

NOISY = ("noise", "noise_arl")  # what is nothing without noise


def build(name: str, **changes) -> defenses.Defense:
    """A defense with the default settings, but for the changes."""
    config = asdict(RunConfig())
    return defenses.build(name, **{**{key: config[key] for key in defenses.settings()}, **changes})


def part(defense: defenses.Defense, kind: type) -> defenses.Defense:
    """The part of a composed defense that is of one kind."""
    return next(module for module in defense.modules() if isinstance(module, kind))


def test_every_name_builds_and_only_none_goes_without_a_bottleneck():
    for noise_std in (0.1, 0.0):
        built = {name: build(name, noise_std=noise_std) for name in defenses.names() if noise_std or name not in NOISY}
        assert [name for name, defense in built.items() if not defense.uses_bottleneck] == ["none"]
        assert all(defense.noise_std == noise_std for defense in built.values())


@pytest.mark.parametrize("name", ["none", "bottleneck", "adversarial"])
def test_without_noise_the_features_are_released_as_they_are(name):
    features = torch.rand(3, 2, 4, 4)
    assert build(name, noise_std=0.0).release(features) is features


@pytest.mark.parametrize("name", defenses.names())
@pytest.mark.parametrize("training", [True, False])
def test_every_defense_adds_noise_of_the_stated_variance_last(name, training):
    defense = build(name, noise_std=0.3).train(training)
    features = torch.rand(64, 8, 8, 8)
    differences = []
    for _ in range(2):
        state = torch.get_rng_state()
        released = defense.release(features)
        torch.set_rng_state(state)
        differences.append(released - defense.before_noise(features))  # the same draws up to the noise
        torch.rand(1)
    first, second = differences
    assert first.var().item() == pytest.approx(0.3**2, rel=0.02)
    assert first.mean().abs().item() < 5 * 0.3 / features.numel() ** 0.5
    correlation = (first * second).mean().item() / 0.3**2
    assert abs(correlation) < 5 / features.numel() ** 0.5  # fresh at every call


@pytest.mark.parametrize("name", NOISY)
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


class Doubling(defenses.Defense):
    """Doubles the features, and writes down what it is told."""

    def __init__(self, noise_std=0.0, uses_bottleneck=True):
        super().__init__()
        self.noise_std, self.uses_bottleneck, self.heard = noise_std, uses_bottleneck, []

    def attach(self, model, image_shape):
        self.heard.append(("attach", tuple(image_shape)))

    def reshape(self, model, shapes):
        self.heard.append(("reshape", shapes))

    def before_epoch(self, model, images, labels, *, epoch, epochs):
        self.heard.append(("before_epoch", epoch, epochs))

    def release(self, features):
        return 2 * features

    def penalty(self, images, features, released, labels):
        return released.sum()

    def after_step(self, images, released):
        self.heard.append(("after_step", released))


class Adding(defenses.Defense):
    def release(self, features):
        return features + 1

    def penalty(self, images, features, released, labels):
        return features.sum()


def test_composition_chains_releases_sums_penalties_and_tells_every_part(tiny):
    model, images, labels = tiny
    features = torch.rand(4, 3)
    for parts, expected in (((Doubling(), Adding()), 2 * features + 1), ((Adding(), Doubling()), 2 * (features + 1))):
        defense = defenses.Composed(*parts)
        released = defense.release(features)
        assert torch.equal(released, expected)
        assert torch.allclose(defense.penalty(images, features, released, labels), released.sum() + features.sum())
        told = part(defense, Doubling).heard
        defense.start(model, images)
        defense.before_epoch(model, images, labels, epoch=1, epochs=3)
        defense.after_step(images, released)
        defense.reshape(model, {})
        assert told == [("attach", (1, 8, 8)), ("before_epoch", 1, 3), ("after_step", released), ("reshape", {})]
    nested = defenses.Composed(defenses.Composed(Doubling(), Adding()), defenses.GaussianNoise(noise_std=0.2))
    assert torch.equal(nested.before_noise(features), 2 * features + 1)
    assert nested.noise_std == 0.2
    assert defenses.Composed(defenses.GaussianNoise(noise_std=0.2), Doubling()).noise_std == 0  # not added last
    assert not defenses.Composed(Doubling(uses_bottleneck=False), Adding()).uses_bottleneck
    with pytest.raises(ValueError, match="parts must be at least one defense, got none"):
        defenses.Composed()


@pytest.mark.parametrize("name, kind", [("noise_arl", defenses.AdversarialRepresentation)])
def test_noisy_defenses_are_their_parts(name, kind):
    assert [type(each) for each in build(name, noise_std=0.2).parts] == [kind, defenses.GaussianNoise]


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
    proxy = part(defense, defenses.AdversarialRepresentation).proxy
    optimizer = torch.optim.SGD(model.encoder.parameters(), lr=learning_rate)
    errors = []
    for _ in range(count):
        features = model.encoder(images)
        released = defense.release(features)
        penalty = defense.penalty(images, features, released, labels)
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        errors.append(F.mse_loss(proxy(released), images).item())
        defense.after_step(images, released.detach())
    return sum(errors[count // 2 :]) / (count - count // 2)


@pytest.mark.parametrize("name", ["adversarial", "noise_arl"])
def test_the_adversary_rebuilds_less_when_the_encoder_is_trained_against_it(tiny, name):
    model, images, labels = tiny
    defense = build(name, adversary_weight=1.0, noise_std=0.02)
    alone = rounds(defense, model, images, labels, count=120, learning_rate=0.0)
    against = rounds(defense, model, images, labels, count=120, learning_rate=0.5)
    assert alone < 0.6 * images.var(0, correction=0).mean().item()  # it works where nobody trains against it
    assert against > 1.5 * alone


def test_the_proxy_learns_and_the_penalty_is_the_variance_it_explains(tiny):
    model, images, labels = tiny
    defense = build("adversarial", adversary_weight=0.5, noise_std=0.0)
    rounds(defense, model, images, labels, count=120, learning_rate=0.0)
    released = model.encoder(images)
    penalty = defense.penalty(images, released, released, labels)
    with torch.no_grad():
        explained = 1 - (defense.proxy(released) - images).square().mean() / images.var(0, correction=0).mean()
    assert penalty.item() == pytest.approx(0.5 * explained.item(), rel=1e-5)
    assert explained > 0.6


def test_the_penalty_trains_the_encoder_and_the_step_trains_the_proxy(tiny):
    model, images, labels = tiny
    defense = build("adversarial", noise_std=0.0)
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
    first, same, other = (build("adversarial", seed=seed, noise_std=0.0) for seed in (3, 3, 4))
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
        ("bottleneck", {"noise_std": -1.0}, "noise_std must be positive, got -1.0"),
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
