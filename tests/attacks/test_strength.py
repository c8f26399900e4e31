"""Attacks on a trained network: each beats its controls and the attack that it starts from."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from support.attacking import fitted

from cem_fast import attacks, data, metrics
from cem_fast.mixture import GaussianMixture


@pytest.fixture(scope="module")
def error(faces, observe):
    """Error of an attack on the undefended network, cached for this file."""

    @cache
    def found(name: str) -> float:
        attack = fitted(name, faces, observe)
        return float(metrics.mse(attack.reconstruct(observe(faces.test.images)), faces.test.images).mean())

    return found


@pytest.mark.parametrize("name", attacks.names())
def test_every_attack_on_an_undefended_encoder_beats_the_class_mean(faces, error, name):
    assert error(name) < data.baselines(faces)["class_mean_mse"]


@pytest.mark.parametrize("name", [name for name in attacks.names() if name != "nearest"])
def test_every_attack_beats_the_nearest_image(error, name):
    assert error(name) < 0.8 * error("nearest")


def test_the_ensemble_is_better_than_both_of_its_members(error):
    assert error("ensemble") < min(error("decoder"), error("ridge"))


def test_optimization_and_gan_improve_on_the_decoder_that_they_start_from(error):
    assert error("optimization") < 0.9 * error("decoder")
    assert error("gan") < 1.02 * error("decoder")


def test_choices_are_made_on_held_out_images(faces, observe, monkeypatch):
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
        assert counts == {256, 320}  # without the held-out fifth, then with it
        assert rows == ([256, 320] if name == "optimization" else [])
        for decoder, features in asked:  # during the fit, only the decoder without the held-out fifth reconstructs
            learned = next(observe(images) for who, images in seen if who is decoder)
            assert len(learned) == 256
            assert torch.cdist(features.flatten(1), learned.flatten(1)).min() > 0.01
        assert asked
