"""Gains at the same noise and at equal accuracy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.made_up import measured

from cem_fast.experiments import gains
from cem_fast.experiments.results import make_rows


def test_cem_is_compared_to_the_run_that_differs_in_nothing_else(finished):
    (pair,) = finished.results.pairs
    on = [r for r in finished.results.runs if r.cem]
    off = [r for r in finished.results.runs if not r.cem and r.config.noise_std == 0.1]
    for a, b in zip(on, off, strict=True):
        assert replace(a.config, cem_weight=0.0) == b.config
    strongest = [np.mean([min(a.mse for a in r.attacks.values()) for r in runs]) for runs in (off, on)]
    assert pair.gain == pytest.approx(strongest[1] / strongest[0] - 1, rel=1e-5)


def test_frontier_compares_at_equal_accuracy():
    curve = [
        measured("noise", s, 0.0, a, m) for s, a, m in ((0.1, 0.95, 0.010), (0.2, 0.90, 0.020), (0.4, 0.80, 0.030))
    ]
    on = measured("noise", 0.1, 1.0, 0.85, 0.050)
    (entry,) = gains.frontier([*curve, on])
    assert entry.accuracy == pytest.approx(0.85)
    assert entry.gain == pytest.approx(0.050 / 0.025 - 1)
    assert entry.interval[0] < entry.gain < entry.interval[1]
    (worse,) = gains.frontier([*curve, measured("noise", 0.1, 1.0, 0.85, 0.020)])
    assert worse.gain == pytest.approx(0.020 / 0.025 - 1)


def test_frontier_takes_the_best_plain_noise_and_stays_inside_the_sweep():
    # a level that is both less accurate and easier to invert than another is no competitor
    curve = [
        measured("noise", s, 0.0, a, m) for s, a, m in ((0.1, 0.95, 0.010), (0.2, 0.95, 0.020), (0.4, 0.80, 0.015))
    ]
    (entry,) = gains.frontier([*curve, measured("noise", 0.1, 1.0, 0.90, 0.020)])
    assert entry.gain == pytest.approx(0.0, abs=1e-9)
    (above,) = gains.frontier([*curve, measured("noise", 0.1, 1.0, 0.99, 0.030)])
    assert above.gain == pytest.approx(0.5)
    assert gains.frontier([*curve, measured("noise", 0.1, 1.0, 0.50, 0.030)]) == []
    assert gains.frontier([curve[0], measured("noise", 0.1, 1.0, 0.90, 0.020)]) == []


def test_pairs_keep_noise_levels_and_weights_apart():
    runs = [
        measured("noise", s, w, 0.9, 0.01 * (1 + w) * s, seed)
        for s in (0.1, 0.2)
        for w in (0.0, 0.5, 1.0)
        for seed in (0, 1)
    ]
    found = {(p.noise_std, p.cem_weight): p.gain for p in gains.pairs(runs)}
    assert found == pytest.approx({(0.1, 0.5): 0.5, (0.1, 1.0): 1.0, (0.2, 0.5): 0.5, (0.2, 1.0): 1.0})


def test_strengths_and_settings_of_cem_are_kept_apart_and_named():
    cells = [(0.3, 5, 0.01, 0.02), (0.6, 5, 0.02, 0.06), (0.6, 1, 0.02, 0.08)]
    runs = []
    for strength, components, off, on in cells:
        runs.append(measured("adversarial", 0.1, 0.0, 0.9, off, adversary_weight=strength))
        runs.append(measured("adversarial", 0.1, 0.5, 0.9, on, adversary_weight=strength, cem_components=components))
    found = gains.pairs(runs)
    assert [(p.run, p.gain) for p in found] == [
        (1, pytest.approx(1)),
        (3, pytest.approx(2)),
        (5, pytest.approx(3)),
    ]
    rows = make_rows(runs)
    assert [row.name for row in rows] == [
        "adversarial, adversary_weight = 0.3",
        "adversarial, adversary_weight = 0.6",
        "adversarial + CEM, K = 5, adversary_weight = 0.3",
        "adversarial + CEM, K = 5, adversary_weight = 0.6",
        "adversarial + CEM, K = 1, adversary_weight = 0.6",
    ]
    # plain noise has neither strength nor settings of CEM: it is held against every cell
    curve = [measured("noise", s, 0.0, a, m) for s, a, m in ((0.1, 0.95, 0.01), (0.4, 0.80, 0.03))]
    found = gains.frontier([*runs, *curve])
    assert [entry.run for entry in found] == [0, 1, 2, 3, 5]
    assert sorted(entry.name for entry in found) == sorted(row.name for row in rows)
    assert {entry.baseline for entry in found} == {(6, 7)}


def test_every_cell_is_compared_to_plain_noise_on_the_papers_bottleneck():
    curve = [
        measured("bottleneck", 0.0, 0.0, 0.97, 0.005, bottleneck="C8S1"),
        measured("noise", 0.1, 0.0, 0.95, 0.010, learning_rate=0.02),
        measured("noise", 0.4, 0.0, 0.85, 0.030, cut=1, epochs=7),
    ]
    others = [
        measured("noise", 0.1, 0.0, 0.95, 0.020, bottleneck="D64"),
        measured("noise", 0.1, 0.5, 0.90, 0.030, bottleneck="D64"),
        measured("dropout", 0.1, 0.0, 0.90, 0.020),
        measured("noise", 0.1, 0.0, 0.95, 0.010, bottleneck=4),
    ]
    elsewhere = [
        measured("noise", 0.1, 0.0, 0.95, 0.020, bottleneck="D64", **own)
        for own in ({"model": "vgg11"}, {"image_size": 24}, {"attack_epochs": 9}, {"data": "digits"})
    ]
    found = gains.frontier([*curve, *others, *elsewhere])
    assert [entry.run for entry in found] == [3, 4, 5, 6]
    assert [entry.gain for entry in found] == pytest.approx([1.0, 0.5, 0.0, 0.0], abs=1e-9)
    assert [entry.name for entry in found] == [
        "noise, σ = 0.1, bottleneck = D64, cut = 2, image_size = None, model = slim, "
        "epochs = 40, learning_rate = 0.05, attack_epochs = None",
        "noise + CEM, bottleneck = D64, cut = 2, model = slim",
        "dropout, bottleneck = 8, cut = 2, model = slim",
        "noise, σ = 0.1, bottleneck = 4, cut = 2, image_size = None, model = slim, "
        "epochs = 40, learning_rate = 0.05, attack_epochs = None",
    ]
    assert {entry.baseline for entry in found} == {(0, 1, 2)}


def test_resamples_keep_images_with_accuracies_and_with_errors_apart():
    both = np.ones((2, 4, 30))
    apart = both.copy()
    apart[:, 1, :4] = 0  # units that were attacked only
    apart[:, 3, 4:] = 0  # units that were classified only
    draws = gains._resampled(apart)
    assert (draws[:, :4].sum(1) == 4).all()
    assert (draws[:, 4:].sum(1) == 26).all()
    assert draws[:, :4].std() > 0
    joint = gains._resampled(both)
    assert (joint.sum(1) == 30).all()
    assert joint[:, :4].sum(1).std() > 0
