"""Insertion of a defense's own layer into the encoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from cem_fast._support.eval_mode import in_eval_mode
from cem_fast.models.split import SplitModel


def insert_layer(
    model: SplitModel, image_shape: torch.Size, kind: type[nn.Module], build: Callable[[int], nn.Module]
) -> nn.Module:
    """Inserts a layer before the last module of the encoder, which bounds the features; an earlier one of its class is kept.

    Args:
        model: the network.
        image_shape: ``(channels, height, width)`` of the images.
        kind: class of the layer.
        build: function of the channels of the feature maps at that place; its layer must keep their shape.

    Returns:
        The layer, new or kept.

    Raises:
        ValueError: the encoder is not an ``nn.Sequential``, or has no feature maps ``[N, C, H, W]`` at that place.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cem_fast import models
        >>> from cem_fast.defenses.insertion import insert_layer
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=8)
        >>> insert_layer(model, torch.Size((1, 16, 16)), nn.BatchNorm2d, nn.BatchNorm2d).num_features
        32
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
    layer = build(features.shape[1]).to(model.device).to(memory_format=torch.channels_last)
    encoder.insert(place, layer.train(encoder.training))
    return layer
