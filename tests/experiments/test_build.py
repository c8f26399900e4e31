"""Parts of a run, built from its settings."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cem_fast import attacks
from cem_fast.config import RunConfig
from cem_fast.experiments.build import build_attack, build_loss, build_parts, load_data


def test_runs_of_one_fold_share_their_images(tiny_images):
    config = RunConfig(data=str(tiny_images), image_size=16)
    splits = load_data(config)
    assert load_data(replace(config, seed=3, epochs=2)) is splits
    assert load_data(replace(config, fold=2)) is not splits
    assert load_data(replace(config, protocol="train")).protocol == "train"


def test_the_loss_has_the_settings_of_cem():
    config = RunConfig(cem_components=3, cem_covariance="diag")
    loss = build_loss(config, num_classes=4)
    assert (loss.mixture.num_classes, loss.mixture.num_components) == (4, 3)
    assert build_loss(RunConfig(cem_by_class=False, cem_components=1), num_classes=4).mixture.num_classes == 1
    assert build_loss(RunConfig(noise_std=0.0), num_classes=4) is None


def test_only_defenses_that_use_a_bottleneck_get_one():
    shape = {"image_shape": (1, 16, 16), "num_classes": 3}
    with_bottleneck, _, _ = build_parts(RunConfig(defense="noise", bottleneck=4), **shape)
    without, _, _ = build_parts(RunConfig(defense="none", noise_std=0.0, bottleneck=4), **shape)
    assert len(list(with_bottleneck.encoder)) == len(list(without.encoder)) + 1


@pytest.mark.parametrize("name", attacks.names())
def test_every_attack_is_built_from_the_settings(name, tiny_images):
    attack = build_attack(name, RunConfig(attack_epochs=7), load_data(RunConfig(data=str(tiny_images), image_size=16)))
    assert attack.name == name
