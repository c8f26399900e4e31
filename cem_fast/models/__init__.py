"""Networks that come already cut into a device's and a cloud's part."""

from __future__ import annotations

from functools import partial

from cem_fast._support.bottleneck import Bottleneck
from cem_fast._support.lookup import lookup
from cem_fast.models import mobilenet, resnet, vgg
from cem_fast.models.split import SplitModel

__all__ = ["Bottleneck", "build", "names"]

_VGG11 = partial(vgg.build, widths=(64, 128, 256, 256, 512, 512, 512, 512), pools=(1, 2, 4, 6, 8), hidden=(512, 512))
_VGG13 = partial(
    vgg.build,
    widths=(64, 64, 128, 128, 256, 256, 512, 512, 512, 512),
    pools=(2, 4, 6, 8, 10),
    hidden=(512, 512),
)
_ARCHITECTURES = {
    "slim": partial(vgg.build, widths=(16, 32, 64, 64), pools=(1, 2, 3, 4), hidden=()),
    "vgg11": _VGG11,
    "vgg11_nobn": partial(_VGG11, normalize=False),
    "vgg13": _VGG13,
    "vgg13_nobn": partial(_VGG13, normalize=False),
    "resnet20": partial(resnet.build, blocks=3),
    "resnet32": partial(resnet.build, blocks=5),
    "mobilenet_v2": mobilenet.build,
}
_NETWORKS = {
    name + suffix: partial(architecture, features=features)
    for name, architecture in _ARCHITECTURES.items()
    for suffix, features in (("", "sigmoid"), ("_relu", "relu"))
}


def names() -> tuple[str, ...]:
    """Names of the networks that :func:`build` knows."""
    return tuple(_NETWORKS)


def build(
    name: str, *, image_shape: tuple[int, int, int], num_classes: int, cut: int, bottleneck: int | str
) -> SplitModel:
    """Builds a network by name.

    Args:
        name: ``vgg11`` or ``vgg13``, with two hidden layers of 512, after whose name ``_nobn`` leaves out batch normalization;
            ``resnet20``, ``resnet32`` or ``mobilenet_v2``, in their forms for small images; ``slim``, four stages of 16 to 64 channels
            that train on a CPU. The features that leave the device end in a Sigmoid, which bounds them to (0, 1); ``_relu`` after the
            name has them end in a ReLU.
        image_shape: ``(channels, height, width)`` of the images.
        num_classes: number of classes, at least 2.
        cut: stages that stay on the user's device: convolutions of VGG and ``slim``; of the others, the first convolution and then
            blocks.
        bottleneck: channels of the features that leave the device, or ``[noRELU_][Kk]CcSs``, see :meth:`Bottleneck.parse`; 0 for no
            bottleneck.

    Returns:
        The network, cut.

    Raises:
        ValueError: the name is unknown, or an argument is out of range.

    Source:
        Xia et al., "Theoretical insights in model inversion robustness and conditional entropy maximization for collaborative inference
        systems", CVPR 2025 (the cut and the bottleneck; their networks are ``vgg11`` at cut 2 and ``resnet20_relu``).
    """
    network = lookup("model", name, _NETWORKS)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    return network(image_shape=image_shape, num_classes=num_classes, cut=cut, bottleneck=bottleneck)
