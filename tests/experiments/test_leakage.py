"""Information in released features: what is known without an estimate."""

from __future__ import annotations

import pytest
import torch

from cem_fast import bounds
from cem_fast.config import RunConfig
from cem_fast.data import Part, Splits
from cem_fast.experiments import leakage
from cem_fast.experiments.build import build_parts


@pytest.mark.parametrize(
    "settings, num_features",
    [
        ({"bottleneck": "D8"}, 8),
        ({"bottleneck": 4}, 4 * 16),
        ({"defense": "none"}, 32 * 16),
        ({"defense": "topk_pruning", "bottleneck": "D8"}, 8),
        ({"defense": "dropout", "bottleneck": "D8"}, None),  # scales the features that it keeps
        ({"defense": "local_dp", "bottleneck": "D8"}, None),  # adds noise of its own
        ({"model": "slim_relu", "bottleneck": "D8"}, None),
    ],
)
def test_the_capacity_is_recorded_where_features_are_bounded(settings, num_features):
    part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
    splits = Splits("tiny", part, part, part, 2, ("a", "b"))
    config = RunConfig(noise_std=0.2, cem_components=1, **settings)
    model, defense, _ = build_parts(config, image_shape=(1, 16, 16), num_classes=2)
    model.eval(), defense.eval()
    loss = leakage.fitted_mixture(config, model, defense, splits)
    found = leakage.estimate(loss, model, defense, splits, seed=0)
    expected = None if num_features is None else float(bounds.channel_capacity(num_features, 0.2))
    assert found.capacity_nats == expected
