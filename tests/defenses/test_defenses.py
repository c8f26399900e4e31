"""Defenses: released features, penalties, and the effect of adversarial training."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cem_fast import defenses, metrics, models, training
from cem_fast.config import RunConfig
from cem_fast.data.splits import Part, Splits
from cem_fast.defenses.adversarial import ProxyDecoder
from cem_fast.defenses.distance_correlation import distance_correlation
from cem_fast.defenses.local_dp import gaussian_scale
from cem_fast.defenses.patrol import ExtraConvolution
from cem_fast.defenses.sca import SparseCoding, _gain
from cem_fast.experiments import saved_run
from cem_fast.experiments.build import build_parts, load_data
from cem_fast.experiments.run import run
from cem_fast.models.split import SplitModel

NOISY = ("noise", "noise_arl", "noise_nopeek")  # what is nothing without noise


def build(name: str, **changes) -> defenses.Defense:
    """A defense with the default settings, but for the changes."""
    config = asdict(RunConfig())
    return defenses.build(name, **{**{key: config[key] for key in defenses.settings()}, **changes})


def part(defense: defenses.Defense, kind: type) -> defenses.Defense:
    """The part of a composed defense that is of one kind."""
    return next(module for module in defense.modules() if isinstance(module, kind))


def test_every_name_builds_and_only_none_has_no_bottleneck():
    for noise_std in (0.1, 0.0):
        built = {name: build(name, noise_std=noise_std) for name in defenses.names() if noise_std or name not in NOISY}
        assert [name for name, defense in built.items() if not defense.uses_bottleneck] == ["none"]
        assert all(defense.noise_std == noise_std for defense in built.values())


@pytest.mark.parametrize(
    "name", ["none", "bottleneck", "adversarial", "ressfl", "patrol", "sca", "distance_correlation"]
)
def test_without_noise_the_features_are_released_unchanged(name):
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


@pytest.mark.parametrize("name", defenses.names())
def test_every_defense_takes_images_that_are_not_square(name):
    model, defense, _ = build_parts(RunConfig(defense=name), image_shape=(1, 16, 24), num_classes=2)
    images, labels = torch.rand(4, 1, 16, 24), torch.arange(4) % 2
    defense.start(model, images)
    features = model.encoder(images)
    released = defense.release(features)
    assert torch.as_tensor(defense.penalty(images, features, released, labels)).isfinite()
    defense.after_step(images, released.detach())
    assert model.decoder(released).shape == (4, 2)


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("std", [0.05, 0.4])
@pytest.mark.parametrize("training", [True, False])
def test_noise_has_the_stated_variance_in_training_and_at_inference(name, std, training):
    defense = build(name, noise_std=std).train(training)
    features = torch.rand(64, 8, 16, 16)
    first, second = defense.release(features) - features, defense.release(features) - features
    assert first.var().item() == pytest.approx(std**2, rel=0.02)
    assert first.mean().abs().item() < 5 * std / features.numel() ** 0.5
    correlation = (first * second).mean().item() / std**2
    assert abs(correlation) < 5 / features.numel() ** 0.5  # fresh at every call


def test_noise_passes_the_gradient():
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


def test_composition_chains_releases_sums_penalties_and_calls_every_part(tiny):
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


@pytest.mark.parametrize(
    "name, kind", [("noise_arl", defenses.AdversarialRepresentation), ("noise_nopeek", defenses.DistanceCorrelation)]
)
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


def proxy_similarity(defense, model, images, *, learning_rate) -> float:
    """Trains the encoder against the penalty alone; returns the structural similarity that its proxy reaches in the end."""
    labels = torch.zeros(len(images), dtype=torch.int64)
    rounds(defense, model, images, labels, count=100, learning_rate=learning_rate)
    with torch.no_grad():
        return metrics.ssim(defense.proxy(model.encoder(images)), images).mean().item()


def test_the_similarity_that_the_proxy_of_ressfl_reaches_falls_to_the_threshold(tiny):
    model, images, _ = tiny
    alone = proxy_similarity(defenses.ResSFL(adversary_weight=1, ssim_threshold=0.2), model, images, learning_rate=0.0)
    strict = defenses.ResSFL(adversary_weight=1.0, ssim_threshold=0.2)
    against = proxy_similarity(strict, model, images, learning_rate=0.5)
    assert alone > 0.6
    assert against < alone - 0.2


def test_ressfl_penalizes_only_similarity_above_the_threshold(tiny):
    model, images, labels = tiny
    defense = build("ressfl", adversary_weight=0.5, ssim_threshold=0.3, noise_std=0.0)
    defense.start(model, images)
    rounds(defense, model, images, labels, count=60, learning_rate=0.0)
    released = model.encoder(images)
    with torch.no_grad():
        similarity = metrics.ssim(defense.proxy(released), images).mean().item()
    assert similarity > 0.35
    penalty = defense.penalty(images, released, released, labels)
    assert penalty.item() == pytest.approx(0.5 * (similarity - 0.3), rel=1e-5)
    defense.ssim_threshold = similarity + 0.01
    assert defense.penalty(images, released, released, labels) == 0


def test_the_proxy_of_ressfl_starts_trained_and_leaves_the_network_as_it_was(tiny):
    model, images, _ = tiny
    model.encoder.insert(1, nn.BatchNorm2d(4))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    errors = {}
    for passes in (0, 40):
        defense = defenses.ResSFL(adversary_weight=1.0, ssim_threshold=0.5, pretraining=passes)
        defense.start(model.train(), images)
        with torch.no_grad():
            errors[passes] = F.mse_loss(defense.proxy(copy.deepcopy(model.encoder)(images)), images).item()
    assert errors[40] < 0.7 * errors[0]
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["noise_arl", "ressfl"])
def test_the_adversary_beats_the_mean_image_on_images_that_are_mostly_black(name):
    splits = load_data(RunConfig(data="digits", fold=0, image_size=16))
    splits = replace(splits, train=splits.train[torch.arange(0, len(splits.train), 4)])
    torch.manual_seed(0)
    model = models.build("slim", image_shape=splits.image_shape, num_classes=10, cut=2, bottleneck=8)
    defense = build(name, adversary_weight=0.1)
    training.train(model, splits, defense, config=RunConfig(epochs=3, image_size=16))
    with torch.no_grad():
        images, labels = splits.test.images, splits.test.labels
        released = defense.eval().release(model.encoder(images))
        proxy = part(defense, defenses.AdversarialRepresentation).proxy
        of_mean_image = (images - splits.train.images.mean(0)).square().mean()
        assert (proxy(released) - images).square().mean() < 0.95 * of_mean_image
        assert defense.penalty(images, released, released, labels) > 0


@pytest.mark.parametrize("feature, image", [((2, 3, 3), (1, 12, 12)), ((2, 4, 4), (3, 18, 18)), ((2, 8, 8), (1, 8, 8))])
def test_the_proxy_fits_any_ratio_of_sizes(feature, image):
    assert ProxyDecoder(feature, image)(torch.rand(2, *feature)).shape == (2, *image)


def brute_force_distance_correlation(x, z):
    """Definition by definition, in loops."""
    n = len(x)

    def covariance(a, b):
        def centered(d):
            return d - d.mean(0, keepdim=True) - d.mean(1, keepdim=True) + d.mean()

        def distances(rows):
            return torch.stack([torch.stack([(p - q).square().sum().sqrt() for q in rows]) for p in rows])

        return (centered(distances(a)) * centered(distances(b))).sum() / n**2

    return (covariance(x, z) / (covariance(x, x) * covariance(z, z)).sqrt()).sqrt()


def test_distance_correlation_is_as_defined():
    x, z = torch.rand(7, 5, dtype=torch.float64), torch.rand(7, 3, dtype=torch.float64)
    found = distance_correlation(x, z)
    assert found.item() == pytest.approx(brute_force_distance_correlation(x, z).item(), rel=1e-10)
    turned = torch.linalg.qr(torch.rand(5, 5, dtype=torch.float64)).Q
    assert distance_correlation(x, 3 * x @ turned + 1).item() == pytest.approx(1)
    many = torch.rand(2, 800, 1)
    assert distance_correlation(many[0], many[1]) < 0.1  # independent
    assert distance_correlation(many[0], many[0].sub(0.5).square()) > 0.3  # dependent, though not correlated
    assert torch.autograd.gradcheck(distance_correlation, (x.requires_grad_(), z.requires_grad_()))
    with pytest.raises(ValueError, match="both samples must have as many rows, at least 1, got 3 and 4"):
        distance_correlation(torch.rand(3, 2), torch.rand(4, 2))


@pytest.mark.parametrize("images, features", [("same", "vary"), ("vary", "same"), ("same", "same"), ("one", "one")])
def test_distance_correlation_of_constant_samples_is_zero_and_has_a_gradient(images, features):
    def sample(kind):
        return torch.rand({"one": 1, "same": 1, "vary": 6}[kind], 4).expand(1 if kind == "one" else 6, 4).clone()

    x, z = sample(images), sample(features).requires_grad_()
    found = distance_correlation(x, z)
    found.backward()
    assert found == 0
    assert torch.equal(z.grad, torch.zeros_like(z))


def test_distance_correlation_falls_when_the_encoder_is_trained_against_it(tiny):
    model, images, labels = tiny
    defense = build("distance_correlation", nopeek_weight=2.0, noise_std=0.0)
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=0.1)
    found = []
    for _ in range(100):
        features = model.encoder(images)
        penalty = defense.penalty(images, features, defense.release(features), labels)
        found.append(penalty.item() / 2)
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert found[-1] < 0.7 * found[0]


@pytest.mark.parametrize("rate", [0.2, 0.7])
def test_dropout_has_the_stated_rate_under_attack(tiny, rate):
    model, images, _ = tiny
    defense = build("dropout", dropout_rate=rate, noise_std=0.0).eval()
    observe, clean = training.observer(model, defense), training.clean_features(model, images)
    first, second = observe(images), observe(images)
    dropped = first == 0
    assert dropped.float().mean().item() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / clean.numel()) ** 0.5)
    assert torch.allclose(first[~dropped], clean[~dropped] / (1 - rate))
    assert not torch.equal(dropped, second == 0)  # fresh at every call


@pytest.mark.parametrize("share, kept", [(0.5, 32), (0.9, 6), (0.999, 1)])
def test_pruning_keeps_the_largest_features_of_every_image(share, kept):
    features = torch.randn(5, 4, 4, 4, requires_grad=True)
    released = build("topk_pruning", pruned_share=share, noise_std=0.0).release(features)
    assert torch.equal((released != 0).flatten(1).sum(1), torch.full((5,), kept))
    sent = released != 0
    assert torch.equal(released[sent], features[sent])
    for row, mask in zip(features.detach().abs().flatten(1), sent.flatten(1)):
        assert row[mask].min() > row[~mask].max()
    released.sum().backward()
    assert torch.equal(features.grad, sent.float())
    ties = build("topk_pruning", pruned_share=share, noise_std=0.0).release(torch.ones(2, 64))
    assert torch.equal(ties.sum(1), torch.full((2,), float(kept)))


def divergence(sigma, epsilon, sensitivity):
    """The least delta of Gaussian noise, by integrating ``max(0, p - exp(epsilon) q)`` over the densities of two neighbors."""
    z = torch.linspace(-12 * sigma, sensitivity + 12 * sigma, 400_001, dtype=torch.float64)
    p, q = (torch.exp(-0.5 * ((z - c) / sigma) ** 2) / (sigma * (2 * torch.pi) ** 0.5) for c in (sensitivity, 0.0))
    return torch.trapezoid((p - math.exp(epsilon) * q).clamp_min(0), z).item()


@pytest.mark.parametrize("epsilon, delta", [(0.1, 1e-5), (1.0, 1e-5), (8.0, 1e-4), (100.0, 1e-4), (3.0, 0.5)])
def test_gaussian_noise_is_calibrated_to_the_budget_and_no_louder(epsilon, delta):
    sigma = gaussian_scale(epsilon=epsilon, delta=delta, sensitivity=3.0)
    assert divergence(sigma, epsilon, 3.0) == pytest.approx(delta, rel=1e-3)
    if epsilon <= 1:
        assert sigma < 3.0 * math.sqrt(2 * math.log(1.25 / delta)) / epsilon  # the textbook's sufficient scale
    assert gaussian_scale(epsilon=1e4, delta=delta, sensitivity=3.0) < 0.2


@pytest.mark.parametrize("mechanism, norm", [("gaussian", 2), ("laplace", 1)])
@pytest.mark.parametrize("training", [True, False])
def test_local_privacy_clips_and_adds_noise_of_the_calibrated_scale(mechanism, norm, training):
    settings = {"privacy_mechanism": mechanism, "privacy_epsilon": 20.0, "privacy_clip": 3.0, "noise_std": 0.0}
    defense = build("local_dp", **settings).train(training)
    features = torch.randn(400, 2, 8, 8) * torch.rand(400, 1, 1, 1)
    features[:200] *= 0.01
    features[0] = 0
    clipped = defense.clipped(features)
    norms = torch.linalg.vector_norm(clipped.flatten(1), ord=norm, dim=1)
    assert norms.max() <= 3.0 * (1 + 1e-6)
    assert torch.equal(clipped[:100], features[:100])  # below the norm: as they are
    apart = torch.cdist(torch.cat([clipped, -clipped]).flatten(1), clipped.flatten(1), p=float(norm)).max()
    assert 0.9 * 6 < apart <= 6 * (1 + 1e-5)  # the sensitivity: any two images, twice the clip
    noise = defense.release(features) - clipped
    if mechanism == "gaussian":
        expected = gaussian_scale(epsilon=20.0, delta=1e-4, sensitivity=6.0)
        assert noise.std().item() == pytest.approx(expected, rel=0.02)
    else:
        assert defense.scale == 6.0 / 20
        assert noise.abs().mean().item() == pytest.approx(6.0 / 20, rel=0.02)
        assert noise.std().item() == pytest.approx(2**0.5 * 6.0 / 20, rel=0.03)
    assert noise.mean().abs().item() < 5 * noise.std().item() / noise.numel() ** 0.5


def test_clipping_passes_a_finite_gradient():
    features = torch.stack([torch.zeros(4), torch.full((4,), 0.1), torch.full((4,), 100.0)]).requires_grad_()
    build("local_dp", noise_std=0.0).release(features)[:, 0].sum().backward()
    assert torch.isfinite(features.grad).all()
    assert torch.equal(features.grad[:2], torch.tensor([[1.0, 0, 0, 0]] * 2))
    assert features.grad[2].abs().sum() > 0


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("nois", {}, "unknown defense 'nois': .*the nearest is 'noise'"),
        ("noise", {"noise_std": 0.0}, "noise_std must be positive, got 0.0"),
        ("bottleneck", {"noise_std": -1.0}, "noise_std must be positive, got -1.0"),
        ("noise_arl", {"noise_std": float("nan")}, "noise_std must be positive, got nan"),
        ("adversarial", {"adversary_weight": 0.0}, "adversary_weight must be positive and finite, got 0.0"),
        ("ressfl", {"ssim_threshold": 1.0}, "ssim_threshold must be at least -1 and below 1, got 1.0"),
        ("sca", {"sparse_threshold": 0.0}, "sparse_threshold must be positive and finite, got 0.0"),
        ("patrol", {"pruned_channels": 1.0}, "pruned_channels must be between 0 and 1, got 1.0"),
        ("noise_nopeek", {"nopeek_weight": 0.0}, "nopeek_weight must be positive and finite, got 0.0"),
        ("dropout", {"dropout_rate": 1.0}, "dropout_rate must be between 0 and 1, got 1.0"),
        ("topk_pruning", {"pruned_share": 0.0}, "pruned_share must be between 0 and 1, got 0.0"),
        ("local_dp", {"privacy_epsilon": 0.0}, "privacy_epsilon must be positive and finite, got 0.0"),
        ("local_dp", {"privacy_epsilon": float("inf")}, "privacy_epsilon must be positive and finite, got inf"),
        ("local_dp", {"privacy_delta": 1.0}, "privacy_delta must be between 0 and 1, got 1.0"),
        ("local_dp", {"privacy_clip": float("nan")}, "privacy_clip must be positive and finite, got nan"),
        ("local_dp", {"privacy_mechanism": "gauss"}, "unknown privacy_mechanism 'gauss': .*'gaussian'"),
    ],
)
def test_bad_requests(name, changes, message):
    with pytest.raises(ValueError, match=message):
        build(name, **changes)


NUMBERS = [
    ("noise", "noise_std"),
    ("noise", "train_noise_std"),
    ("adversarial", "adversary_weight"),
    ("ressfl", "ssim_threshold"),
    ("sca", "sparse_threshold"),
    ("patrol", "pruned_channels"),
    ("noise_nopeek", "nopeek_weight"),
    ("dropout", "dropout_rate"),
    ("topk_pruning", "pruned_share"),
    ("local_dp", "privacy_epsilon"),
    ("local_dp", "privacy_delta"),
    ("local_dp", "privacy_clip"),
]


@pytest.mark.parametrize("name, key", NUMBERS)
@pytest.mark.parametrize(
    "value", ["0.5", True, [0.5], torch.tensor(0.5), 10**400, -(10**400), float("nan"), float("inf")]
)
def test_settings_that_are_no_numbers_in_range_are_named(name, key, value):
    with pytest.raises((TypeError, ValueError), match=f"^{key} must be "):
        build(name, **{key: value})


@pytest.mark.parametrize("value", [None, 3, nn.ReLU(), defenses.GaussianNoise])
def test_what_is_no_defense_is_named(value):
    with pytest.raises(TypeError, match=r"^defense must be a cem_fast\.defenses\.Defense, got "):
        defenses.Quantized(value, message="uint8")
    with pytest.raises(TypeError, match=r"^parts must be a cem_fast\.defenses\.Defense, got "):
        defenses.Composed(defenses.GaussianNoise(noise_std=0.1), value)


@pytest.fixture
def deep():
    """A network with something to prune, images and two classes."""
    return models.build("slim", image_shape=(1, 16, 16), num_classes=2, cut=2, bottleneck=4), images_of_two_classes()


def images_of_two_classes():
    images, labels = torch.rand(20, 1, 16, 16) * 0.2, torch.arange(20) % 2
    images[labels == 1, :, 4:12, 4:12] += 0.7
    return images, labels


def widths(network) -> list[int]:
    return [module.out_channels for module in network.modules() if isinstance(module, nn.Conv2d)]


def test_patrol_deepens_the_encoder_once_and_prunes_it_halfway(deep):
    model, (images, labels) = deep
    defense = build("patrol", pruned_channels=0.25, noise_std=0.0)
    assert widths(model.encoder) == [16, 32, 4]
    for _ in range(2):
        defense.start(model, images)
        assert widths(model.encoder) == [16, 32, 32, 4]
    assert isinstance(model.encoder[2], ExtraConvolution)
    model.train()
    for epoch in range(5):
        defense.before_epoch(model, images, labels, epoch=epoch, epochs=5)
        assert widths(model.encoder) == ([16, 32, 32, 4] if epoch < 2 else [12, 24, 24, 4])
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert model(images).shape == (20, 2)
    assert defense.proxy(model.encoder(images)).shape == images.shape


def test_pruning_removes_the_least_important_channel_and_changes_nothing_else(deep):
    model, (images, labels) = deep
    defense = build("patrol", pruned_channels=1 / 32, noise_std=0.0)
    defense.attach(model, images.shape[1:])
    idle = {0: 3, 1: 7, 2: 30}  # by stage, a channel without effect
    for stage, channel in idle.items():
        with torch.no_grad():
            for parameter in (*model.encoder[stage][0].parameters(), *model.encoder[stage][1].parameters()):
                parameter[channel] = 0
    before = training.clean_features(model, images)
    expected = [
        model.encoder[stage][0].weight.detach()[torch.arange(len(model.encoder[stage][0].weight)) != channel]
        for stage, channel in idle.items()
    ]
    defense.before_epoch(model, images, labels, epoch=0, epochs=1)
    for stage, weight in enumerate(expected):
        fed = torch.arange(weight.shape[1]) != idle[stage - 1] if stage else slice(None)
        assert torch.equal(model.encoder[stage][0].weight, weight[:, fed])
    assert torch.allclose(training.clean_features(model, images), before, atol=1e-6)


def test_pruning_leaves_the_channels_of_shortcuts_that_widen_in_line():
    images, labels = images_of_two_classes()
    model = models.build("resnet20", image_shape=(1, 16, 16), num_classes=2, cut=8, bottleneck=4)
    defense = build("patrol", pruned_channels=1 / 64, noise_std=0.0)
    defense.attach(model, images.shape[1:])
    blocks = [stage[0].residual for stage in model.encoder[1:8]]
    sums = [(model.encoder[0][0], model.encoder[0][1]), *((block[3], block[4]) for block in blocks)]
    # channels that say nothing: of the 16 of all sums, of those that sums of 32 and of 64 add to them, and within every block
    with torch.no_grad():
        for layers, channel in [(each, c) for each in sums for c in (3, 20, 40)] + [(block[:2], 5) for block in blocks]:
            for parameter in (p for layer in layers for p in layer.parameters() if len(p) > channel):
                parameter[channel] = 0
    before, narrow = training.clean_features(model, images), widths(model.encoder)
    defense.before_epoch(model, images, labels, epoch=0, epochs=1)
    lost = [old - new for old, new in zip(narrow, widths(model.encoder), strict=True)]
    assert lost == [1, *[1, 1] * 3, *[1, 2] * 3, 1, 3, 1, 0]
    assert torch.allclose(training.clean_features(model, images), before, atol=1e-6)


@pytest.mark.parametrize("name", ["patrol", "sca + patrol", "patrol + sca"])
def test_every_parameter_of_a_pruned_network_is_still_trained(deep, name):
    model, (images, labels) = deep
    defense = defenses.Composed(*(build(each, noise_std=0.0) for each in name.split(" + ")))
    images = Part(images, labels, torch.arange(20))
    splits = Splits("two", train=images, test=images, attacker=images, num_classes=2, class_names=("a", "b"))
    weights = []

    def remember(_):
        weights.append({key: value.detach().clone() for key, value in model.named_parameters()})

    training.train(model, splits, defense, config=RunConfig(epochs=5, batch_size=10), on_epoch=remember)
    assert widths(model.encoder)[0] < 16
    pruned, last = weights[2], weights[4]
    trained = [key for key in last if key.endswith("weight")]  # normalization undoes what a convolution's bias does
    assert [key for key in trained if torch.equal(pruned[key], last[key])] == []


@pytest.mark.parametrize("name, cut", [("slim", 2), ("resnet20", 5), ("resnet20", 9), ("resnet32", 7)])
def test_a_pruned_network_is_loaded_to_the_bit(name, cut):
    images, labels = images_of_two_classes()

    def network():
        return models.build(name, image_shape=(1, 16, 16), num_classes=2, cut=cut, bottleneck=4)

    model, fresh = network(), network()
    defense = build("patrol", pruned_channels=0.3, noise_std=0.0)
    defense.attach(model, images.shape[1:])
    defense.before_epoch(model, images, labels, epoch=0, epochs=1)
    again = build("patrol", pruned_channels=0.3, noise_std=0.0)
    again.attach(fresh, images.shape[1:])
    before = widths(fresh.encoder)
    assert all(new < old for new, old in zip(widths(model.encoder)[:-1], before[:-1], strict=True))
    again.reshape(fresh, {key: value.shape for key, value in model.state_dict().items()})
    assert [str(m) for m in fresh.encoder.modules()] == [str(m) for m in model.encoder.modules()]
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(training.clean_features(fresh, images), training.clean_features(model, images))


def energy(layer, features, code):
    dictionary = layer.dictionary()
    return 0.5 * (features - layer._combine(code, dictionary)).square().sum() + layer.threshold * code.abs().sum()


@pytest.fixture
def maps():
    """Smooth feature maps, as after a ReLU, with a root mean square of 1."""
    maps = F.relu(F.interpolate(torch.randn(4, 12, 4, 4), 10, mode="bicubic"))
    return maps / maps.square().mean((1, 2, 3), keepdim=True).sqrt()


@torch.no_grad()
def test_a_sparse_code_is_sparse_and_reconstructs_its_input(maps):
    shares, errors = [], []
    for threshold in (0.02, 0.2, 0.5):
        layer = SparseCoding(12, threshold=threshold)
        code = layer.code(maps)
        assert code.shape == (4, 24, 10, 10)
        shares.append((code == 0).float().mean().item())
        errors.append(((layer(maps) - maps).square().mean() / maps.var()).item())
    assert shares == sorted(shares)
    assert errors == sorted(errors)
    assert shares[1] > 0.4
    assert errors[1] < 0.1
    assert errors[0] < 0.01
    scales = torch.tensor([1e-3, 1.0, 7.0, 1e4]).view(-1, 1, 1, 1)
    assert torch.allclose(layer.code(scales * maps) / scales, layer.code(maps), atol=1e-4)


def test_zero_features_have_a_zero_code_with_a_gradient():
    features = torch.zeros(2, 12, 5, 5, requires_grad=True)
    coded = SparseCoding(12, threshold=0.2)(features)
    coded.sum().backward()
    assert coded.abs().sum() == 0
    assert torch.isfinite(features.grad).all()


@torch.no_grad()
def test_competition_lowers_the_energy_of_sparse_coding_to_its_minimum(maps):
    layer = SparseCoding(12, threshold=0.2)
    layer.patterns.copy_(torch.randn_like(layer.patterns))  # far from a tight frame
    assert torch.allclose(layer.dictionary().square().sum((1, 2, 3)), torch.ones(24))
    energies = []
    for layer.iterations in (1, 4, 16, 64, 1000):
        code = layer.code(maps)
        energies.append(energy(layer, maps, code).item())
    assert energies == sorted(energies, reverse=True)
    # at the minimum, active neurons are driven exactly as hard as the threshold, and idle ones less
    driven = F.conv2d(maps - layer._combine(code, layer.dictionary()), layer.dictionary(), padding="same")
    active = code != 0
    assert torch.allclose(driven[active], 0.2 * code[active].sign(), atol=2e-3)
    assert driven[~active].abs().max() < 0.2 + 2e-3


@torch.no_grad()
def test_the_step_of_the_competition_respects_the_greatest_gain(maps):
    patterns = torch.randn(6, 3, 3, 3)
    matrix = torch.stack(
        [F.conv2d(unit, patterns, padding=1).flatten() for unit in torch.eye(3 * 144).view(-1, 1, 3, 12, 12)]
    )
    assert _gain(patterns).item() == pytest.approx(torch.linalg.matrix_norm(matrix, ord=2).square().item(), rel=0.1)
    layer = SparseCoding(12, threshold=0.2, iterations=300)
    layer.patterns.copy_(torch.ones_like(layer.patterns))  # the greatest gain that patterns can have
    assert torch.isfinite(layer.code(maps)).all()
    assert energy(layer, maps, layer.code(maps)) <= energy(layer, maps, torch.zeros(4, 24, 10, 10))


def test_sparse_coding_stands_before_the_last_module_and_learns(deep):
    model, (images, labels) = deep
    defense = build("sca", noise_std=0.0)
    for _ in range(2):
        defense.start(model, images)
    assert [isinstance(module, SparseCoding) for module in model.encoder] == [False, False, True, False]
    layer = model.encoder[2]
    assert layer.threshold == RunConfig().sparse_threshold
    before = layer.patterns.detach().clone()
    images = Part(images, labels, torch.arange(20))
    splits = Splits("two", train=images, test=images, attacker=images, num_classes=2, class_names=("a", "b"))
    training.train(model, splits, defense, config=RunConfig(epochs=25, batch_size=10))
    assert not torch.equal(layer.patterns, before)
    with torch.no_grad():
        features = model.encoder[:2](images.images)
        assert (layer.code(features) == 0).float().mean() > 0.3
        assert (layer(features) - features).square().mean() < 0.2 * features.var()
    for seed, same in ((0, True), (1, False)):
        other = models.build("slim", image_shape=(1, 16, 16), num_classes=2, cut=2, bottleneck=4)
        build("sca", seed=seed).attach(other, (1, 16, 16))
        assert torch.equal(other.encoder[2].patterns, before) == same


def test_patrol_without_its_package_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ImportError, match="the defense patrol needs the package torch_pruning: pip install torch-prun"):
        build("patrol")


def test_an_inserted_layer_needs_a_sequential_encoder_with_maps(deep):
    model, (images, _) = deep
    shape = images.shape[1:]
    wrapped = SplitModel(nn.ModuleList([model.encoder]), model.decoder)
    with pytest.raises(ValueError, match=r"the encoder must be an nn\.Sequential to put a layer into, got ModuleList"):
        build("patrol").attach(wrapped, shape)
    flat = SplitModel(nn.Sequential(nn.Flatten(), nn.Linear(256, 8)), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"before the last module of the encoder, got shape \(1, 256\)"):
        build("patrol").attach(flat, shape)


def test_settings_that_are_missing_or_unknown_are_named():
    with pytest.raises(TypeError, match="the defense adversarial needs the settings adversary_weight, seed"):
        defenses.build("adversarial", noise_std=0.1)
    with pytest.raises(ValueError, match="unknown setting 'dropuot_rate': .*the nearest is 'dropout_rate'"):
        defenses.build("dropout", noise_std=0.1, dropuot_rate=0.1)
    assert defenses.build("dropout", noise_std=0.0, dropout_rate=0.1).dropout_rate == 0.1


def test_a_negative_number_of_pretraining_passes_is_refused():
    with pytest.raises(ValueError, match="pretraining must be at least 0, got -1"):
        defenses.ResSFL(adversary_weight=1.0, ssim_threshold=0.5, pretraining=-1)


def test_settings_that_a_defense_does_not_use_are_ignored():
    build("bottleneck", noise_std=0.0, adversary_weight=0.0)


class Tokens(nn.Module):
    """A token for each patch of 2x2 pixels, [N, 16, 8]."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 8)

    def forward(self, images):
        return torch.sigmoid(self.embed(F.unfold(images, 2, stride=2).transpose(1, 2)))


