"""Networks split into an encoder on the device and a decoder in the cloud."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from cem_fast._support.bottleneck import Bottleneck, DenseBottleneck
from cem_fast._support.lookup import lookup
from cem_fast.models import mobilenet, resnet, vgg
from cem_fast.models.cutting import Cut, cuts
from cem_fast.models.split import SplitModel

__all__ = ["Bottleneck", "Cut", "DenseBottleneck", "build", "cuts", "names"]

_VGG11 = partial(vgg.build, widths=(64, 128, 256, 256, 512, 512, 512, 512), pools=(1, 2, 4, 6, 8), hidden=(512, 512))
_VGG13 = partial(
    vgg.build,
    widths=(64, 64, 128, 128, 256, 256, 512, 512, 512, 512),
    pools=(2, 4, 6, 8, 10),
    hidden=(512, 512),
)
_ARCHITECTURES: dict[str, Callable[..., SplitModel]] = {
    "slim": partial(vgg.build, widths=(16, 32, 64, 64), pools=(1, 2, 3, 4), hidden=()),
    "vgg11": _VGG11,
    "vgg11_nobn": partial(_VGG11, normalize=False),
    "vgg13": _VGG13,
    "vgg13_nobn": partial(_VGG13, normalize=False),
    "resnet20": partial(resnet.build, blocks=3),
    "resnet32": partial(resnet.build, blocks=5),
    "mobilenet_v2": mobilenet.build,
}
_NETWORKS: dict[str, Callable[..., SplitModel]] = {
    name + suffix: partial(architecture, features=features)
    for name, architecture in _ARCHITECTURES.items()
    for suffix, features in (("", "sigmoid"), ("_relu", "relu"))
}


def names() -> tuple[str, ...]:
    """Names of the networks that :func:`cem_fast.models.build` accepts.

    Example:
        >>> from cem_fast import models
        >>> models.names()[:4]
        ('slim', 'slim_relu', 'vgg11', 'vgg11_relu')
    """
    return tuple(_NETWORKS)


def build(
    name: str, *, image_shape: tuple[int, int, int], num_classes: int, cut: int, bottleneck: int | str
) -> SplitModel:
    """Builds a network by name.

    Args:
        name: ``vgg11`` or ``vgg13``, with two hidden layers of 512, also without batch normalization (suffix ``_nobn``); ``resnet20``,
            ``resnet32`` or ``mobilenet_v2``, in their forms for small images; ``slim``, four stages of 16 to 64 channels that train on a
            CPU. The released features end in a Sigmoid, which bounds them to (0, 1), or in a ReLU (suffix ``_relu``).
        image_shape: ``(channels, height, width)`` of the images.
        num_classes: number of classes, at least 2.
        cut: number of stages on the device. A stage is a convolution of VGG and ``slim``, and otherwise the first convolution or a block.
        bottleneck: channels of the released features, or a notation such as ``K5C8S2`` or ``D64``, see
            :meth:`cem_fast.models.Bottleneck.parse`; 0 for no bottleneck.

    Returns:
        The split network.

    Raises:
        ValueError: the name is unknown, or an argument is out of range.

    Source:
        Xia et al., "Theoretical insights in model inversion robustness and conditional entropy maximization for collaborative inference
        systems", CVPR 2025 (the cut and the bottleneck; their networks are ``vgg11`` at cut 2 and ``resnet20_relu``).

    Example:
        >>> import torch
        >>> from cem_fast import models
        >>> model = models.build("vgg11", image_shape=(3, 32, 32), num_classes=10, cut=2, bottleneck=8)
        >>> features = model.encoder(torch.rand(2, 3, 32, 32))
        >>> features.shape, model.decoder(features).shape
        (torch.Size([2, 8, 8, 8]), torch.Size([2, 10]))
    """
    network = lookup("model", name, _NETWORKS)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    return network(image_shape=image_shape, num_classes=num_classes, cut=cut, bottleneck=bottleneck)
