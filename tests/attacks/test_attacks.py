"""All attacks: descriptions, seeds, noise, budgets, and bad arguments."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from support.attacking import build, error_at_half_budget
from torch.nn import functional as F

from cem_fast import attacks, data, metrics
from cem_fast.attacks import Ensemble, Gan, Nearest, Optimization
from cem_fast.attacks.budgets import budgeted
from cem_fast.attacks.decoder import Decoder
from cem_fast.attacks.ridge import Ridge
from cem_fast.config import RunConfig
from cem_fast.experiments.build import build_attack

FEW_STEPS = {"flow_steps": 5, "steps": 5, "decoder_steps": 5, "corrector_steps": 2, "map_steps": 2}
WITHOUT_DECODER = ("ridge", "nearest", "kernel_ridge", "inversion")


def test_names():
    assert attacks.names() == (
        "decoder",
        "ridge",
        "nearest",
        "ensemble",
        "optimization",
        "gan",
        "kernel_ridge",
        "inversion",
        "flow",
    )
    assert attacks.decoder_names() == ("slim", "res_norm", "conv_norm", "plain")
    assert attacks.loss_names() == ("mse", "ssim", "l1")


@pytest.mark.parametrize("name", attacks.names())
def test_overview_names_knowledge_and_budget(name):
    settings = {"epochs": 123, "gan_epochs": 45, "steps": 67, "flow_steps": 89}
    attack = attacks.build(name, image_shape=(1, 8, 8), decoder="plain", seed=0, **settings)
    assert attack.name == name
    assert attack.overview() == f"{name}\n  the attacker {attack.knowledge}\n  budget: {attack.budget}"
    assert ("123 epochs of the network 'plain'" in attack.budget) == (name not in WITHOUT_DECODER)
    assert ("67 steps" in attack.budget) == (name == "optimization")
    assert ("89 training steps" in attack.budget) == (name == "flow")
    assert ("45 epochs" in attack.budget) == (name == "gan")
    assert ("differentiates" in attack.knowledge) == (name in ("optimization", "inversion", "flow"))


def test_settings_reach_the_attacks(small_faces):
    config = RunConfig(
        attack_batch_size=7, attack_dropout=0.6, attack_epochs=3, attack_gan_epochs=4, attack_steps=5, seed=6
    )
    for name in ("decoder", "gan", "optimization", "ensemble"):
        built = build_attack(name, config, small_faces)
        decoder = built if name == "decoder" else built.decoder
        assert (decoder.batch_size, decoder.dropout, decoder.epochs, decoder.seed) == (7, 0.6, 3, 6)
    assert build_attack("gan", config, small_faces).epochs == 4
    assert build_attack("optimization", config, small_faces).steps == 5
    decoder.fit(lambda x: F.avg_pool2d(x, 2), small_faces.attacker.images[:8], small_faces.attacker.labels[:8])
    assert [part.p for part in decoder.network.modules() if isinstance(part, torch.nn.Dropout)] == [0.6]


@pytest.mark.parametrize("name", attacks.names())
@pytest.mark.parametrize("budget", attacks.budget_names())
def test_the_budget_of_a_run_is_that_of_all_its_attacks(name, budget, small_faces):
    built = build_attack(name, RunConfig(attack_budget=budget), small_faces)
    wanted = attacks.build(name, image_shape=small_faces.image_shape, budget=budget, seed=0)
    assert built.budget == wanted.budget


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long if name in ("inversion", "flow") else ()) for name in attacks.names()],
)
def test_an_undefended_encoder_is_inverted_far_below_the_class_mean(small_faces, untrained, name):
    attack = build(name, small_faces.image_shape)
    attack.fit(untrained, small_faces.attacker.images, small_faces.attacker.labels)
    rebuilt = attack.reconstruct(untrained(small_faces.test.images))
    assert rebuilt.shape == small_faces.test.images.shape
    assert 0 <= rebuilt.min() <= rebuilt.max() <= 1
    error = metrics.mse(rebuilt, small_faces.test.images).mean()
    assert error < 0.6 * data.baselines(small_faces)["class_mean_mse"]


@pytest.mark.parametrize("name", attacks.names())
def test_an_attack_depends_on_its_seed_alone(name):
    images = torch.rand(20, 1, 8, 8)
    noisy = lambda x: F.avg_pool2d(x, 2) + 0.1 * torch.randn(len(x), 1, 4, 4)  # noqa: E731
    rebuilt = []
    for seed, stir in ((0, 1), (0, 2), (1, 1)):
        torch.manual_seed(stir)
        attack = build(name, images.shape[1:], seed=seed, epochs=2, **FEW_STEPS)
        before = torch.get_rng_state()
        attack.fit(noisy, images, torch.zeros(20, dtype=torch.int64))
        assert torch.equal(torch.get_rng_state(), before)
        rebuilt.append(attack.reconstruct(F.avg_pool2d(images, 2)))
    assert torch.equal(rebuilt[0], rebuilt[1])
    if name != "nearest":  # independent of the noise here
        assert not torch.equal(rebuilt[0], rebuilt[2])


@pytest.mark.parametrize("name, times", [("decoder", 1 + 15), ("ridge", 8), ("nearest", 8)])
def test_every_observation_has_fresh_noise(name, times):
    images, seen = torch.rand(20, 1, 8, 8), []

    def observe(x):
        seen.append(F.avg_pool2d(x, 2) + 0.1 * torch.randn(len(x), 1, 4, 4))
        return seen[-1]

    build(name, images.shape[1:]).fit(observe, images, torch.zeros(20, dtype=torch.int64))
    assert len(seen) == times
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:]))


def test_a_constant_feature_does_no_harm():
    torch.manual_seed(0)
    images = torch.rand(40, 1, 8, 8)
    for name in attacks.names():
        attack = build(name, images.shape[1:], epochs=3, **FEW_STEPS)
        attack.fit(lambda x: F.pad(F.avg_pool2d(x, 2), (0, 0, 0, 0, 0, 1)), images, torch.zeros(40).long())
        assert attack.reconstruct(F.pad(F.avg_pool2d(images, 2), (0, 0, 0, 0, 0, 1))).isfinite().all()


def test_half_the_budget():
    images = torch.rand(2, 1, 8, 8)
    full = build("decoder", images.shape[1:], epochs=9, loss="l1", seed=5)
    half = full.half_budget()
    assert vars(half) == {**vars(full), "epochs": 4}
    assert (half.loss, half.seed, half.decoder, half.batch_size) == ("l1", 5, "slim", full.batch_size)
    assert not hasattr(half, "network")
    for name, key in (("optimization", "steps"), ("gan", "epochs"), ("flow", "steps")):
        full = build(name, images.shape[1:], steps=9, gan_epochs=9, flow_steps=9, epochs=7, seed=5)
        half = full.half_budget()
        assert (getattr(half, key), half.seed) == (4, 5)
        assert name == "flow" or half.decoder == full.decoder
        assert getattr(half.half_budget().half_budget(), key) == 1
    for name in attacks.names():  # closed form, or one step or epoch
        assert (
            build(name, images.shape[1:], steps=1, gan_epochs=1, epochs=1, map_steps=1, flow_steps=1).half_budget()
            is None
        )


@pytest.mark.long
@pytest.mark.parametrize("name", ["optimization", "gan"])
def test_half_of_the_default_budget_converges(small_faces, untrained, name):
    usual = budgeted("standard", {})
    full = build(name, small_faces.image_shape, steps=usual["steps"], gan_epochs=usual["gan_epochs"])
    assert error_at_half_budget(full, small_faces, untrained) < 1.03


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: build("decodr", (1, 8, 8)), "unknown attack 'decodr': .*the nearest is 'decoder'"),
        (
            lambda: build("decoder", (1, 8, 8), decoder="res"),
            "unknown decoder 'res': .*the nearest is 'res_norm'",
        ),
        (
            lambda: build("gan", (1, 8, 8), loss="msse"),
            "unknown loss 'msse': .*the nearest is 'mse'",
        ),
        (lambda: build("gan", (1, 8, 8), gan_epochs=0), "epochs must be at least 1, got 0"),
        (lambda: build("optimization", (1, 8, 8), steps=0), "steps must be at least 1, got 0"),
        (lambda: Optimization(image_shape=(1, 8, 8), decoder=None, draws=0), "draws must be at least 1, got 0"),
        (lambda: Ensemble(image_shape=(1, 8, 8), decoder=None, draws=0), "draws must be at least 1, got 0"),
        (lambda: Gan(image_shape=(1, 8, 8), decoder=None, epochs=1, critic_steps=0), "critic_steps must be at least 1"),
        (
            lambda: Gan(image_shape=(1, 8, 8), decoder=None, epochs=1, mse_weight=0.0),
            "mse_weight must be positive and finite",
        ),
        (lambda: Nearest(image_shape=(1, 8, 8), draws=0), "draws must be at least 1, got 0"),
        (lambda: build("decoder", (1, 8, 8), epochs=0), "epochs must be at least 1, got 0"),
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


@pytest.mark.parametrize("name", attacks.names())
@pytest.mark.parametrize("value", ["2", True, [2], torch.tensor(2), 10**400, -1, float("nan"), float("inf")])
def test_settings_that_are_no_numbers_in_range_are_named(name, value):
    attack = build(name, (1, 8, 8))
    for field in fields(attack):
        if isinstance(getattr(attack, field.name), (int, float)) and field.name != "seed":
            with pytest.raises((TypeError, ValueError), match=f"^{field.name} must be "):
                replace(attack, **{field.name: value})
    images = torch.rand(6, 1, 8, 8)
    with pytest.raises((TypeError, ValueError), match="^seed must be "):
        build(name, (1, 8, 8), seed=value).fit(torch.clone, images, torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize(
    "name, least",
    [
        ("ridge", 5),
        ("kernel_ridge", 5),
        ("inversion", 6),
        ("flow", 6),
        ("decoder", 2),
        ("gan", 2),
        ("nearest", 1),
        ("ensemble", 6),
        ("optimization", 6),
    ],
)
def test_too_few_images(name, least):
    images = torch.rand(least, 1, 8, 8)
    with pytest.raises(ValueError, match=f"at least {least} images, got {least - 1}"):
        build(name, images.shape[1:]).fit(torch.clone, images[1:], torch.zeros(least - 1, dtype=torch.int64))
    attack = build(name, images.shape[1:], epochs=1, **FEW_STEPS)
    attack.fit(torch.clone, images, torch.zeros(least, dtype=torch.int64))
    assert attack.reconstruct(images).isfinite().all()


@pytest.mark.parametrize("name", attacks.names())
def test_reconstruct_before_fit_is_refused(name):
    with pytest.raises(RuntimeError, match=f"this {name} attack is not fitted: call fit"):
        build(name, (1, 8, 8)).reconstruct(torch.rand(2, 1, 4, 4))


def fitted(name, observe, images):
    """An attack after a short fit."""
    attack = build(name, images.shape[1:], epochs=1, **FEW_STEPS)
    attack.fit(observe, images, torch.zeros(len(images), dtype=torch.int64))
    return attack


@pytest.mark.parametrize("name", attacks.names())
@pytest.mark.parametrize("shape", [(64,), (4, 16), (5, 16)], ids=["vectors", "tokens", "tokens with a class token"])
def test_attacks_take_tokens_and_vectors(name, shape):
    images = torch.rand(20, 1, 8, 8)

    def observe(images):
        flat = images.flatten(1)
        return (flat if len(shape) == 1 or shape[0] == 4 else torch.cat([flat, flat[:, :16]], 1)).unflatten(1, shape)

    assert fitted(name, observe, images).reconstruct(observe(images)).shape == images.shape


@pytest.mark.parametrize("name", attacks.names())
def test_of_no_message_no_image_is_rebuilt(name):
    images, observe = torch.rand(20, 1, 16, 16), torch.nn.AvgPool2d(4)
    assert fitted(name, observe, images).reconstruct(observe(images)[:0]).shape == (0, *images.shape[1:])


@pytest.mark.parametrize("name", attacks.names())
def test_attacks_take_images_that_are_not_square(name):
    images, observe = torch.rand(20, 1, 20, 8), torch.nn.AvgPool2d(2)
    assert fitted(name, observe, images).reconstruct(observe(images)).shape == images.shape


@pytest.mark.parametrize("releases", [1.5, True, "2", None, float("nan")])
def test_a_count_that_is_no_integer_is_named(releases):
    with pytest.raises(TypeError, match="releases must be an integer of at least 1, got"):
        attacks.build("ridge", image_shape=(1, 8, 8), releases=releases)


def test_a_budget_of_another_type_is_named():
    with pytest.raises(ValueError, match="unknown budget"):
        attacks.build("ridge", image_shape=(1, 8, 8), budget=["quick"])