class Vectors(nn.Sequential):
    """[N, 32] of all pixels."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid())


@pytest.mark.parametrize("encoder", [Tokens, Vectors])  # their weights are those of the test's seed
def test_an_adversary_rebuilds_images_from_tokens_and_vectors(tiny, encoder):
    _, images, labels = tiny
    model = SplitModel(encoder(), nn.Flatten())
    defense = build("adversarial", adversary_weight=1.0, noise_std=0.0)
    defense.start(model, images)
    released = model.encoder(images).detach()
    for _ in range(150):
        defense.after_step(images, released)
    assert defense.penalty(images, released, released, labels) > 0.5  # the share of the variance that is explained


def test_patrol_restores_depthwise_convolutions_as_they_were_pruned(tmp_path):
    parts = Splits.from_datasets(*([(torch.rand(3, 32, 32), index % 2) for index in range(24)] for _ in range(2)))
    config = RunConfig(
        model="mobilenet_v2", cut=3, bottleneck=8, defense="patrol", epochs=2, attacks=("ridge",), noise_draws=1
    )
    run(config, tmp_path / "run", splits=parts, attack=False)
    model = saved_run.load_run(tmp_path / "run").model
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 2)


@pytest.mark.parametrize("name", ["noise", "noise_arl", "noise_nopeek", "dropout"])
def test_noise_in_training_may_differ_from_noise_in_use(name):
    strengths = {"seed": 0, "adversary_weight": 1.0, "nopeek_weight": 1.0, "dropout_rate": 0.5}
    defense = defenses.build(name, noise_std=0.1, train_noise_std=0.4, **strengths)
    features = torch.zeros(1, 100_000)
    assert float(defense.train().release(features).std()) == pytest.approx(0.4, rel=0.02)
    assert float(defense.eval().release(features).std()) == pytest.approx(0.1, rel=0.02)
    assert defense.noise_std == 0.1
    with pytest.raises(ValueError, match="train_noise_std must be at least 0 or None, got -0.1"):
        defenses.build(name, noise_std=0.1, train_noise_std=-0.1, **strengths)
