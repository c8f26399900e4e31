"""Networks: published sizes, bounded features, and cutting a user's own network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cem_fast import models
from cem_fast.attacks.networks import ResNormDecoder
from cem_fast.split import SplitModel


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_parameter_counts():
    model = models.build("vgg11", image_shape=(3, 32, 32), num_classes=10, cut=2, bottleneck=8)
    assert model.encoder(torch.rand(2, 3, 32, 32)).shape == (2, 8, 8, 8)
    assert size(model.encoder) == 85_256
    assert round(size(model) / 1e6, 3) == 9.775
    assert size(ResNormDecoder((8, 8, 8), torch.rand(2, 3, 32, 32))) == 711_539


@pytest.mark.parametrize("name", models.names())
@pytest.mark.parametrize("bottleneck", [0, 8])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_features_are_bounded_and_logits_follow_from_them(name, cut, bottleneck):
    model = models.build(name, image_shape=(1, 48, 48), num_classes=5, cut=cut, bottleneck=bottleneck).eval()
    with torch.no_grad():
        model.encoder[0][0].weight *= 1e3  # however large the weights are
        features = model.encoder(torch.rand(2, 1, 48, 48))
        assert 0 <= features.min() < features.max() <= 1
        logits = model.decoder(features)
    assert logits.shape == (2, 5)
    if bottleneck:
        assert features.shape[1] == bottleneck


@pytest.mark.parametrize(
    "change, message",
    [
        ({"name": "vgg12"}, "unknown model 'vgg12': .*the nearest is 'vgg11'"),
        ({"cut": 0}, "cut must be between 1 and 3 stages, got 0"),
        ({"cut": 4}, "cut must be between 1 and 3 stages, got 4"),
        ({"bottleneck": -1}, "bottleneck must be a number of channels or 0, got -1"),
        ({"image_shape": (1, 8, 8)}, "at least 16x16 pixels for this network, got 8x8"),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
    ],
)
def test_bad_requests(change, message):
    settings = {"name": "slim", "image_shape": (1, 32, 32), "num_classes": 10, "cut": 2, "bottleneck": 8, **change}
    with pytest.raises(ValueError, match=message):
        models.build(settings.pop("name"), **settings)


def own_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 3)
    )


def test_cutting_a_network_changes_nothing_it_computes():
    network, images = own_network(), torch.rand(4, 1, 8, 8)
    for cut in range(1, len(network)):
        model = SplitModel.from_sequential(network, cut)
        assert torch.equal(model(images), network(images))
        assert len(model.encoder) == cut


def test_bottleneck_in_a_users_network():
    model = SplitModel.from_sequential(own_network(), cut=2, bottleneck=4)
    features = model.encoder(torch.rand(4, 1, 8, 8))
    assert features.shape == (4, 4, 8, 8)
    assert 0 < features.min() < features.max() < 1
    assert model(torch.rand(4, 1, 8, 8)).shape == (4, 3)


def test_bad_cuts():
    with pytest.raises(TypeError, match="network must be an nn.Sequential, got Linear"):
        SplitModel.from_sequential(nn.Linear(2, 2), 1)
    with pytest.raises(ValueError, match="cut must be between 1 and 4 for 5 modules, got 5"):
        SplitModel.from_sequential(own_network(), 5)
    with pytest.raises(ValueError, match="bottleneck must be a number of channels or 0, got -2"):
        SplitModel.from_sequential(own_network(), 2, -2)
    with pytest.raises(ValueError, match="needs a Conv2d before the cut, got none in the first 1 modules"):
        SplitModel.from_sequential(nn.Sequential(nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)), 1, 4)
    with pytest.raises(ValueError, match=r"needs feature maps \[N, C, H, W\] at the cut, got a Flatten after"):
        SplitModel.from_sequential(own_network(), 4, 2)


@pytest.mark.parametrize(
    "last, channels",
    [
        (nn.ConvTranspose2d(8, 3, 2, stride=2), 3),
        (nn.PixelShuffle(2), 2),
        (nn.PixelUnshuffle(2), 32),
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), 8),
    ],
)
def test_a_bottleneck_fits_whatever_the_maps_end_in(last, channels):
    network = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), last, nn.Flatten(), nn.LazyLinear(3))
    model = SplitModel.from_sequential(network, cut=2, bottleneck=4)
    assert model.encoder[2][0].in_channels == channels
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 3)
