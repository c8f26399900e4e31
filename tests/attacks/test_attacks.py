"""Attacks: that they work, that they only see what they may, and the closed form against a direct solve."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cem_fast import attacks, data, defenses, metrics, models, training
from cem_fast._support.seeding import seeded
from cem_fast.attacks import Ensemble, Gan, Nearest, Optimization
from cem_fast.attacks.decoder import DECODERS, Decoder
from cem_fast.attacks.ridge import PENALTIES, Ridge
from cem_fast.config import RunConfig
from cem_fast.experiments.build import build_attack


@pytest.fixture(scope="module")
def faces():
    return data.load("faces", fold=0, image_size=16)


@pytest.fixture(scope="module")
def observe(faces):
    """An untrained, undefended encoder."""
    torch.manual_seed(0)
    model = models.build("slim", image_shape=faces.image_shape, num_classes=40, cut=1, bottleneck=8)
    training.clean_features(model.train(), faces.train.images)
    return training.observer(model, defenses.Bottleneck())


def build(name, images, **changes):
    settings = {"image_shape": tuple(images.shape[1:]), "epochs": 15, "decoder": "slim", "seed": 0}
    return attacks.build(name, **{**settings, "gan_epochs": 3, "steps": 30, **changes})


def test_names():
    assert attacks.names() == ("decoder", "ridge", "nearest", "ensemble", "optimization", "gan")
    assert attacks.decoder_names() == ("slim", "res_norm", "conv_norm", "plain")
    assert attacks.loss_names() == ("mse", "ssim", "l1")


@pytest.mark.parametrize("name", attacks.names())
def test_overview_says_who_the_attacker_is_and_how_hard_it_tries(name):
    attack = attacks.build(name, image_shape=(1, 8, 8), epochs=123, decoder="plain", seed=0, gan_epochs=45, steps=67)
    assert attack.name == name
    assert attack.overview() == f"{name}\n  the attacker {attack.knowledge}\n  budget: {attack.budget}"
    assert ("123 epochs of the network 'plain'" in attack.budget) == (name not in ("ridge", "nearest"))
    assert ("67 steps" in attack.budget) == (name == "optimization")
    assert ("45 epochs" in attack.budget) == (name == "gan")
    assert ("differentiates" in attack.knowledge) == (name == "optimization")


def test_settings_reach_the_attacks(faces):
    config = RunConfig(
        attack_batch_size=7, attack_dropout=0.6, attack_epochs=3, attack_gan_epochs=4, attack_steps=5, seed=6
    )
    for name in ("decoder", "gan", "optimization", "ensemble"):
        built = build_attack(name, config, faces)
        decoder = built if name == "decoder" else built.decoder
        assert (decoder.batch_size, decoder.dropout, decoder.epochs, decoder.seed) == (7, 0.6, 3, 6)
    assert build_attack("gan", config, faces).epochs == 4
    assert build_attack("optimization", config, faces).steps == 5
    decoder.fit(lambda x: F.avg_pool2d(x, 2), faces.attacker.images[:8], faces.attacker.labels[:8])
    assert [part.p for part in decoder.network.modules() if isinstance(part, torch.nn.Dropout)] == [0.6]


@pytest.mark.parametrize("name", attacks.names())
def test_an_undefended_encoder_is_inverted_far_below_the_class_mean(faces, observe, name):
    attack = build(name, faces.train.images)
    attack.fit(observe, faces.attacker.images, faces.attacker.labels)
    rebuilt = attack.reconstruct(observe(faces.test.images))
    assert rebuilt.shape == faces.test.images.shape
    assert 0 <= rebuilt.min() <= rebuilt.max() <= 1
    error = metrics.mse(rebuilt, faces.test.images).mean()
    assert error < 0.6 * data.baselines(faces)["class_mean_mse"]


@pytest.mark.parametrize("name", attacks.names())
def test_an_attack_depends_on_its_seed_alone(name):
    images = torch.rand(20, 1, 8, 8)
    noisy = lambda x: F.avg_pool2d(x, 2) + 0.1 * torch.randn(len(x), 1, 4, 4)  # noqa: E731
    rebuilt = []
    for seed, stir in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(stir)
        attack = build(name, images, seed=seed, epochs=2)
        before = torch.get_rng_state()
        attack.fit(noisy, images, torch.zeros(20, dtype=torch.int64))
        assert torch.equal(torch.get_rng_state(), before)
        rebuilt.append(attack.reconstruct(F.avg_pool2d(images, 2)))
    assert torch.equal(rebuilt[0], rebuilt[1])
    if name != "nearest":  # other noise, but the nearest image stays the nearest
        assert not torch.equal(rebuilt[0], rebuilt[2])


@pytest.mark.parametrize("name, times", [("decoder", 1 + 15), ("ridge", 8), ("nearest", 8)])
def test_noise_is_observed_afresh(name, times):
    images, seen = torch.rand(20, 1, 8, 8), []

    def observe(x):
        seen.append(F.avg_pool2d(x, 2) + 0.1 * torch.randn(len(x), 1, 4, 4))
        return seen[-1]

    build(name, images).fit(observe, images, torch.zeros(20, dtype=torch.int64))
    assert len(seen) == times
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:]))


def test_knowing_the_noise_beats_one_look_at_it():
    torch.manual_seed(0)
    basis = torch.randn(6, 64)
    images, secret = (((torch.randn(n, 6) @ basis) * 0.05 + 0.5).clamp(0, 1).view(n, 1, 8, 8) for n in (60, 500))
    noisy = lambda x: F.avg_pool2d(x, 2) + 0.1 * torch.randn(len(x), 1, 4, 4)  # noqa: E731
    error = {}
    for draws in (1, 16):
        attack = Ridge(image_shape=(1, 8, 8), draws=draws)
        attack.fit(noisy, images, torch.zeros(60, dtype=torch.int64))
        torch.manual_seed(1)
        error[draws] = metrics.mse(attack.reconstruct(noisy(secret)), secret).mean()
    assert error[16] < error[1]


@pytest.mark.parametrize("count", [12, 60])  # fewer images than features: the dual form; more: the primal one
def test_ridge_is_the_direct_solution(count):
    torch.manual_seed(0)
    images = torch.rand(count, 1, 8, 8)
    mixing = torch.randn(64, 30, dtype=torch.float64) / 8
    attack = Ridge(image_shape=(1, 8, 8), seed=0)
    attack.fit(lambda x: x.flatten(1).double() @ mixing, images, torch.zeros(count, dtype=torch.int64))

    z = images.flatten(1).double() @ mixing
    z = (z - z.mean(0)) / z.std(0, correction=0)
    y = images.flatten(1).double()
    gram = z.T @ z
    unit = gram.trace() / min(count, 30)  # the mean eigenvalue of the smaller Gram matrix
    direct = torch.linalg.solve(
        gram + attack.penalty * unit * torch.eye(30, dtype=torch.float64), z.T @ (y - y.mean(0))
    )
    torch.testing.assert_close(attack.weights, direct, rtol=1e-6, atol=1e-9)
    assert attack.penalty in PENALTIES.tolist()


def test_ridge_penalty_grows_with_the_noise():
    torch.manual_seed(0)
    images = torch.rand(50, 1, 8, 8)
    penalties = []
    for std in (0.0, 0.3, 3.0):
        attack = Ridge(image_shape=(1, 8, 8))
        attack.fit(lambda x, std=std: x.flatten(1) + std * torch.randn(len(x), 64), images, torch.zeros(50).long())
        penalties.append(attack.penalty)
    assert penalties[0] < penalties[1] < penalties[2]


def test_a_constant_feature_does_no_harm():
    torch.manual_seed(0)
    images = torch.rand(40, 1, 8, 8)
    for name in attacks.names():
        attack = build(name, images, epochs=3)
        attack.fit(lambda x: F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 1)), images, torch.zeros(40).long())
        assert attack.reconstruct(F.pad(F.avg_pool2d(images, 2), (0, 0, 0, 0, 0, 1))).isfinite().all()


def test_half_the_budget():
    images = torch.rand(2, 1, 8, 8)
    full = build("decoder", images, epochs=9, loss="l1", seed=5)
    half = full.half_budget()
    assert vars(half) == {**vars(full), "epochs": 4}
    assert (half.loss, half.seed, half.decoder, half.batch_size) == ("l1", 5, "slim", full.batch_size)
    assert not hasattr(half, "network")
    for name, key in (("optimization", "steps"), ("gan", "epochs")):
        full = build(name, images, steps=9, gan_epochs=9, epochs=7, seed=5)
        half = full.half_budget()
        assert (getattr(half, key), half.seed, half.decoder) == (4, 5, full.decoder)
        assert getattr(half.half_budget().half_budget(), key) == 1
    for name in attacks.names():  # a closed form, or a single step, which is half of nothing less
        assert build(name, images, steps=1, gan_epochs=1, epochs=1).half_budget() is None


@pytest.mark.parametrize("name", ["optimization", "gan"])
def test_half_of_the_usual_budget_does_nearly_as_well(faces, observe, name):
    usual = RunConfig()
    full = build(name, faces.train.images, steps=usual.attack_steps, gan_epochs=usual.attack_gan_epochs)
    assert at_half(full, faces, observe) < 1.03


def test_the_decoder_converges_on_noisy_features_and_a_budget_that_is_too_small_shows(faces, observe):
    def noisy(images):
        features = torch.sigmoid(observe(images))
        return features + 0.1 * torch.randn_like(features)

    settings = {"batch_size": 64, "dropout": 0.1}  # those of the evaluation
    assert at_half(build("decoder", faces.train.images, epochs=120, **settings), faces, noisy) < 1.03
    assert at_half(build("decoder", faces.train.images, epochs=10, **settings), faces, noisy) > 1.03


def at_half(full, faces, observe) -> float:
    """The error that an attack comes to with half its budget, in units of what it comes to with all of it."""
    errors = []
    for attack in (full.half_budget(), full):
        with seeded(0):
            attack.fit(observe, faces.attacker.images, faces.attacker.labels)
            errors.append(float(metrics.mse(attack.reconstruct(observe(faces.test.images)), faces.test.images).mean()))
    return errors[0] / errors[1]


@pytest.mark.parametrize("network", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize(
    "feature, image",
    [((8, 8, 8), (3, 32, 32)), ((2, 12, 12), (1, 48, 48)), ((2, 4, 4), (1, 18, 18)), ((2, 8, 8), (1, 8, 8))],
)
def test_decoders_fit_any_ratio_of_sizes(network, feature, image):
    decoder = network(feature, torch.rand(4, *image))
    assert decoder(torch.randn(2, *feature)).shape == (2, *image)


@pytest.mark.parametrize("network", ["res_norm", "conv_norm", "plain"])
def test_published_decoders_learn(faces, observe, network):
    few = faces.attacker[torch.arange(0, 320, 10)]
    attack = Decoder(image_shape=faces.image_shape, decoder=network, epochs=15, batch_size=8)
    attack.fit(observe, few.images, few.labels)
    error = metrics.mse(attack.reconstruct(observe(few.images)), few.images).mean()
    assert error < 0.6 * few.images.var(0).mean()


def test_normalization_is_what_plain_lacks():
    kinds = {
        name: {type(m) for m in DECODERS[name]((8, 8, 8), torch.rand(2, 3, 32, 32)).modules()} for name in DECODERS
    }
    assert torch.nn.BatchNorm2d in kinds["conv_norm"]
    assert torch.nn.BatchNorm2d not in kinds["plain"]


def test_each_loss_serves_its_own_measure_best(faces, observe):
    rebuilt = {}
    for loss in attacks.loss_names():
        attack = build("decoder", faces.train.images, epochs=40, loss=loss)
        attack.fit(observe, faces.attacker.images, faces.attacker.labels)
        rebuilt[loss] = attack.reconstruct(observe(faces.attacker.images))
    truth = faces.attacker.images
    measures = {
        "mse": lambda x: metrics.mse(x, truth).mean(),
        "ssim": lambda x: -metrics.ssim(x, truth).mean(),
        "l1": lambda x: (x - truth).abs().mean(),
    }
    for loss, measure in measures.items():
        assert min(rebuilt, key=lambda other: measure(rebuilt[other])) == loss


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build("decodr", torch.rand(2, 1, 8, 8)), "unknown attack 'decodr': .*the nearest is 'decoder'"),
        (
            lambda: build("decoder", torch.rand(2, 1, 8, 8), decoder="res"),
            "unknown decoder 'res': .*the nearest is 'res_norm'",
        ),
        (
            lambda: build("gan", torch.rand(2, 1, 8, 8), loss="msse"),
            "unknown loss 'msse': .*the nearest is 'mse'",
        ),
        (lambda: build("gan", torch.rand(2, 1, 8, 8), gan_epochs=0), "epochs must be at least 1, got 0"),
        (lambda: build("optimization", torch.rand(2, 1, 8, 8), steps=0), "steps must be at least 1, got 0"),
        (lambda: Optimization(image_shape=(1, 8, 8), decoder=None, draws=0), "draws must be at least 1, got 0"),
        (lambda: Ensemble(image_shape=(1, 8, 8), decoder=None, draws=0), "draws must be at least 1, got 0"),
        (lambda: Gan(image_shape=(1, 8, 8), decoder=None, epochs=1, critic_steps=0), "critic_steps must be at least 1"),
        (lambda: Gan(image_shape=(1, 8, 8), decoder=None, epochs=1, mse_weight=0.0), "mse_weight must be positive"),
        (lambda: Nearest(image_shape=(1, 8, 8), draws=0), "draws must be at least 1, got 0"),
        (lambda: build("decoder", torch.rand(2, 1, 8, 8), epochs=0), "epochs must be at least 1, got 0"),
        (lambda: Decoder(image_shape=(1, 8, 8), epochs=1, batch_size=0), "batch_size must be at least 2"),
        (
            lambda: Decoder(image_shape=(1, 8, 8), epochs=1, dropout=1.0),
            "dropout must be at least 0 and below 1, got 1.0",
        ),
        (lambda: Ridge(image_shape=(1, 8, 8), draws=0), "draws must be at least 1, got 0"),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "name, least", [("ridge", 5), ("decoder", 2), ("gan", 2), ("nearest", 1), ("ensemble", 6), ("optimization", 6)]
)
def test_too_few_images(name, least):
    images = torch.rand(least, 1, 8, 8)
    with pytest.raises(ValueError, match=f"at least {least} images, got {least - 1}"):
        build(name, images).fit(torch.clone, images[1:], torch.zeros(least - 1, dtype=torch.int64))
    attack = build(name, images, epochs=1)
    attack.fit(torch.clone, images, torch.zeros(least, dtype=torch.int64))
    assert attack.reconstruct(images).isfinite().all()


@pytest.mark.parametrize("name", attacks.names())
def test_an_attack_must_learn_before_it_rebuilds(name):
    with pytest.raises(RuntimeError, match=f"this {name} attack has learned nothing yet: call fit"):
        build(name, torch.rand(2, 1, 8, 8)).reconstruct(torch.rand(2, 1, 4, 4))


@pytest.mark.parametrize("name", attacks.names())
def test_flat_features_are_for_attacks_without_a_network(name):
    images, labels = torch.rand(20, 1, 8, 8), torch.zeros(20, dtype=torch.int64)
    attack = build(name, images)
    if name in ("ridge", "nearest"):
        attack.fit(lambda x: x.flatten(1), images, labels)
        assert attack.reconstruct(images.flatten(1)).shape == images.shape
        return
    with pytest.raises(ValueError, match=r"needs features that are maps \[N, C, H, W\], got \[N, 64\]: cut .* ridge"):
        attack.fit(lambda x: x.flatten(1), images, labels)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_no_batch_is_a_single_image(count):
    images = torch.rand(count, 1, 8, 8)
    attack = Decoder(image_shape=(1, 8, 8), epochs=2, batch_size=2)
    attack.fit(torch.clone, images, torch.zeros(count, dtype=torch.int64))
    assert attack.reconstruct(images).isfinite().all()
