"""Ridge regression: equal to a direct solve, and fitted to the noise."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cem_fast import metrics
from cem_fast.attacks import ridge
from cem_fast.attacks.ridge import PENALTIES, Ridge


def test_several_draws_beat_one():
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


def test_more_features_than_observations_give_the_weights_and_the_penalty_of_the_full_solve():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(20, 16, generator=generator, dtype=torch.float64)
    mixing = torch.randn(16, 90, generator=generator, dtype=torch.float64)
    features = pixels @ mixing + torch.randn(3, 20, 90, generator=generator, dtype=torch.float64)
    features = features - features.mean((0, 1))
    validation, training = torch.arange(4), torch.arange(4, 20)

    def solved(own: torch.Tensor, penalty: float) -> tuple[torch.Tensor, torch.Tensor]:
        z, y = features[:, own].flatten(0, 1), pixels[own].repeat(3, 1)
        shrinkage = penalty * z.square().sum() / len(z) * torch.eye(90, dtype=torch.float64)
        return torch.linalg.solve(z.T @ z + shrinkage, z.T @ (y - y.mean(0))), y.mean(0)

    errors = []
    for penalty in PENALTIES:
        w, mean = solved(training, float(penalty))
        errors.append(float((mean + features[0, validation] @ w - pixels[validation]).square().mean()))
    best = float(PENALTIES[errors.index(min(errors))])
    (weights,), intercept, penalty = ridge._by_observations(features, pixels, validation, training)
    assert penalty == best
    torch.testing.assert_close((weights, intercept), solved(torch.arange(20), best), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("width", [8, 4000])
def test_ridge_leaves_the_images_alone(width):
    images = torch.rand(50, 1, 4, 4, dtype=torch.float64)
    before, projection = images.clone(), torch.randn(16, width, dtype=torch.float64)
    attack = ridge.Ridge(image_shape=(1, 4, 4))
    attack.fit(lambda x: x.flatten(1) @ projection, images, torch.zeros(50).long())
    assert torch.equal(images, before)


def test_ridge_penalty_grows_with_the_noise():
    torch.manual_seed(0)
    images = torch.rand(50, 1, 8, 8)
    penalties = []
    for std in (0.0, 0.3, 3.0):
        attack = Ridge(image_shape=(1, 8, 8))
        attack.fit(lambda x, std=std: x.flatten(1) + std * torch.randn(len(x), 64), images, torch.zeros(50).long())
        penalties.append(attack.penalty)
    assert penalties[0] < penalties[1] < penalties[2]


def test_weights_beyond_memory_stay_a_product(monkeypatch):
    images = torch.rand(20, 1, 6, 6, generator=torch.Generator().manual_seed(0))

    def fitted():
        attack = ridge.Ridge(image_shape=(1, 6, 6))
        attack.fit(lambda x: torch.cat([x.flatten(1), x.flatten(1).square()], 1), images, torch.zeros(20).long())
        return attack, attack.reconstruct(torch.cat([images.flatten(1), images.flatten(1).square()], 1))

    whole, rebuilt = fitted()
    monkeypatch.setattr(ridge, "LARGEST", 100)
    product, again = fitted()
    assert (len(whole.factors), len(product.factors)) == (1, 2)
    torch.testing.assert_close(again, rebuilt)
    torch.testing.assert_close(product.weights, whole.weights)
