"""MobileNetV2 for small images, split between two of its blocks."""

from __future__ import annotations

from torch import Tensor, nn

from cem_fast.models.assembly import divide, finish
from cem_fast.models.split import SplitModel

# expansion, channels, blocks, and the first block's stride (in two groups 1 instead of the 2 for large images)
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, LAST = 32, 1280


def convolution(
    channels_in: int, channels_out: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution with padding, batch normalization and ReLU6.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        kernel: side of the window, odd.
        stride: stride of the convolution.
        groups: groups of channels.

    Example:
        >>> from cem_fast.models.mobilenet import convolution
        >>> [type(layer).__name__ for layer in convolution(3, 8, 3)]
        ['Conv2d', 'BatchNorm2d', 'ReLU6']
    """
    layer = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(channels_out), nn.ReLU6()]


class InvertedResidual(nn.Module):
    """A block of expansion, depthwise convolution and linear projection.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output; the input is added if neither they nor the sides change.
        stride: stride of the depthwise convolution.
        expansion: factor on the channels inside the block.

    Example:
        >>> import torch
        >>> from cem_fast.models.mobilenet import InvertedResidual
        >>> InvertedResidual(4, 8, stride=2, expansion=6)(torch.rand(2, 4, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int, expansion: int):
        super().__init__()
        inner = expansion * channels_in
        layers = convolution(channels_in, inner, 1) if expansion > 1 else []
        layers += convolution(inner, inner, 3, stride=stride, groups=inner)
        layers += convolution(inner, channels_out, 1)[:-1]
        self.block = nn.Sequential(*layers)
        self.added = stride == 1 and channels_in == channels_out

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.block(hidden) if self.added else self.block(hidden)


def build(
    *, image_shape: tuple[int, int, int], num_classes: int, cut: int, bottleneck: int | str, features: str
) -> SplitModel:
    """MobileNetV2 with ``cut`` stages on the device; for images of 32x32 pixels, the last block has 4x4 features.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        num_classes: number of classes.
        cut: number of stages on the device, 1 to 18; the first and last stage are a convolution, the others a block.
        bottleneck: number of channels, or a notation such as ``K5C8S2`` or ``D64``; 0 releases the features of the device's last stage.
        features: activation of the released features, ``sigmoid`` or ``relu``.

    Returns:
        The split network.

    Raises:
        ValueError: ``cut`` or ``bottleneck`` is out of range.

    Source:
        Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018, table 2.

    Example:
        >>> import torch
        >>> from cem_fast.models import mobilenet
        >>> shape = {"image_shape": (3, 16, 16), "num_classes": 5}
        >>> model = mobilenet.build(**shape, cut=3, bottleneck=8, features="sigmoid")
        >>> model.encoder(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """
    stages, widths = [nn.Sequential(*convolution(image_shape[0], STEM, 3))], [STEM]
    for expansion, width, count, stride in GROUPS:
        for index in range(count):
            block = InvertedResidual(widths[-1], width, stride if index == 0 else 1, expansion)
            stages.append(nn.Sequential(block, nn.Identity()))
            widths.append(width)
    stages.append(nn.Sequential(*convolution(widths[-1], LAST, 1)))
    widths.append(LAST)
    encoder, decoder = divide(
        stages, widths, image_shape=image_shape, cut=cut, bottleneck=bottleneck, features=features
    )
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(LAST, num_classes)]
    return finish(encoder, [*decoder, *head])
