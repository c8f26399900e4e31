"""Observed features, their likelihood, accuracy on them, and clean features."""

from __future__ import annotations

import math
from dataclasses import asdict

import pytest
import torch

from cem_fast import defenses, training
from cem_fast._support.seeding import seeded
from cem_fast.config import RunConfig
from cem_fast.training import measure


def defense(name: str = "noise") -> defenses.Defense:
    config = asdict(RunConfig(noise_std=0.1 if name != "bottleneck" else 0.0, seed=1))
    return defenses.build(name, **{key: config[key] for key in defenses.settings()})


def test_accuracy_is_the_mean_over_draws(model, splits):
    loud = defenses.GaussianNoise(noise_std=1.0)
    model.train()
    once = training.evaluate_accuracy(model, loud, splits.test, draws=1, seed=0)
    often = training.evaluate_accuracy(model, loud, splits.test, draws=50, seed=0)
    assert model.training  # its mode is restored
    assert once * 20 == pytest.approx(round(once * 20))
    assert often * 1000 == pytest.approx(round(often * 1000))
    assert often == training.evaluate_accuracy(model, loud, splits.test, draws=50, seed=0)
    exact = training.evaluate_accuracy(model, defenses.Bottleneck(), splits.test, draws=1, seed=0)
    with torch.no_grad():
        logits = model.eval()(splits.test.images)
    assert exact == pytest.approx((logits.argmax(1) == splits.test.labels).double().mean().item())
    with pytest.raises(ValueError, match="draws must be at least 1, got 0"):
        training.evaluate_accuracy(model, loud, splits.test, draws=0, seed=0)
    with pytest.raises(ValueError, match="at least one image"):
        training.evaluate_accuracy(model, loud, splits.test[torch.arange(0)], draws=1, seed=0)


def test_the_observer_encodes_once_and_adds_fresh_noise(model, splits):
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    observe = training.observer(model, defense())
    images = splits.test.images.clone()
    first, second = observe(images), observe(images)
    assert len(calls) == 1
    assert not torch.equal(first, second)
    clean = training.clean_features(model, images)
    assert (first - clean).std().item() == pytest.approx(0.1, rel=0.1)
    images.mul_(0.5)  # changed in place: it must be encoded again
    assert (observe(images) - training.clean_features(model, images)).std().item() == pytest.approx(0.1, rel=0.1)


def test_observed_features_are_differentiable_if_the_images_are(model, splits):
    observe = training.observer(model, defense())
    images = splits.test.images[:3].clone()
    assert not observe(images).requires_grad  # the network's own parameters get no gradient
    pixels = images.clone().requires_grad_()
    direction = torch.randn_like(images)
    with seeded(0):
        (gradient,) = torch.autograd.grad(observe(pixels).square().sum(), pixels)
    ends = []
    for step in (-1e-3, 1e-3):
        with seeded(0):
            ends.append(observe(images + step * direction).double().square().sum())
    assert float((gradient * direction).sum()) == pytest.approx(float((ends[1] - ends[0]) / 2e-3), rel=0.02)
    with torch.no_grad():
        assert not observe(pixels).requires_grad
    assert all(p.grad is None for p in model.parameters())


def test_observations_of_the_same_pixels_share_a_pass_until_it_is_used(model, splits):
    calls = []
    handle = model.encoder.register_forward_hook(lambda *_: calls.append(1))
    observe = training.observer(model, defense())
    pixels = splits.test.images[:3].clone().requires_grad_()
    gradients = []
    for _ in range(2):  # the second time, the graph of the first is gone
        with seeded(0):
            both = observe(pixels) + observe(pixels)
        gradients.append(torch.autograd.grad(both.square().sum(), pixels)[0])
    assert len(calls) == 2
    assert torch.equal(*gradients)
    handle.remove()


def test_passes_on_the_cpu_are_small_and_change_nothing(model, splits, monkeypatch):
    images, counts = splits.test.images[:11], []
    handle = model.encoder.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    outcomes = []
    for passes in ([11], [5, 5, 1]):
        counts.clear()
        pixels = images.clone().requires_grad_()
        features = measure.encoded(model, pixels)
        outcomes.append((features.detach(), *torch.autograd.grad(features.square().sum(), pixels)))
        assert counts == passes
        monkeypatch.setattr(measure, "CACHED", 5 * images[0].numel() + 1)
    torch.testing.assert_close(*outcomes)
    assert measure.encoded(model, images[:0]).shape == (0, *features.shape[1:])
    handle.remove()


def test_measurements_keep_the_mode_of_every_module(model, splits):
    model.train()
    frozen = next(module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)).eval()
    adversary = defense("noise_arl")
    adversary.start(model, splits.train.images)
    training.clean_features(model, splits.test.images)
    training.correctness(model, adversary, splits.test, draws=1, seed=0)
    assert [module for module in model.modules() if not module.training] == [frozen]


def test_an_inference_tensor_is_observed(model, splits):
    observe = training.observer(model, defenses.Bottleneck())
    with torch.inference_mode():
        images = splits.test.images.clone()
        first = observe(images)
        images.zero_()
        assert not torch.equal(observe(images), first)
    assert torch.equal(observe(splits.test.images), first)


def test_the_observer_knows_the_likelihood_of_what_it_released(model, splits):
    observe = training.observer(model, defenses.GaussianNoise(noise_std=0.1))
    images = splits.test.images[:4]
    released, features = observe(images), training.clean_features(model, images)
    assert torch.equal(observe.features(images), features)
    deviations = (released - features).flatten(1) / 0.1
    expected = (-0.5 * deviations.square() - math.log(0.1 * math.sqrt(2 * math.pi))).sum(1)
    torch.testing.assert_close(observe.log_likelihood(released, images), expected)
    own, others = observe.log_likelihood(released, images), observe.log_likelihood(released, images.flip(0))
    assert own.mean() > others.mean()
    pixels = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(observe.log_likelihood(released, pixels).sum(), pixels)
    assert slope.any()
