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
