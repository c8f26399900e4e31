"""Networks that come already cut into a device's and a cloud's part."""

from __future__ import annotations

from functools import partial

from cem_fast.models import vgg
from cem_fast.names import lookup
from cem_fast.split import SplitModel

_NETWORKS = {
    "slim": partial(vgg.build, widths=(16, 32, 64, 64), pools=(1, 2, 3, 4), hidden=()),
    "vgg11": partial(
        vgg.build, widths=(64, 128, 256, 256, 512, 512, 512, 512), pools=(1, 2, 4, 6, 8), hidden=(512, 512)
    ),
}


def names() -> tuple[str, ...]:
    """Names of the networks that :func:`build` knows."""
    return tuple(_NETWORKS)


def build(name: str, *, image_shape: tuple[int, int, int], num_classes: int, cut: int, bottleneck: int) -> SplitModel:
    """Builds a network by name.

    Args:
        name: ``vgg11``, with the 64 to 512 channels and the two hidden layers of 512 used for CIFAR-10; ``slim``, four stages of 16 to
            64 channels that train on a CPU.
        image_shape: ``(channels, height, width)`` of the images.
        num_classes: number of classes, at least 2.
        cut: convolutional stages that stay on the user's device.
        bottleneck: channels of the features that leave the device; 0 for no bottleneck.

    Returns:
        The network, cut, with features in (0, 1).

    Raises:
        ValueError: the name is unknown, or an argument is out of range.

    Source:
        Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", ICLR 2015 (configuration A); Xia
        et al., "Theoretical insights in model inversion robustness and conditional entropy maximization for collaborative inference
        systems", CVPR 2025 (the cut and the bottleneck).
    """
    network = lookup("model", name, _NETWORKS)
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    return network(image_shape=image_shape, num_classes=num_classes, cut=cut, bottleneck=bottleneck)
