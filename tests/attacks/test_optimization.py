"""The optimization attack: recipes, shares, the mixture, and draws."""

from __future__ import annotations

import pytest
import torch
from support.attacking import fitted

from cem_fast import attacks
from cem_fast._support.seeding import seeded
from cem_fast.attacks import optimization
from cem_fast.attacks.optimization import Recipe


@pytest.fixture(scope="module")
def on_clean(faces, observe):
    """The attack on features without noise, fitted quickly."""
    return fitted("optimization", faces, observe, epochs=5, steps=5)


@pytest.fixture(scope="module")
def on_noisy(faces, noisy):
    """The attack on noisy features, fitted quickly."""
    return fitted("optimization", faces, noisy, epochs=5, steps=5)


def test_optimization_never_ends_worse_than_its_start_on_the_attackers_images(faces, noisy, monkeypatch):
    harmful = Recipe(start="decoder", step_size=0.5, smoothness=0.0)
    useful = Recipe(start="decoder", step_size=0.03, smoothness=4.0)
    lone = Recipe(start="mean", step_size=0.1, smoothness=1e4)
    chosen = {}
    for recipes in ((harmful,), (useful,), (lone,), (harmful, useful, lone)):
        monkeypatch.setattr(optimization, "RECIPES", recipes)
        attack = fitted("optimization", faces, noisy, steps=20)
        assert attack.error <= attack.error_of_start
        assert 0 <= attack.share <= 1
        chosen[recipes] = attack.recipe, attack.error
    recipe, error = chosen[harmful, useful, lone]
    assert recipe == useful
    assert error == pytest.approx(chosen[useful,][1], rel=0.02)  # with other noise


def test_the_share_of_a_move_minimizes_the_error():
    torch.manual_seed(0)
    start, images = torch.full((4, 1, 5, 5), 0.5), torch.rand(4, 1, 5, 5)
    wanted = images - start
    before = float(wanted.square().mean())
    diverged = torch.full_like(wanted, torch.nan)
    for move, share, after in (
        (2 * wanted, 0.5, 0.0),
        (0.5 * wanted, 1.0, before / 4),
        (-wanted, 0.0, before),
        (diverged, 0.0, before),
    ):
        found = optimization._judged(optimization.RECIPES[0], start, move, images)
        assert found[1:] == pytest.approx((share, before, after), abs=1e-7)


def test_a_share_of_zero_returns_the_start(faces, noisy, on_noisy, monkeypatch):
    attack = on_noisy
    features = noisy(faces.test.images)
    start = attack.trained.reconstruct(features)
    assert attack.recipe.start == "decoder"
    assert not torch.equal(attack.reconstruct(features), start)
    monkeypatch.setattr(attack, "share", 0.0)
    assert torch.equal(attack.reconstruct(features), start)


@pytest.mark.parametrize("start", ["decoder", "mean"])
def test_moved_pixels_explain_the_features_better(faces, observe, on_clean, start, monkeypatch):
    attack = on_clean
    monkeypatch.setattr(attack, "steps", 40)
    images = faces.test.images
    features = observe(images)
    recipe = Recipe(start=start, step_size=0.03, smoothness=0.0)
    before = attack._start(recipe, attack.trained, features)
    after = attack._moved(before, features[None], [recipe])
    misfit = [float((observe(x) - features).square().mean()) for x in (before, after)]
    assert misfit[1] < 0.5 * misfit[0]
    smooth = attack._moved(before, features[None], [Recipe(start=start, step_size=0.03, smoothness=30.0)])
    assert optimization._total_variation(smooth).mean() < 0.7 * optimization._total_variation(after).mean()


def test_recipes_run_together_as_they_would_alone(faces, observe, on_clean):
    attack = on_clean
    features = observe(faces.test.images)
    recipes = list(optimization.RECIPES[:3])
    starts = [attack._start(r, attack.trained, features) for r in recipes]
    together = attack._moved(torch.cat(starts), features.repeat(3, 1, 1, 1)[None], recipes).chunk(3)
    for recipe, start, moved in zip(recipes, starts, together):
        torch.testing.assert_close(attack._moved(start, features[None], [recipe]), moved, rtol=0, atol=1e-4)


def test_the_mixture_raises_the_likelihood_of_features(faces, noisy, on_noisy, monkeypatch):
    attack = on_noisy
    monkeypatch.setattr(attack, "steps", 30)
    assert attack.noise_variance == pytest.approx(0.01, rel=0.05)
    with seeded(1):
        features = noisy(faces.test.images)
        start = attack._start(optimization.RECIPES[0], attack.trained, features)
        likelihood = []
        for weight in (0.0, 1.0, 10.0):
            recipe = Recipe(start="decoder", step_size=0.03, smoothness=0.0, mixture=weight)
            moved = attack._moved(start, features[None], [recipe])
            seen = noisy(moved).flatten(1)
            likelihood.append(float(optimization.mixture_log_prob(seen, *attack.mixture).mean()))
    assert likelihood[0] < likelihood[1] < likelihood[2]


def test_several_draws_are_an_expectation():
    """Under a defense that drops features, the minimum is that of the mean over draws."""
    torch.manual_seed(0)
    images = torch.rand(30, 1, 8, 8)
    dropping = lambda x: 2 * x * (torch.rand_like(x) < 0.5)  # noqa: E731
    error = {}
    for draws in (1, 32):
        decoder = attacks.Decoder(image_shape=(1, 8, 8), epochs=1)
        attack = attacks.Optimization(image_shape=(1, 8, 8), decoder=decoder, steps=20, draws=draws)
        attack.fit(dropping, images, torch.zeros(30).long())
        moved = attack._moved(
            torch.full_like(images, 0.5), images[None], [Recipe(start="mean", step_size=0.05, smoothness=0.0)]
        )
        # E || 2 m x - z ||^2 with m = 0 or 1 has its minimum at x = z / 2
        error[draws] = float((moved - images / 2).square().mean())
    assert error[32] < 0.7 * error[1]


def test_features_without_a_gradient_are_named():
    images = torch.rand(20, 1, 8, 8)
    attack = attacks.build("optimization", image_shape=(1, 8, 8), epochs=1, decoder="slim", seed=0)
    with pytest.raises(ValueError, match="differentiable with respect to the images, .* pass straight through"):
        attack.fit(lambda x: torch.round(4 * x.detach()), images, torch.zeros(20).long())
