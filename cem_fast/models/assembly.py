"""Putting a network together from its stages, cut into a device's and a cloud's part."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from cem_fast.models.bottleneck import ACTIVATIONS, Bottleneck, Compress, Expand
from cem_fast.models.split import SplitModel


def divide(
    stages: Sequence[nn.Sequential],
    widths: Sequence[int],
    *,
    image_shape: tuple[int, int, int],
    cut: int,
    bottleneck: int | str,
    features: str,
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Cuts a row of stages in two, with a bottleneck between the parts.

    Args:
        stages: the stages from the images on, each ending in its activation.
        widths: output channels of every stage.
        image_shape: ``(channels, height, width)`` of the images.
        cut: stages on the device, 1 to ``len(stages) - 1``.
        bottleneck: see :meth:`Bottleneck.parse`; 0 releases the last stage's own features.
        features: activation of the released features, ``sigmoid`` or ``relu``.

    Returns:
        The modules on the device, and those in the cloud.

    Raises:
        ValueError: ``cut`` or ``bottleneck`` is out of range, or the stride does not divide the features' sides.
    """
    if not 1 <= cut < len(stages):
        raise ValueError(f"cut must be between 1 and {len(stages) - 1} stages, got {cut}")
    shape = Bottleneck.parse(bottleneck)
    encoder: list[nn.Module] = list(stages[:cut])
    decoder: list[nn.Module] = list(stages[cut:])
    if shape is None:
        stages[cut - 1][-1] = ACTIVATIONS[features]()
        return encoder, decoder
    if shape.stride > 1:
        height, width = _sides(encoder, image_shape)
        if height % shape.stride or width % shape.stride:
            raise ValueError(
                f"the stride of bottleneck {bottleneck!r} must divide the features' sides, got {height}x{width} features"
            )
    encoder.append(Compress(widths[cut - 1], shape, features))
    decoder.insert(0, Expand(shape, widths[cut - 1]))
    return encoder, decoder


def finish(encoder: Sequence[nn.Module], decoder: Sequence[nn.Module]) -> SplitModel:
    """The network of two rows of modules, its convolutions initialized for ReLU and laid out channels last.

    Source:
        He et al., "Delving deep into rectifiers", ICCV 2015 (the initialization).
    """
    model = SplitModel(nn.Sequential(*encoder), nn.Sequential(*decoder))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model.to(memory_format=torch.channels_last)


def _sides(modules: Sequence[nn.Module], image_shape: tuple[int, int, int]) -> tuple[int, int]:
    """Height and width of the features, found without computing any."""
    blank = copy.deepcopy(nn.Sequential(*modules)).to("meta")
    return tuple(blank(torch.empty(2, *image_shape, device="meta")).shape[2:])
