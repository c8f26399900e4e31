"""VGG networks, split between two of their convolutional stages."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from cem_fast.models.assembly import divide, finish
from cem_fast.models.split import SplitModel


def stage(channels_in: int, channels_out: int, pool: bool, normalize: bool) -> nn.Sequential:
    """One convolutional stage: convolution, optional batch normalization, optional max-pooling, ReLU.

    Pooling precedes the activation: a maximum commutes with a monotone function, and leaves a quarter of the values to activate.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        pool: whether to halve the sides.
        normalize: whether to normalize batches.

    Example:
        >>> import torch
        >>> from cem_fast.models.vgg import stage
        >>> stage(3, 8, pool=True, normalize=True)(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
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
        cut: number of convolutional stages on the device, 1 to ``len(widths) - 1``.
        bottleneck: number of channels, or a notation such as ``K5C8S2`` or ``D64``; 0 releases the features of the device's last stage.
        features: activation of the released features, ``sigmoid`` or ``relu``.
        widths: output channels of every stage.
        pools: the stages (counted from 1) that halve the image.
        hidden: widths of the fully connected layers between the last stage and the logits.
        normalize: whether the stages have batch normalization.

    Returns:
        The split network.

    Raises:
        ValueError: ``cut`` or ``bottleneck`` is out of range, or the images are too small for the poolings.

    Source:
        Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015.

    Example:
        >>> import torch
        >>> from cem_fast.models import vgg
        >>> shape = {"image_shape": (1, 8, 8), "num_classes": 5, "widths": (4, 8), "pools": (1,), "hidden": ()}
        >>> model = vgg.build(**shape, cut=1, bottleneck=2, features="sigmoid")
        >>> model.encoder(torch.rand(3, 1, 8, 8)).shape
        torch.Size([3, 2, 4, 4])
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
