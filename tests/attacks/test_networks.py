"""Networks of the attacks: shapes, normalization, and one score per image."""

from __future__ import annotations

import pytest
import torch

from cem_fast.attacks.decoder import DECODERS
from cem_fast.attacks.networks import Critic


@pytest.mark.parametrize("network", DECODERS.values(), ids=DECODERS)
@pytest.mark.parametrize(
    "feature, image",
    [
        ((8, 8, 8), (3, 32, 32)),
        ((2, 12, 12), (1, 48, 48)),
        ((2, 4, 4), (1, 18, 18)),
        ((2, 8, 8), (1, 8, 8)),
        ((2, 4, 10), (1, 8, 20)),
        ((2, 5, 3), (1, 20, 11)),
        ((4, 1, 1), (1, 8, 30)),
    ],
)
def test_decoders_fit_any_ratio_of_sizes(network, feature, image):
    decoder = network(feature, torch.rand(4, *image))
    assert decoder(torch.randn(2, *feature)).shape == (2, *image)


def test_plain_has_no_batch_normalization():
    kinds = {
        name: {type(m) for m in DECODERS[name]((8, 8, 8), torch.rand(2, 3, 32, 32)).modules()} for name in DECODERS
    }
    assert torch.nn.BatchNorm2d in kinds["conv_norm"]
    assert torch.nn.BatchNorm2d not in kinds["plain"]


@pytest.mark.parametrize("shape", [(1, 48, 48), (3, 32, 32), (1, 8, 30), (2, 3, 3)])
def test_the_critic_scores_every_image_by_itself(shape):
    critic = Critic(shape)
    images = torch.rand(4, *shape)
    assert critic(images).shape == (4,)
    torch.testing.assert_close(critic(images)[2:3], critic(images[2:3]))
