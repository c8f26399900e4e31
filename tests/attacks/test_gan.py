"""The gan attack: gradient penalty and warm start."""

from __future__ import annotations

import pytest
import torch
from support.attacking import fitted
from torch import nn

from cem_fast.attacks import gan


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


def test_the_generator_starts_from_the_decoder(faces, observe, monkeypatch):
    monkeypatch.setattr(
        gan, "falling", lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0)
    )
    decoder, generator = (fitted(name, faces, observe, epochs=3, gan_epochs=1) for name in ("decoder", "gan"))
    names = [name for name, _ in decoder.network.named_parameters()]
    trained, kept = generator.trained.network.state_dict(), decoder.network.state_dict()
    assert all(torch.equal(trained[name], kept[name]) for name in names)
