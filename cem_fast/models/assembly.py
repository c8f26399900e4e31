"""Assembly of a split network from its stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cem_fast._support.bottleneck import Bottleneck
from cem_fast.models.bottleneck import ACTIVATIONS
from cem_fast.models.halves import halves
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
    """Splits a sequence of stages in two, with a bottleneck between the parts.

    Args:
        stages: the stages in order, each ending in its activation.
        widths: output channels of every stage.
        image_shape: ``(channels, height, width)`` of the images.
        cut: number of stages on the device, 1 to ``len(stages) - 1``.
        bottleneck: see :meth:`cem_fast.models.Bottleneck.parse`; 0 releases the features of the device's last stage.
        features: activation of the released features, ``sigmoid`` or ``relu``.

    Returns:
        The modules of the encoder and of the decoder.

    Raises:
        ValueError: ``cut`` or ``bottleneck`` is out of range, or does not divide the features' sides.

    Example:
        >>> from torch import nn
        >>> from cem_fast.models.assembly import divide
        >>> stages = [nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())]
        >>> encoder, decoder = divide(stages, [4, 4], image_shape=(1, 8, 8), cut=1, bottleneck=2, features="sigmoid")
        >>> [type(module).__name__ for module in (*encoder, *decoder)]
        ['Sequential', 'Compress', 'Expand', 'Sequential']
    """
    if not 1 <= cut < len(stages):
        raise ValueError(f"cut must be between 1 and {len(stages) - 1} stages, got {cut}")
    shape = Bottleneck.parse(bottleneck)
    encoder: list[nn.Module] = list(stages[:cut])
    decoder: list[nn.Module] = list(stages[cut:])
    if shape is None:
        stages[cut - 1][-1] = ACTIVATIONS[features]()
        return encoder, decoder
    compress, expand = halves(shape, nn.Sequential(*encoder), widths[cut - 1], image_shape, features)
    return [*encoder, compress], [expand, *decoder]


def finish(encoder: Sequence[nn.Module], decoder: Sequence[nn.Module]) -> SplitModel:
    """The split network of two sequences of modules, with convolutions initialized for ReLU, in channels-last layout.

    Args:
        encoder: modules on the device.
        decoder: modules in the cloud.

    Source:
        He et al., "Delving deep into rectifiers", ICCV 2015 (the initialization).

    Example:
        >>> from torch import nn
        >>> from cem_fast.models.assembly import finish
        >>> type(finish([nn.Conv2d(1, 4, 3)], [nn.Flatten()])).__name__
        'SplitModel'
    """
    model = SplitModel(nn.Sequential(*encoder), nn.Sequential(*decoder))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model.to(memory_format=torch.channels_last)
