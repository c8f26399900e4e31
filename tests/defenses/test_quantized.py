"""Quantized messages: their likelihood is that of the codes, and noise of several steps hides the rounding."""

from __future__ import annotations

import pytest
import torch

from cem_fast import defenses


@pytest.mark.parametrize("noise_std", [0.005, 0.1, 1.0])
def test_probabilities_of_all_codes_sum_to_one(noise_std):
    quantized = defenses.Quantized(defenses.GaussianNoise(noise_std=noise_std), message="uint8")
    codes = quantized.code.decode(torch.arange(256, dtype=torch.uint8)).view(256, 1)
    for feature in (-0.5, 0.0, 0.37, 1.0, 2.0):
        logs = quantized.log_likelihood(codes.double(), torch.full((256, 1), feature, dtype=torch.float64))
        assert logs.exp().sum() == pytest.approx(1, abs=1e-5)


def test_probabilities_are_the_frequencies_of_codes():
    quantized = defenses.Quantized(defenses.GaussianNoise(noise_std=0.01), message="uint8")
    torch.manual_seed(0)
    released = quantized.release(torch.full((200_000, 1), 0.4))
    values, counts = released.unique(return_counts=True)
    found = quantized.log_likelihood(values.view(-1, 1), torch.full((len(values), 1), 0.4)).exp()
    common = counts > 2000
    assert torch.allclose(found[common], counts[common] / 200_000, rtol=0.08)


def test_the_likelihood_of_dropout_with_noise_is_that_of_its_density():
    inner = defenses.build("dropout", noise_std=0.1, dropout_rate=0.3)
    quantized = defenses.Quantized(inner, message="uint8")
    codes = quantized.code.decode(torch.arange(256, dtype=torch.uint8)).view(256, 1)
    logs = quantized.log_likelihood(codes, torch.full((256, 1), 0.5))
    assert logs.exp().sum() == pytest.approx(1, abs=2e-3)


def test_gradients_reach_the_features():
    quantized = defenses.Quantized(defenses.GaussianNoise(noise_std=0.1), message="uint8")
    features = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    released = quantized.release(torch.rand(3, 5)).double()
    assert torch.autograd.gradcheck(lambda f: quantized.log_likelihood(released, f), features)


def test_codes_without_noise_have_no_likelihood():
    quantized = defenses.Quantized(defenses.NoDefense(), message="uint8")
    with pytest.raises(NotImplementedError, match="without noise"):
        quantized.log_likelihood(torch.zeros(1, 2), torch.zeros(1, 2))
