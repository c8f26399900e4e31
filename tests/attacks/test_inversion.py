"""The inversion attack: every stage lowers the error, choices are made on held-out images, features of any shape."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cem_fast import attacks, defenses, metrics, training
from cem_fast.attacks import base
from cem_fast.attacks.inversion import Inversion, attack, linear, prior
from cem_fast.attacks.inversion.neighbors import Neighbors
from cem_fast.attacks.inversion.prior import Errors, most_probable
from cem_fast.attacks.inversion.training import Lessons, Scene
from cem_fast.attacks.view import View
from cem_fast.models.split import SplitModel

SMALL = {"decoder_steps": 80, "corrector_steps": 40, "map_steps": 40, "batch_size": 48}


def error(rebuilt, images):
    return float(metrics.mse(rebuilt, images).mean())


@pytest.fixture(scope="module")
def under_noise(small_faces, untrained):
    """Features of an untrained encoder of small faces, with weak noise."""
    return training.observer(untrained.model, defenses.GaussianNoise(noise_std=0.004))


@pytest.fixture(scope="module")
def inverted(small_faces, under_noise):
    """The attack with a small budget, fitted to faces."""
    built = Inversion(image_shape=small_faces.image_shape, **SMALL)
    known = small_faces.attacker[torch.arange(0, 320, 2)]
    built.fit(under_noise, known.images, known.labels)
    return built


def test_every_stage_lowers_the_error(small_faces, under_noise, inverted):
    images = small_faces.test.images
    torch.manual_seed(0)
    messages = inverted.view.received(under_noise(images))
    with torch.no_grad():
        decoded, corrected = inverted.scene.decoded(messages), inverted._before_last(messages)
    found = [error(x.clamp(0, 1), images) for x in (decoded, corrected, inverted.reconstruct(messages[0]))]
    assert found[1] < found[0]
    assert found[2] < 0.97 * found[1]
    held_out = list(inverted.errors.values())
    assert held_out == sorted(held_out, reverse=True)


def test_more_images_are_held_out_than_are_reconstructed_for_the_choices():
    count = 5 * attack.ERRORS + 10
    images = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    built = Inversion(image_shape=(1, 4, 4), decoder_steps=30, corrector_steps=10, map_steps=2, batch_size=16)
    built.fit(lambda x: x + 0.01 * torch.randn_like(x), images, torch.zeros(count, dtype=torch.int64))
    assert len(built.errors) == 4
    assert error(built.reconstruct(images[:1100]), images[:1100]) < 0.001


@pytest.mark.parametrize(
    "shape, asked, images", [((3, 64, 64), 96, 54), ((3, 224, 224), 96, 48), ((3, 224, 224), 7, 7)]
)
def test_training_steps_on_large_images_take_fewer_of_them(shape, asked, images):
    assert f" {images} images each" in Inversion(image_shape=shape, batch_size=asked).budget


@pytest.mark.parametrize("budget, images", [("quick", 48), ("standard", 96)])
def test_a_budget_names_the_images_of_a_training_step(budget, images, small_faces, under_noise, monkeypatch):
    seen, batch = [], Lessons.batch

    def counting(self):
        found = batch(self)
        seen.append(len(found[0]))
        return found

    monkeypatch.setattr(Lessons, "batch", counting)
    steps = {"decoder_steps": 1, "corrector_steps": 1, "map_steps": 1}
    built = attacks.build("inversion", image_shape=small_faces.image_shape, budget=budget, **steps)
    known = small_faces.attacker[torch.arange(130)]
    built.fit(under_noise, known.images, known.labels)
    assert set(seen) == {images}


def test_the_networks_have_not_learned_from_images_on_which_they_are_judged(small_faces, under_noise, monkeypatch):
    learned, judged, looks = [], [], []
    batch, choose, mean = Lessons.batch, Inversion._choose, Neighbors.__init__
    monkeypatch.setattr(Lessons, "batch", lambda self: learned.append(self.images) or batch(self))
    monkeypatch.setattr(Neighbors, "__init__", lambda self, view, x: looks.append(x) or mean(self, view, x))

    def spied(self, images):
        judged.append((images, list(learned), list(looks)))
        choose(self, images)

    monkeypatch.setattr(Inversion, "_choose", spied)
    known = small_faces.attacker[torch.arange(0, 320, 4)]
    built = Inversion(image_shape=small_faces.image_shape, decoder_steps=2, corrector_steps=2, map_steps=2)
    built.fit(under_noise, known.images, known.labels)
    ((images, before, neighbors),) = judged
    assert len(images) == len(known) // 5
    for others in (*before, *neighbors):
        assert len(others) == len(known) - len(images)
        assert torch.cdist(images.flatten(1), others.flatten(1)).min() > 0.01
    assert len(learned[-1]) == len(looks[-1]) == len(known)


def test_test_images_among_the_attackers_would_show(small_faces, under_noise):
    """An attacker who is given the victims by mistake rebuilds them too well: what the protocols of experiments rule out."""
    victims, labels = small_faces.test.images[:40], torch.zeros(40).long()
    errors = []
    for images in (small_faces.attacker.images[:40], victims):
        built = attacks.build("inversion", image_shape=small_faces.image_shape, stages=1, decoder_steps=60)
        built.fit(under_noise, images, labels)
        torch.manual_seed(0)
        errors.append(error(built.reconstruct(under_noise(victims)), victims))
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("shape", [(4, 4), (16,)])
def test_tokens_and_vectors_are_inverted(shape):
    torch.manual_seed(0)
    images = torch.rand(120, 1, 2, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    mix = torch.randn(64, 16) / 4
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16, bias=False), nn.Tanh(), nn.Unflatten(1, shape))
    encoder[1].weight.data = mix.T.contiguous()
    observe = training.observer(SplitModel(encoder, nn.Flatten()), defenses.GaussianNoise(noise_std=0.05))
    built = Inversion(image_shape=(1, 8, 8), decoder_steps=60, corrector_steps=20, map_steps=30)
    built.fit(observe, images[:100], torch.zeros(100).long())
    assert error(built.reconstruct(observe(images[100:])), images[100:]) < 0.3 * float(images.var())


def test_without_gradients_the_decoder_stays():
    torch.manual_seed(0)
    images = torch.rand(60, 1, 4, 4)
    observe = lambda x: (20 * x).round().flatten(1)  # noqa: E731
    built = Inversion(image_shape=(1, 4, 4), decoder_steps=60, corrector_steps=2, map_steps=2)
    with pytest.warns(UserWarning, match="no gradient: the inversion attack ends with its decoder"):
        built.fit(observe, images[:50], torch.zeros(50).long())
    assert list(built.errors) == ["decoder", "with kernel ridge"]
    assert error(built.reconstruct(observe(images[50:])), images[50:]) < 0.8 * float(images.var())


def test_the_posterior_mean_weighs_images_by_their_likelihood():
    torch.manual_seed(0)
    images = torch.rand(10, 1, 1, 2)
    observe = training.observer(SplitModel(nn.Flatten(), nn.Flatten()), defenses.GaussianNoise(noise_std=0.3))
    neighbors = Neighbors(View(observe, images), images)
    neighbors.temperature = 1.0
    seen = torch.rand(3, 2)
    density = torch.distributions.Normal(images.flatten(1), 0.3).log_prob(seen[:, None]).sum(2)
    expected = torch.softmax(density, 1) @ images.flatten(1)
    torch.testing.assert_close(neighbors(seen[None]).flatten(1), expected)
    own = torch.tensor([0, 1, 2])
    density[own, own] = -torch.inf
    expected = torch.softmax(density, 1) @ images.flatten(1)
    torch.testing.assert_close(neighbors(seen[None], own).flatten(1), expected)


def test_the_most_probable_image_is_that_of_bayes_rule(monkeypatch):
    """Linear features and Gaussian errors: the posterior mean in closed form."""
    torch.manual_seed(0)
    spread, noise, steps = torch.randn(4, 4), 0.3, 180
    errors = Errors((torch.randn(20000, 4) @ spread).view(-1, 1, 2, 2))
    root = errors.colored(torch.eye(4).view(4, 1, 2, 2)).flatten(1)
    torch.testing.assert_close(root @ root, spread.T @ spread, rtol=0.1, atol=0.1)
    images, start = torch.rand(5, 1, 2, 2), torch.rand(5, 1, 2, 2)
    observe = training.observer(SplitModel(nn.Flatten(), nn.Flatten()), defenses.GaussianNoise(noise_std=noise))
    view, seen = View(observe, images, releases=2), torch.rand(2, 5, 4)
    monkeypatch.setattr(prior, "TOLERANCE", 1e-9)
    _, found = most_probable(view, seen, start, errors, weights=[9.0, 3.0], steps=steps)
    precision = 2 * torch.eye(4) / noise**2 + 3 * torch.linalg.inv(root @ root)
    move = torch.linalg.solve(precision, (2 * (seen.mean(0) - start.flatten(1)) / noise**2).T).T
    torch.testing.assert_close(found.flatten(1), start.flatten(1) + move, rtol=0, atol=1e-4)


def test_the_search_with_a_further_weight_is_short(monkeypatch):
    view, start = View(lambda x: x.flatten(1), torch.rand(20, 1, 2, 2)), torch.rand(5, 1, 2, 2)
    amounts = []
    monkeypatch.setattr(prior, "lbfgs", lambda function, x, *, steps, tolerance: amounts.append(steps) or x)
    for steps in (120, 30, 7):
        most_probable(view, view.messages(start), start, Errors(start), weights=[2.0, 1.0, 0.5], steps=steps)
    assert amounts == [120, 20, 20, 30, 10, 10, 7, 7, 7]


@pytest.mark.parametrize("side, judges", [(8, 40), (48, 32)])
def test_the_last_stage_is_chosen_on_fewer_images_if_they_are_large(side, judges, monkeypatch):
    chosen = []
    monkeypatch.setattr(Inversion, "_choose_prior", lambda self, images, *_: chosen.append(len(images)))
    images = torch.rand(200, 1, side, side)
    built = Inversion(image_shape=(1, side, side), decoder_steps=1, corrector_steps=1, map_steps=1)
    built.fit(lambda x: nn.functional.avg_pool2d(x, 4), images, torch.zeros(200).long())
    assert chosen == [judges]


def test_decoder_starts_from_a_linear_reconstruction(small_faces, under_noise):
    known, images = small_faces.attacker, small_faces.test.images
    built = Inversion(image_shape=small_faces.image_shape, decoder_steps=1, stages=1)
    built.fit(under_noise, known.images, known.labels)
    mean = error(known.images.mean(0).expand_as(images), images)
    assert built.errors["decoder"] < 0.1 * mean


def test_linear_reconstruction_is_left_out_for_many_features(small_faces, under_noise, monkeypatch):
    monkeypatch.setattr(linear, "MOST", 100)
    known = small_faces.attacker[torch.arange(0, 320, 8)]
    built = Inversion(image_shape=small_faces.image_shape, decoder_steps=2, corrector_steps=2, map_steps=2)
    built.fit(under_noise, known.images, known.labels)
    assert built.scene.linear is None
    assert built.reconstruct(under_noise(known.images)).isfinite().all()


def test_linear_reconstruction_errs_on_the_attackers_images_as_on_others(small_faces, under_noise):
    torch.manual_seed(0)
    view = View(under_noise, small_faces.attacker.images)
    built = Scene(view, small_faces.attacker.images, mirror=True)
    own, other = (
        error(built.mean + built.linear(built.seen(images)), images)
        for images in (small_faces.attacker.images, small_faces.test.images)
    )
    assert other < 1.3 * own


def test_memory_is_bounded_by_chunks(small_faces, under_noise, inverted, monkeypatch):
    rows = []
    once = Inversion._reconstructed
    monkeypatch.setattr(Inversion, "_reconstructed", lambda self, z: rows.append(z.shape[1]) or once(self, z))
    monkeypatch.setattr(base, "MEMORY", 7 * base.PER_VALUE * math.prod(small_faces.image_shape))
    seen = under_noise(small_faces.test.images[:20])
    assert len(inverted.reconstruct(seen)) == 20
    assert rows == [7, 7, 6]


def test_progress_ends_with_the_fit(small_faces, under_noise):
    built, steps = Inversion(image_shape=small_faces.image_shape, decoder_steps=5, corrector_steps=3, map_steps=1), []
    built.on_step = lambda done, total: steps.append((done, total))
    built.fit(under_noise, small_faces.attacker.images[:20], torch.zeros(20).long())
    assert [done for done, _ in steps] == list(range(1, len(steps) + 1))
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.long
def test_more_budget_brings_little(small_faces, untrained):
    observe = training.observer(untrained.model, defenses.GaussianNoise(noise_std=0.05))
    known, images, errors = small_faces.attacker, small_faces.test.images, []
    built = attacks.build("inversion", image_shape=small_faces.image_shape, seed=0)
    for each in (built.half_budget(), built):
        each.fit(observe, known.images, known.labels)
        torch.manual_seed(0)
        errors.append(error(each.reconstruct(observe(images)), images))
    assert errors[0] < 1.03 * errors[1]


def test_errors_of_low_rank_keep_an_isotropic_part():
    torch.manual_seed(0)
    errors = torch.randn(50, 1, 1, 1) * torch.ones(1, 1, 3, 3)
    colored = Errors(errors).colored(torch.randn(5000, 1, 3, 3)).flatten(1)
    rest = colored - colored.mean(1, keepdim=True)
    assert float(rest.square().mean()) == pytest.approx(prior.FLOOR * float(errors.square().mean()) * 8 / 9, rel=0.1)
