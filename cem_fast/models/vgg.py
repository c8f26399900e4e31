"""VGG networks cut between two of their convolutional stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cem_fast.models.bottleneck import Compress, Expand
from cem_fast.split import SplitModel


def stage(channels_in: int, channels_out: int, pool: bool, activation: nn.Module) -> nn.Sequential:
    """One convolutional stage: convolution, batch normalization, max-pooling if any, activation.

    Pooling comes before the activation: a maximum commutes with a monotone function, and there is a quarter as much to activate.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out)]
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, activation)


def build(
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    cut: int,
    bottleneck: int,
    widths: Sequence[int],
    pools: Sequence[int],
    hidden: Sequence[int],
) -> SplitModel:
    """A VGG network whose first ``cut`` stages run on the device and whose features are bounded by a Sigmoid.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        num_classes: number of classes.
        cut: convolutional stages on the device, 1 to ``len(widths) - 1``.
        bottleneck: channels of the released features; 0 releases the last stage's own.
        widths: output channels of every stage.
        pools: the stages (counted from 1) that halve the image.
        hidden: widths of the fully connected layers between the last stage and the logits.

    Returns:
        The network, cut.

    Raises:
        ValueError: ``cut`` or ``bottleneck`` is out of range, or the images are too small to be halved that often.
    """
    channels, height, width = image_shape
    if not 1 <= cut < len(widths):
        raise ValueError(f"cut must be between 1 and {len(widths) - 1} stages, got {cut}")
    if bottleneck < 0:
        raise ValueError(f"bottleneck must be a number of channels or 0, got {bottleneck}")
    smallest = 2 ** len(pools)
    if min(height, width) < smallest:
        raise ValueError(f"images must be at least {smallest}x{smallest} pixels for this network, got {height}x{width}")
    stages = []
    for index, size in enumerate(widths, start=1):
        released = index == cut and not bottleneck
        stages.append(stage(channels, size, index in pools, nn.Sigmoid() if released else nn.ReLU()))
        channels = size
    encoder, decoder = stages[:cut], stages[cut:]
    if bottleneck:
        encoder.append(Compress(widths[cut - 1], bottleneck))
        decoder.insert(0, Expand(bottleneck, widths[cut - 1]))
    features = widths[-1] * (height // smallest) * (width // smallest)
    head: list[nn.Module] = [nn.Flatten()]
    for size in hidden:
        head += [nn.Dropout(), nn.Linear(features, size), nn.ReLU()]
        features = size
    head.append(nn.Linear(features, num_classes))
    model = SplitModel(nn.Sequential(*encoder), nn.Sequential(*decoder, *head))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model.to(memory_format=torch.channels_last)
