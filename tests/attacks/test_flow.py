"""The flow attack: posterior means and samples, with its own model and with a given one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from cem_fast import attacks, defenses, training
from cem_fast.attacks.flow_network import FlowNetwork
from cem_fast.models.split import SplitModel

MEAN, SPREAD, NOISE = 0.5, 0.15, 0.1


def build(image_shape, **settings):
    return attacks.build("flow", image_shape=image_shape, **{"epochs": 4, "flow_steps": 60, **settings})


def gaussian_prior(noisy, time):
    """The velocity of images whose pixels are independent, of mean 0.5 and deviation 0.15."""
    t, variance = time.view(-1, 1, 1, 1), (2 * SPREAD) ** 2
    return noisy * (t * variance - (1 - t)) / (t**2 * variance + (1 - t) ** 2)


@pytest.fixture(scope="module")
def linear():
    """A linear encoder, Gaussian images, and the exact posterior of images given released features."""
    torch.manual_seed(0)
    images = MEAN + SPREAD * torch.randn(60, 1, 4, 4)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(16, 10, bias=False))
    observe = training.observer(SplitModel(encoder, nn.Identity()), defenses.GaussianNoise(noise_std=NOISE))
    matrix = encoder[1].weight.detach()
    gain = SPREAD**2 * matrix.T @ torch.linalg.inv(SPREAD**2 * matrix @ matrix.T + NOISE**2 * torch.eye(10))
    covariance = SPREAD**2 * (torch.eye(16) - gain @ matrix)

    def posterior(features):
        return MEAN + (features - MEAN * matrix.sum(1)) @ gain.T, covariance

    return images, observe, posterior


@pytest.fixture(scope="module")
def pictures():
    """Images of 2x2 squares, which tokens and vectors release with noise."""
    torch.manual_seed(0)
    images = torch.rand(400, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return images, torch.randn(64, 24) / 4


def test_samples_of_a_given_prior_have_the_moments_of_the_posterior(linear):
    images, observe, posterior = linear
    attack = replace(build((1, 4, 4), prior=gaussian_prior), points=25, corrections=12)
    attack.fit(observe, images, torch.zeros(60).long())
    one = observe(images[:1])
    exact, covariance = posterior(one)
    samples = attack.sample(one.expand(400, -1)).flatten(1)
    torch.testing.assert_close(samples.mean(0), exact[0], rtol=0, atol=0.04)
    share = float(samples.var(0).mean() / covariance.diagonal().mean())
    assert 0.75 < share < 1.05  # Euler's method loses some of the variance


def test_the_mean_of_more_samples_is_nearer(linear):
    images, observe, posterior = linear
    features, errors = observe(images), []
    best = float(posterior(features)[1].diagonal().mean())
    for samples in (1, 8):
        attack = replace(build((1, 4, 4), prior=gaussian_prior), samples=samples, points=8, corrections=8)
        attack.fit(observe, images, torch.zeros(60).long())
        errors.append(float((attack.reconstruct(features) - images).square().mean()) / best)
    assert errors[0] > 1.4
    assert errors[1] < 1.3


def test_a_prior_needs_gradients(linear):
    images, observe, _ = linear
    attack = build((1, 4, 4), prior=gaussian_prior)
    with pytest.raises(ValueError, match="a prior needs features that are differentiable"):
        attack.fit(lambda x: observe(x).detach(), images, torch.zeros(60).long())


@pytest.mark.parametrize("shape, differentiable", [((24,), True), ((6, 4), False), ((6, 2, 2), True)])
def test_vectors_tokens_and_maps_are_inverted(pictures, shape, differentiable):
    images, mix = pictures

    def observe(x):
        z = torch.tanh(x.flatten(1) @ mix).view(-1, *shape)
        return (z if differentiable else z.detach()) + 0.05 * torch.randn_like(z)

    attack = build((1, 8, 8))
    attack.fit(observe, images[:200], torch.zeros(200).long())
    assert attack.view.differentiable == differentiable
    features = observe(images[300:])
    rebuilt, sample = attack.reconstruct(features), attack.sample(features)
    truth = images[300:]
    assert (rebuilt - truth).square().mean() < 0.6 * truth.var()
    assert (sample - truth).square().mean() < 0.6 * truth.var()
    assert not torch.equal(rebuilt, sample)


@pytest.mark.long
def test_a_sample_is_spread_as_the_posterior_is():
    """Half of every image is hidden: a sample draws it, the mean leaves it at its average."""
    torch.manual_seed(0)
    images = torch.rand(500, 1, 1, 2).expand(-1, 1, 8, 2).repeat_interleave(4, 3)

    def observe(x):
        return x[:, :, :, :4] + 0.02 * torch.randn(len(x), 1, 8, 4)

    attack = build((1, 8, 8), flow_steps=1000)
    attack.fit(observe, images[:400], torch.zeros(400).long())
    features = observe(images[400:])
    hidden = images[400:, :, :, 6:].mean((1, 2, 3))
    sample = attack.sample(features)[:, :, :, 6:].mean((1, 2, 3))
    mean = attack.reconstruct(features)[:, :, :, 6:].mean((1, 2, 3))
    assert sample.std() > 0.6 * hidden.std()
    assert mean.std() < 0.5 * hidden.std()


def test_the_attacker_steps_are_reported(pictures):
    images, mix = pictures
    seen = []
    attack = build((1, 8, 8), flow_steps=4)
    attack.on_step = lambda done, total: seen.append((done, total))
    attack.fit(lambda x: x.flatten(1) @ mix, images[:40], torch.zeros(40).long())
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 13, 30), (2, 50, 33)])
def test_the_network_takes_images_of_any_size(shape):
    network = FlowNetwork(shape, (5,), given=2)
    first, *others = torch.randn(3, 4, *shape)
    out = network(others[0], torch.rand(4), torch.randn(4, 5), [first, others[1]])
    assert torch.equal(out, first)


def test_the_budget_of_a_prior_is_its_samples():
    attack = build((1, 8, 8), prior=gaussian_prior)
    assert attack.budget == "8 samples of a given flow model, 30 points in time each"
    assert attack.half_budget().samples == 4
    assert build((1, 8, 8), flow_steps=9).half_budget().steps == 4
    with pytest.raises(ValueError, match="points must be at least 1, got 0"):
        replace(build((1, 8, 8)), points=0)
