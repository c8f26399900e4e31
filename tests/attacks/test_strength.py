"""Attacks on a trained network: that each is one, what it adds to the attack it starts from, and what it is fitted to."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cem_fast import attacks, data, defenses, metrics, training
from cem_fast._support.seeding import seeded
from cem_fast.attacks import gan, optimization
from cem_fast.attacks.networks import Critic
from cem_fast.attacks.optimization import Recipe
from cem_fast.mixture import GaussianMixture


@pytest.fixture(scope="module")
def faces(undefended_faces):
    return undefended_faces[0]


@pytest.fixture(scope="module")
def observe(undefended_faces):
    return training.observer(undefended_faces[1], defenses.Bottleneck())


@pytest.fixture(scope="module")
def noisy(undefended_faces):
    return training.observer(undefended_faces[1], defenses.GaussianNoise(noise_std=0.1))


def build(name, splits, **changes):
    settings = {"image_shape": splits.image_shape, "epochs": 30, "decoder": "slim", "seed": 0}
    return attacks.build(name, **{**settings, "gan_epochs": 4, "steps": 60, **changes})


def fitted(name, splits, observe, **changes):
    attack = build(name, splits, **changes)
    attack.fit(observe, splits.attacker.images, splits.attacker.labels)
    return attack


@pytest.fixture(scope="module")
def error(faces, observe):
    """The error of an attack on the undefended network, fitted once for the tests of this file."""

    @cache
    def found(name: str) -> float:
        attack = fitted(name, faces, observe)
        return float(metrics.mse(attack.reconstruct(observe(faces.test.images)), faces.test.images).mean())

    return found


@pytest.mark.parametrize("name", attacks.names())
def test_every_attack_on_an_undefended_encoder_beats_the_class_mean(faces, error, name):
    assert error(name) < data.baselines(faces)["class_mean_mse"]


@pytest.mark.parametrize("name", [name for name in attacks.names() if name != "nearest"])
def test_every_attack_rebuilds_more_than_a_lookup_finds(error, name):
    assert error(name) < 0.8 * error("nearest")


def test_the_ensemble_is_better_than_both_of_its_members(error):
    assert error("ensemble") < min(error("decoder"), error("ridge"))


def test_optimization_and_gan_improve_on_the_decoder_that_they_start_from(error):
    assert error("optimization") < 0.9 * error("decoder")
    assert error("gan") < 1.02 * error("decoder")


def test_nearest_is_the_image_with_the_least_expected_distance():
    torch.manual_seed(0)
    images = torch.rand(12, 1, 4, 4)
    spread = torch.linspace(0.05, 2.0, 12).view(-1, 1, 1, 1)  # noise of a size of its own for every image
    noisy = lambda x: x + spread[: len(x)] * torch.randn_like(x)  # noqa: E731
    attack = attacks.Nearest(image_shape=(1, 4, 4), draws=50)
    attack.fit(noisy, images, torch.zeros(12).long())
    with seeded(0, "nearest attack"):
        own = torch.stack([noisy(images).flatten(1) for _ in range(50)])
    seen = torch.rand(7, 1, 4, 4)
    scale = own.flatten(0, 1).std(0, correction=0)
    distances = ((seen.flatten(1)[:, None, None] - own.permute(1, 0, 2)[None]) / scale).square().sum(3).mean(2)
    assert torch.equal(attack.reconstruct(seen), images[distances.argmin(1)])
    # an image seen through loud noise is far from everything, however near its own features are on average
    assert torch.equal(attack.reconstruct(images[:1]), images[:1])


def test_ensemble_trusts_the_better_member_in_every_region():
    torch.manual_seed(0)
    truth = torch.rand(1, 60, 100, dtype=torch.float64)
    decoder, ridge = truth.clone(), truth.clone()
    decoder[..., :50] += 0.3 * torch.randn(1, 60, 50)
    ridge[..., 50:] += 0.3 * torch.randn(1, 60, 50)
    weights = ensemble_weights(decoder - ridge, truth - ridge)
    assert weights[:50].max() < 0.1
    assert weights[50:].min() > 0.9
    # where neither is better anywhere, all pixels learn from each other: independent errors are averaged
    decoder, ridge = (truth + 0.3 * torch.randn(1, 60, 100) for _ in range(2))
    weights = ensemble_weights(decoder - ridge, truth - ridge)
    assert (weights - 0.5).abs().max() < 0.1
    assert ensemble_weights(torch.zeros(1, 60, 100), torch.zeros(1, 60, 100)).isfinite().all()


def ensemble_weights(apart: Tensor, wanted: Tensor) -> Tensor:
    from cem_fast.attacks.ensemble import _weights

    return _weights(apart.double(), wanted.double())


def test_parts_of_an_attack_that_are_weighed_have_not_seen_the_images_they_are_weighed_on(faces, observe, monkeypatch):
    seen = []
    for cls in (attacks.Decoder, attacks.Ridge):
        fit = cls.fit
        monkeypatch.setattr(cls, "fit", lambda self, o, x, y, fit=fit: seen.append((self, x)) or fit(self, o, x, y))
    fit, rows = GaussianMixture.fit, []
    monkeypatch.setattr(GaussianMixture, "fit", lambda self, x, **kwargs: rows.append(len(x)) or fit(self, x, **kwargs))
    rebuilt = attacks.Decoder.reconstruct
    asked = []
    monkeypatch.setattr(attacks.Decoder, "reconstruct", lambda self, z: asked.append((self, z)) or rebuilt(self, z))
    for name in ("ensemble", "optimization"):
        seen.clear(), asked.clear()
        fitted(name, faces, observe, epochs=1, steps=2)
        counts = {len(images) for _, images in seen}
        assert counts == {256, 320}  # first without a fifth, then with all
        assert rows == ([256, 320] if name == "optimization" else [])
        for decoder, features in asked:  # while fitting, only the decoder that has not seen the held-out fifth answers
            learned = next(observe(images) for who, images in seen if who is decoder)
            assert len(learned) == 256
            assert torch.cdist(features.flatten(1), learned.flatten(1)).min() > 0.01
        assert asked


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
    assert error == pytest.approx(chosen[useful,][1], rel=0.02)  # other draws of the noise


def test_the_share_of_a_move_is_the_one_that_serves_best():
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


def test_a_refinement_that_only_harms_is_refused(faces, noisy, on_noisy, monkeypatch):
    attack = on_noisy
    features = noisy(faces.test.images)
    start = attack.trained.reconstruct(features)
    assert attack.recipe.start == "decoder"
    assert not torch.equal(attack.reconstruct(features), start)
    monkeypatch.setattr(attack, "share", 0.0)
    assert torch.equal(attack.reconstruct(features), start)


@pytest.fixture(scope="module")
def on_clean(faces, observe):
    """The attack on features without noise, fitted quickly."""
    return fitted("optimization", faces, observe, epochs=5, steps=5)


@pytest.fixture(scope="module")
def on_noisy(faces, noisy):
    """The attack on noisy features, fitted quickly."""
    return fitted("optimization", faces, noisy, epochs=5, steps=5)


@pytest.mark.parametrize("start", ["decoder", "mean"])
def test_moved_pixels_explain_the_features_better(faces, observe, on_clean, start, monkeypatch):
    attack = on_clean
    monkeypatch.setattr(attack, "steps", 40)
    images = faces.test.images
    features = observe(images)
    recipe = Recipe(start=start, step_size=0.03, smoothness=0.0)
    before = attack._start(recipe, attack.trained, features)
    after = attack._moved(before, features, [recipe])
    misfit = [float((observe(x) - features).square().mean()) for x in (before, after)]
    assert misfit[1] < 0.5 * misfit[0]
    smooth = attack._moved(before, features, [Recipe(start=start, step_size=0.03, smoothness=30.0)])
    assert optimization._total_variation(smooth).mean() < 0.7 * optimization._total_variation(after).mean()


def test_every_recipe_moves_its_own_rows_as_it_would_alone(faces, observe, on_clean):
    attack = on_clean
    features = observe(faces.test.images)
    recipes = list(optimization.RECIPES[:3])
    starts = [attack._start(r, attack.trained, features) for r in recipes]
    together = attack._moved(torch.cat(starts), features.repeat(3, 1, 1, 1), recipes).chunk(3)
    for recipe, start, moved in zip(recipes, starts, together):
        torch.testing.assert_close(attack._moved(start, features, [recipe]), moved, rtol=0, atol=1e-4)


def test_the_mixture_draws_features_to_where_those_of_images_are(faces, noisy, on_noisy, monkeypatch):
    attack = on_noisy
    monkeypatch.setattr(attack, "steps", 30)
    assert attack.noise_variance == pytest.approx(0.01, rel=0.05)
    with seeded(1):
        features = noisy(faces.test.images)
        start = attack._start(optimization.RECIPES[0], attack.trained, features)
        likelihood = []
        for weight in (0.0, 1.0, 10.0):
            recipe = Recipe(start="decoder", step_size=0.03, smoothness=0.0, mixture=weight)
            moved = attack._moved(start, features, [recipe])
            seen = noisy(moved).flatten(1)
            likelihood.append(float(optimization.mixture_log_prob(seen, *attack.mixture).mean()))
    assert likelihood[0] < likelihood[1] < likelihood[2]


def test_several_draws_are_an_expectation():
    """Behind a defense that drops features, only the mean over its draws points to the image."""
    torch.manual_seed(0)
    images = torch.rand(30, 1, 8, 8)
    dropping = lambda x: 2 * x * (torch.rand_like(x) < 0.5)  # noqa: E731
    error = {}
    for draws in (1, 32):
        decoder = attacks.Decoder(image_shape=(1, 8, 8), epochs=1)
        attack = attacks.Optimization(image_shape=(1, 8, 8), decoder=decoder, steps=20, draws=draws)
        attack.fit(dropping, images, torch.zeros(30).long())
        moved = attack._moved(
            torch.full_like(images, 0.5), images, [Recipe(start="mean", step_size=0.05, smoothness=0.0)]
        )
        # E || 2 m x - z ||^2 with m = 0 or 1 is least at x = z / 2
        error[draws] = float((moved - images / 2).square().mean())
    assert error[32] < 0.7 * error[1]


def test_features_without_a_gradient_are_named():
    images = torch.rand(20, 1, 8, 8)
    attack = attacks.build("optimization", image_shape=(1, 8, 8), epochs=1, decoder="slim", seed=0)
    with pytest.raises(ValueError, match="differentiable with respect to the images, .* pass straight through"):
        attack.fit(lambda x: torch.round(4 * x.detach()), images, torch.zeros(20).long())


def test_the_critic_is_penalized_for_gradients_that_are_not_of_norm_one():
    class Linear(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight = nn.Parameter(torch.full((9,), norm / 3))

        def forward(self, images):
            return images.flatten(1) @ self.weight

    real, rebuilt = torch.rand(5, 1, 3, 3), torch.rand(5, 1, 3, 3)
    for norm in (1.0, 3.0):
        critic = Linear(norm)
        apart = (critic(rebuilt) - critic(real)).mean().item()
        loss = gan._critic_loss(critic, real, rebuilt)
        assert loss.item() == pytest.approx(apart + 10 * (norm - 1) ** 2, abs=1e-5)
        loss.backward()
        assert critic.weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 48, 48), (3, 32, 32), (1, 8, 30), (2, 3, 3)])
def test_the_critic_scores_every_image_by_itself(shape):
    critic = Critic(shape)
    images = torch.rand(4, *shape)
    assert critic(images).shape == (4,)
    torch.testing.assert_close(critic(images)[2:3], critic(images[2:3]))


def test_the_generator_starts_where_the_decoder_ended(faces, observe, monkeypatch):
    monkeypatch.setattr(
        gan, "falling", lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0)
    )
    decoder, generator = (fitted(name, faces, observe, epochs=3, gan_epochs=1) for name in ("decoder", "gan"))
    names = [name for name, _ in decoder.network.named_parameters()]
    trained, kept = generator.trained.network.state_dict(), decoder.network.state_dict()
    assert all(torch.equal(trained[name], kept[name]) for name in names)


def test_attacks_share_a_decoder_of_the_same_observer_and_of_no_other(faces, undefended_faces, monkeypatch):
    trained = []
    train = attacks.Decoder._train
    monkeypatch.setattr(attacks.Decoder, "_train", lambda self, *a: trained.append(self) or train(self, *a))
    observe = training.observer(undefended_faces[1], defenses.Bottleneck())
    first = fitted("decoder", faces, observe, epochs=2)
    generator = fitted("gan", faces, observe, epochs=2, gan_epochs=1)
    assert len(trained) == 1
    with torch.no_grad():
        generator.trained.network.mean.zero_()
    again = fitted("decoder", faces, observe, epochs=2)  # what others do to their copies is their own affair
    assert len(trained) == 1
    features = observe(faces.test.images)
    assert torch.equal(again.reconstruct(features), first.reconstruct(features))
    fitted("decoder", faces, observe, epochs=3)
    fitted("decoder", faces, observe, epochs=2, seed=1)
    fitted("decoder", faces, observe, epochs=2, loss="l1")
    fitted("decoder", faces, training.observer(undefended_faces[1], defenses.Bottleneck()), epochs=2)
    assert len(trained) == 5
    louder = [1.0]
    changing = lambda x: louder[0] * F.avg_pool2d(x, 4)  # noqa: E731
    for factor, expected in ((1.0, 6), (1.0, 6), (2.0, 7)):  # the network under attack has changed
        louder[0] = factor
        fitted("decoder", faces, changing, epochs=1)
        assert len(trained) == expected


def test_a_network_is_forgotten_with_its_observer(faces):
    import gc

    from cem_fast.attacks.decoder_cache import _decoders

    observe = lambda x: F.avg_pool2d(x, 4)  # noqa: E731
    fitted("decoder", faces, observe, epochs=1)
    held = len(_decoders)
    del observe
    gc.collect()
    assert len(_decoders) == held - 1


class Slots:
    """A callable that cannot be held weakly."""

    __slots__ = ()

    def __call__(self, images):
        return F.avg_pool2d(images, 4)


def test_any_callable_can_be_attacked(faces):
    assert fitted("decoder", faces, Slots(), epochs=1).reconstruct(Slots()(faces.test.images)).isfinite().all()
