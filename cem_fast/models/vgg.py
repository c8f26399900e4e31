"""VGG networks cut between two of their convolutional stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cem_fast.models.assembly import divide, finish
from cem_fast.models.split import SplitModel


def stage(channels_in: int, channels_out: int, pool: bool, normalize: bool) -> nn.Sequential:
    """One convolutional stage: convolution, batch normalization if any, max-pooling if any, ReLU.

    Pooling comes before the activation: a maximum commutes with a monotone function, and there is a quarter as much to activate.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels_in, channels_out, 3, padding=1)]
    if normalize:
        layers.append(nn.BatchNorm2d(channels_out))
    if pool:
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.ReLU())


def build(
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    cut: int,
    bottleneck: int | str,
    features: str,
    widths: Sequence[int],
    pools: Sequence[int],
    hidden: Sequence[int],
    normalize: bool = True,
) -> SplitModel:
    """A VGG network whose first ``cut`` stages run on the device.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        num_classes: number of classes.
        cut: convolutional stages on the device, 1 to ``len(widths) - 1``.
        bottleneck: number of channels or ``[noRELU_][Kk]CcSs``; 0 releases the last stage's own features.
        features: activation of the released features, ``sigmoid`` or ``relu``.
        widths: output channels of every stage.
        pools: the stages (counted from 1) that halve the image.
        hidden: widths of the fully connected layers between the last stage and the logits.
        normalize: whether the stages normalize their batches.

    Returns:
        The network, cut.

    Raises:
        ValueError: ``cut`` or ``bottleneck`` is out of range, or the images are too small to be halved that often.

    Source:
        Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015.
    """
    channels, height, width = image_shape
    smallest = 2 ** len(pools)
    if min(height, width) < smallest:
        raise ValueError(f"images must be at least {smallest}x{smallest} pixels for this network, got {height}x{width}")
    stages = []
    for index, size in enumerate(widths, start=1):
        stages.append(stage(channels, size, index in pools, normalize))
        channels = size
    encoder, decoder = divide(
        stages, widths, image_shape=image_shape, cut=cut, bottleneck=bottleneck, features=features
    )
    inputs = widths[-1] * (height // smallest) * (width // smallest)
    head: list[nn.Module] = [nn.Flatten()]
    for size in hidden:
        head += [nn.Dropout(), nn.Linear(inputs, size), nn.ReLU()]
        inputs = size
    head.append(nn.Linear(inputs, num_classes))
    return finish(encoder, [*decoder, *head])
