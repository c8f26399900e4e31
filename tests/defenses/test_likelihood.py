"""The likelihood of released features: a density, the right one, and an error where there is none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cem_fast import training
from cem_fast.defenses import Bottleneck, Composed, Defense, FeatureDropout, GaussianNoise, LocalDP, TopKPruning
from cem_fast.models.split import SplitModel


def private(mechanism: str) -> LocalDP:
    return LocalDP(privacy_mechanism=mechanism, privacy_epsilon=20.0, privacy_delta=1e-4, privacy_clip=2.0)


NOISY = {
    "noise": GaussianNoise(noise_std=0.3),
    "bottleneck": Composed(Bottleneck(), GaussianNoise(noise_std=0.3)),
    "noise twice": Composed(GaussianNoise(noise_std=0.3), GaussianNoise(noise_std=0.4)),
    "dropout": Composed(FeatureDropout(dropout_rate=0.3), GaussianNoise(noise_std=0.2)),
    "gaussian": private("gaussian"),
    "laplace": private("laplace"),
    "gaussian with noise": Composed(private("gaussian"), GaussianNoise(noise_std=0.2)),
    "laplace with noise": Composed(private("laplace"), GaussianNoise(noise_std=0.2)),
}


@pytest.mark.parametrize("name", NOISY)
def test_the_likelihood_is_the_density_of_releases(name):
    """It integrates to one, and its distribution function is that of many releases."""
    torch.manual_seed(0)
    defense, feature = NOISY[name], torch.tensor([[0.8]], dtype=torch.float64)
    grid = torch.linspace(-12, 12, 24001, dtype=torch.float64)[:, None]
    density = defense.log_likelihood(grid, feature.expand_as(grid)).exp()
    step = float(grid[1] - grid[0])
    assert float(density.sum()) * step == pytest.approx(1, abs=2e-3)
    released = defense.release(feature.expand(100_000, 1))
    for place in (-0.5, 0.0, 0.5, 0.8, 1.2, 2.0):
        expected = float(density[grid[:, 0] <= place].sum()) * step
        assert float((released <= place).double().mean()) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("shape", [(3,), (2, 4, 4), (6, 5)])
def test_maps_tokens_and_vectors_have_one_likelihood_per_image(shape):
    torch.manual_seed(0)
    features = torch.rand(7, *shape)
    for defense in NOISY.values():
        released = defense.release(features)
        found = defense.log_likelihood(released, features)
        assert found.shape == (7,)
        if not isinstance(defense, Composed) or not isinstance(defense.parts[0], LocalDP):
            torch.testing.assert_close(found[2:3], defense.log_likelihood(released[2:3], features[2:3]))


def test_the_likelihood_is_differentiable_in_the_features():
    torch.manual_seed(0)
    released, features = torch.rand(2, 3).double(), torch.rand(2, 3).double().requires_grad_()
    for defense in NOISY.values():
        assert torch.autograd.gradcheck(lambda f, d=defense: d.log_likelihood(released, f), features)


def test_a_deterministic_part_comes_before_the_noise():
    defense = Composed(TopKPruning(pruned_share=0.5), GaussianNoise(noise_std=1.0))
    released, features = torch.tensor([[1.0, 4.0, 0.0, 2.0]]), torch.tensor([[0.5, 4.0, 2.0, 3.0]])
    expected = -0.5 * (1 + 0 + 0 + 1) - 2 * math.log(2 * math.pi)
    assert float(defense.log_likelihood(released, features)) == pytest.approx(expected)


class Loud(Defense):
    def release(self, features):
        return features + torch.rand_like(features)


class LoudAndClear(Loud):
    def log_likelihood(self, released, features):
        inside = (released >= features) & (released <= features + 1)
        return inside.float().log().flatten(1).sum(1)


@pytest.mark.parametrize(
    "defense, message",
    [
        (Bottleneck(), "the defense Bottleneck releases features without noise: no density"),
        (TopKPruning(pruned_share=0.5), "the defense TopKPruning releases features without noise"),
        (FeatureDropout(dropout_rate=0.5), "no density without noise"),
        (Loud(), "the defense Loud releases features at random: its likelihood needs a log_likelihood of its own"),
        (
            Composed(FeatureDropout(dropout_rate=0.5), private("laplace")),
            "two random defenses in turn is unknown: FeatureDropout, LocalDP",
        ),
    ],
)
def test_a_release_without_a_known_density_is_named(defense, message):
    with pytest.raises(NotImplementedError, match=message):
        defense.log_likelihood(torch.rand(2, 3), torch.rand(2, 3))


def test_an_own_defense_brings_its_own_likelihood():
    images = torch.rand(3, 1, 4, 4)
    observe = training.observer(SplitModel(nn.Flatten(), nn.Identity()), LoudAndClear())
    released = observe(images)
    assert observe.log_likelihood(released, images).tolist() == [0.0, 0.0, 0.0]
    assert observe.log_likelihood(released + 2, images).isneginf().all()
