"""The ensemble's weights, pixel by pixel."""

from __future__ import annotations

import torch
from torch import Tensor


def test_weights_favor_the_better_member_in_every_region():
    torch.manual_seed(0)
    truth = torch.rand(1, 60, 100, dtype=torch.float64)
    decoder, ridge = truth.clone(), truth.clone()
    decoder[..., :50] += 0.3 * torch.randn(1, 60, 50)
    ridge[..., 50:] += 0.3 * torch.randn(1, 60, 50)
    weights = ensemble_weights(decoder - ridge, truth - ridge)
    assert weights[:50].max() < 0.1
    assert weights[50:].min() > 0.9
    # Equal members: shrinkage brings all weights close to 1/2.
    decoder, ridge = (truth + 0.3 * torch.randn(1, 60, 100) for _ in range(2))
    weights = ensemble_weights(decoder - ridge, truth - ridge)
    assert (weights - 0.5).abs().max() < 0.1
    assert ensemble_weights(torch.zeros(1, 60, 100), torch.zeros(1, 60, 100)).isfinite().all()


def ensemble_weights(apart: Tensor, wanted: Tensor) -> Tensor:
    from cem_fast.attacks.ensemble import _weights

    return _weights(apart.double(), wanted.double())
