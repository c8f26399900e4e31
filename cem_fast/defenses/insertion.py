"""Putting a layer of a defense's own into the part of a network that runs on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from cem_fast._support.eval_mode import in_eval_mode
from cem_fast.models.split import SplitModel


def insert_layer(
    model: SplitModel, image_shape: torch.Size, kind: type[nn.Module], build: Callable[[int], nn.Module]
) -> nn.Module:
    """Puts a layer before the last module of the encoder, which bounds the features; where one is already there, it stays.

    Args:
        model: the network.
        image_shape: ``(channels, height, width)`` of the images.
        kind: class of the layer.
        build: channels of the feature maps at that place -> the layer, which must keep their shape.

    Returns:
        The layer.

    Raises:
        ValueError: the encoder is not an ``nn.Sequential``, or has no feature maps ``[N, C, H, W]`` at that place.
    """
    encoder = model.encoder
    if not isinstance(encoder, nn.Sequential):
        raise ValueError(f"the encoder must be an nn.Sequential to put a layer into, got {type(encoder).__name__}")
    for module in encoder:
        if isinstance(module, kind):
            return module
    place = len(encoder) - 1
    with torch.no_grad(), in_eval_mode(model):
        features = encoder[:place](torch.zeros(1, *image_shape, device=model.device))
    if features.dim() != 4:
        raise ValueError(
            "the layer of a defense needs feature maps [N, C, H, W] before the last module of the encoder, got shape "
            f"{tuple(features.shape)}: cut the network before it flattens them"
        )
    layer = build(features.shape[1]).to(model.device, memory_format=torch.channels_last)
    encoder.insert(place, layer.train(encoder.training))
    return layer
