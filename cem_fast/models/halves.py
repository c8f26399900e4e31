"""The two halves of a bottleneck, for a given encoder."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from cem_fast._support.bottleneck import Bottleneck, DenseBottleneck
from cem_fast.models.bottleneck import Compress, Expand
from cem_fast.models.dense import DenseCompress, DenseExpand


def halves(
    bottleneck: Bottleneck | DenseBottleneck,
    encoder: nn.Module,
    channels: int,
    image_shape: tuple[int, int, int] | None,
    features: str = "sigmoid",
) -> tuple[nn.Module, nn.Module]:
    """The device's and the cloud's half of a bottleneck behind an encoder.

    Args:
        bottleneck: shape of the bottleneck.
        encoder: modules from images to feature maps.
        channels: channels of these maps.
        image_shape: ``(channels, height, width)`` of the images; None if it is unknown, which only a convolution allows.
        features: activation of the released features, ``sigmoid`` or ``relu``.

    Raises:
        ValueError: the sides of the features are not divided by the bottleneck's stride, pool or groups, or must be known.

    Example:
        >>> from torch import nn
        >>> from cem_fast.models import Bottleneck
        >>> from cem_fast.models.halves import halves
        >>> device, cloud = halves(Bottleneck.parse("D64"), nn.Conv2d(1, 4, 3, padding=1), 4, (1, 8, 8))
        >>> device[1].in_features, cloud[1].out_features
        (256, 256)
    """
    if isinstance(bottleneck, Bottleneck):
        if bottleneck.stride > 1 and image_shape is not None:
            _divided(_sides(encoder, image_shape), "the stride", bottleneck.stride)
        return Compress(channels, bottleneck, features), Expand(bottleneck, channels)
    if image_shape is None:
        raise ValueError("image_shape must be given for a dense bottleneck, whose weights depend on it, got None")
    sides = _sides(encoder, image_shape)
    _divided(sides, "the stride or pool", bottleneck.shrinkage)
    _divided(
        sides, "the stride or pool times the groups per side", bottleneck.shrinkage * math.isqrt(bottleneck.groups)
    )
    shape = channels, *sides
    return DenseCompress(shape, bottleneck, features), DenseExpand(bottleneck, shape)


def _divided(sides: tuple[int, int], what: str, divisor: int) -> None:
    height, width = sides
    if height % divisor or width % divisor:
        raise ValueError(
            f"{what} of the bottleneck, {divisor}, must divide the features' sides, got {height}x{width} features"
        )


def _sides(encoder: nn.Module, image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width of the features, without computing them."""
    blank = copy.deepcopy(encoder).to("meta")
    height, width = blank(torch.empty(2, *image_shape, device="meta")).shape[2:]
    return height, width
