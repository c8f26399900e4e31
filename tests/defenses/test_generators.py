"""Where a defense's draws come from: torch's generator, one that is passed in, or the operating system's secure one."""

from __future__ import annotations

import math

import pytest
import torch

from cem_fast import data, defenses, models, training
from cem_fast.defenses import secure

LAPLACE = {"privacy_mechanism": "laplace", "privacy_epsilon": 100.0, "privacy_delta": 0.0, "privacy_clip": 5.0}
DEFENSES = {
    "noise": {},
    "noise_arl": {"adversary_weight": 1.0, "seed": 0},
    "noise_nopeek": {"nopeek_weight": 1.0},
    "dropout": {"dropout_rate": 0.3},
    "topk_pruning": {"pruned_share": 0.5},
    "local_dp": LAPLACE,
}


class Own(defenses.Defense):
    """A user's defense, whose release takes features alone."""

    def release(self, features):
        return features + torch.rand_like(features)


def built() -> list[defenses.Defense]:
    noise = defenses.GaussianNoise(noise_std=0.1)
    found = [defenses.build(name, noise_std=0.1, **settings) for name, settings in DEFENSES.items()]
    return [*found, defenses.Composed(Own(), noise), defenses.Quantized(noise, message="uint8")]


@pytest.mark.parametrize("defense", built(), ids=lambda defense: type(defense).__name__)
def test_a_generator_decides_the_release_and_leaves_torchs_own_alone(defense):
    features, state = torch.rand(4, 8, 5, 5), torch.get_rng_state()
    one, two, other = (defense.release(features, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_gives_the_noise_of_its_seed():
    defense, features = defenses.GaussianNoise(noise_std=0.1), torch.rand(4, 8, 5, 5)
    torch.manual_seed(3)
    assert torch.equal(defense.release(features, torch.Generator().manual_seed(3)), defense.release(features))


@pytest.mark.parametrize("name", DEFENSES)
def test_a_secure_defense_draws_alike_whatever_the_seed(name):
    defense = defenses.build(name, noise_std=0.1, **DEFENSES[name])
    features = torch.rand(1, 8, 5, 5).expand(1000, 8, 5, 5)
    plain = defense.release(features)
    defense.secure = True
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(defense.release(features))
    assert not torch.equal(*found)
    assert not torch.equal(found[0][0], found[0][1])
    assert found[0].var(0).mean() == pytest.approx(float(plain.var(0).mean()), rel=0.05)
    assert found[0].mean() == pytest.approx(float(plain.mean()), abs=0.01)
    with pytest.raises(ValueError, match="generator must be None"):
        defense.release(features, torch.Generator())


def test_secure_is_a_setting_of_every_defense_that_adds_noise():
    cases = [
        defenses.GaussianNoise(noise_std=0.1, secure=True),
        defenses.NoiseARL(adversary_weight=1.0, noise_std=0.1, secure=True),
        defenses.NoiseNoPeek(nopeek_weight=1.0, noise_std=0.1, secure=True),
        defenses.LocalDP(**LAPLACE, secure=True),
        defenses.FeatureDropout(dropout_rate=0.3, secure=True),
        defenses.build("dropout", noise_std=0.1, dropout_rate=0.3, secure=True),
        defenses.Quantized(defenses.GaussianNoise(noise_std=0.1, secure=True), message="uint8"),
    ]
    assert all(defense.secure for defense in cases)


def test_evaluations_refuse_secure_draws():
    model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
    defense = defenses.Composed(defenses.NoDefense(), defenses.GaussianNoise(noise_std=0.1, secure=True))
    part = data.Part(torch.rand(5, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1]), torch.arange(5))
    with pytest.raises(ValueError, match="secure must be False in evaluations"):
        training.evaluate_accuracy(model, defense, part, draws=1, seed=0)
    with pytest.raises(ValueError, match="secure must be False in evaluations"):
        training.observer(model, defense)


def test_secure_laplace_noise_shows_no_low_bits_of_the_values():
    values, scale = torch.rand(20_000) * 3, 0.7
    noisy = secure.laplace(values, scale)
    grid = 2.0 ** (math.floor(math.log2(scale)) - secure.GRID)
    exact = secure.laplace(values.double(), scale) / grid
    assert torch.equal(exact, exact.round())
    noise = (noisy - values).double().sort().values
    cumulative = torch.where(noise < 0, 0.5 * (noise / scale).exp(), 1 - 0.5 * (-noise / scale).exp())
    steps = torch.arange(1, len(noise) + 1) / len(noise)
    assert (cumulative - steps).abs().max() < 3 / len(noise) ** 0.5  # Kolmogorov and Smirnov: 1 in 10^7


def test_secure_laplace_noise_keeps_the_sensitivity():
    """Truncation toward zero: no sum of magnitudes grows on the grid."""
    values = torch.randn(1000).double()
    grid = 2.0**-secure.GRID
    on_grid = (values / grid).trunc() * grid
    remainder = (secure.laplace(values, 1.0) - on_grid) / grid
    assert torch.equal(remainder, remainder.round())
    assert on_grid.abs().sum() <= values.abs().sum()


def test_secure_laplace_noise_has_no_gradient():
    defense = defenses.LocalDP(**LAPLACE, secure=True)
    features = torch.rand(2, 5, requires_grad=True)
    with pytest.raises(ValueError, match="under torch.no_grad"):
        defense.release(features)
    with torch.no_grad():
        assert defense.release(features).shape == (2, 5)
