"""Attacks on a trained model."""

from __future__ import annotations

from dataclasses import replace

import torch

from cem_fast import defenses
from cem_fast.config import RunConfig
from cem_fast.data import Part
from cem_fast.experiments.attack import attack_model, choose_pictures, infer


def test_pictures_are_one_per_class_and_do_not_depend_on_any_result():
    labels = torch.arange(40).repeat_interleave(2)
    part = Part(torch.rand(80, 1, 4, 4), labels, labels)
    chosen = choose_pictures(part)
    assert len(chosen) == 6
    assert len(labels[chosen].unique()) == 6
    few = Part(torch.rand(9, 1, 4, 4), torch.tensor([0, 1, 2] * 3), torch.arange(9))
    assert choose_pictures(few).tolist() == list(range(6))


def test_people_and_labels_are_read_from_features_but_not_from_noise(undefended_faces):
    splits, model = undefended_faces
    bright = {part: (getattr(splits, part).images.mean((1, 2, 3)) > 0.45).long() for part in ("train", "test")}
    train, test = (replace(getattr(splits, part), attributes={"bright": bright[part]}) for part in bright)
    splits = replace(splits, train=train, test=test, attacker=train)
    shares = {}
    for noise in (0.0, 1000.0):
        defense = defenses.build("bottleneck", noise_std=noise).eval()
        found = infer(model, defense, splits, seed=0)
        assert list(found) == ["label", "attribute bright", "identity"]
        assert found["label"].chance == found["identity"].chance == 1 / 40
        shares[noise] = {name: rate.share for name, rate in found.items()}
    assert shares[0.0]["label"] > 0.8
    assert shares[0.0]["identity"] > 0.6
    assert shares[0.0]["attribute bright"] > 0.9
    assert shares[1000.0]["label"] < 0.15
    assert shares[1000.0]["identity"] < 0.15


def test_the_progress_of_an_attack_is_in_one_unit(undefended_faces):
    splits, model = undefended_faces
    few = replace(splits, attacker=splits.attacker[torch.arange(0, 320, 10)])
    seen = []
    config = RunConfig(attack_epochs=1)
    attack_model("decoder", model, defenses.Bottleneck(), few, config, on_stage=lambda *step: seen.append(step))
    assert seen[0][1] == 0
    assert seen[-1][1] == seen[-1][2]
    assert len({(name, total) for name, _, total in seen}) == 1
