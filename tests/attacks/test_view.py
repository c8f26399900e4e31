"""How attacks see a network: exact and estimated noise, several releases, and budgets."""

from __future__ import annotations

import pytest
import torch
from support.attacking import build
from torch import nn

from cem_fast import attacks, defenses, metrics, training
from cem_fast.attacks.view import View
from cem_fast.models.split import SplitModel


@pytest.fixture(scope="module")
def images():
    return torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def test_an_observer_is_seen_exactly(images):
    model = SplitModel(nn.Flatten(), nn.Identity())
    view = View(training.observer(model, defenses.GaussianNoise(noise_std=0.2)), images)
    assert (view.exact, view.simple, view.differentiable) == (True, True, True)
    assert view.information == pytest.approx(25, rel=0.05)
    dropping = training.observer(model, defenses.build("dropout", noise_std=0.2, dropout_rate=0.3))
    view = View(dropping, images)
    assert (view.exact, view.simple) == (True, False)
    silent = View(training.observer(model, defenses.Bottleneck()), images)
    assert (silent.exact, silent.simple) == (False, True)
    assert 0 < float(silent.noise_std.max()) < 0.01


@pytest.mark.parametrize("shape", [(16,), (4, 4), (4, 2, 2)])
def test_the_noise_of_a_plain_callable_is_estimated(images, shape):
    torch.manual_seed(0)
    noise = torch.linspace(0.1, 0.3, 16).view(shape)
    view = View(lambda x: x.view(-1, *shape) + noise * torch.randn(len(x), *shape), images, releases=3)
    assert (view.exact, view.differentiable) == (False, True)
    torch.testing.assert_close(view.noise_std, noise, rtol=0.1, atol=0)
    messages, features = view.messages(images), images.view(-1, *shape)
    assert messages.shape == (3, 200, *shape)
    normal = torch.distributions.Normal(features, view.noise_std)
    torch.testing.assert_close(view.log_density(messages, features), normal.log_prob(messages).flatten(2).sum((0, 2)))
    assert float((view.features(images) - features).std()) < 0.1


def test_a_callable_without_gradients_is_seen_as_such(images):
    assert not View(lambda x: x.flatten(1).detach(), images).differentiable
    assert not View(lambda x: torch.from_numpy(x.detach().flatten(1).numpy() * 2), images).differentiable
    assert not View(lambda x: x.flatten(1).round(), images).differentiable


@pytest.mark.parametrize("name", attacks.names())
def test_more_releases_of_an_image_tell_more(small_faces, name):
    def observe(x):
        z = torch.nn.functional.avg_pool2d(x, 2)
        return z + 0.3 * torch.randn_like(z)

    error = {}
    for releases in (1, 8):
        torch.manual_seed(0)
        attack = build(name, small_faces.image_shape, epochs=4, steps=5, gan_epochs=1, releases=releases)
        attack.fit(observe, small_faces.attacker.images, small_faces.attacker.labels)
        seen = torch.stack([observe(small_faces.test.images) for _ in range(releases)])
        error[releases] = float(
            metrics.mse(attack.reconstruct(seen if releases > 1 else seen[0]), small_faces.test.images).mean()
        )
    assert error[8] < 0.95 * error[1]
    assert f"{8} times" in attack.knowledge or "once" not in attack.knowledge
    with pytest.raises(ValueError, match=r"8 messages of each image, \[8, N, ...\], got shape \(1, "):
        attack.reconstruct(seen[:1])


def test_the_optimization_attack_uses_the_likelihood_of_dropped_features(images):
    """A dropped feature says nothing: its pixel stays at the start instead of being drawn toward zero."""
    model = SplitModel(nn.Identity(), nn.Identity())
    defense = defenses.build("dropout", noise_std=0.01, dropout_rate=0.5)
    observe = training.observer(model, defense)
    attack = build("optimization", (1, 4, 4), epochs=1, steps=60)
    attack.fit(observe, images, torch.zeros(len(images)).long())
    truth = torch.full((1, 1, 4, 4), 0.7)
    seen = 2 * truth * (torch.arange(16).view(1, 1, 4, 4) % 2)
    from cem_fast.attacks.optimization import Recipe

    start = torch.full_like(truth, 0.6)
    moved = attack._moved(start, seen[None], [Recipe(start="mean", step_size=0.02, smoothness=0.0)])
    kept = seen > 0
    torch.testing.assert_close(moved[kept], truth[kept], rtol=0, atol=0.02)
    torch.testing.assert_close(moved[~kept], start[~kept], rtol=0, atol=0.02)


def test_budgets_are_settings_that_single_ones_override():
    for name, key in (("decoder", "epochs"), ("gan", "epochs"), ("optimization", "steps")):
        counts = [getattr(attacks.build(name, image_shape=(1, 8, 8), budget=b), key) for b in attacks.budget_names()]
        assert counts == sorted(set(counts))
    assert attacks.build("optimization", image_shape=(1, 8, 8), budget="quick", steps=7).steps == 7
    with pytest.raises(ValueError, match="unknown budget 'quik': .* the nearest is 'quick'"):
        attacks.build("ridge", image_shape=(1, 8, 8), budget="quik")
    with pytest.raises(ValueError, match="unknown setting 'step': .* the nearest is 'steps'"):
        attacks.build("ridge", image_shape=(1, 8, 8), step=3)
