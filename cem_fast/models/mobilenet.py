"""MobileNetV2 for small images, cut between two of its blocks."""

from __future__ import annotations

from torch import Tensor, nn

from cem_fast.models.assembly import divide, finish
from cem_fast.models.split import SplitModel

# expansion, channels, blocks, and the first block's stride, which is 1 in two places where large images have 2
GROUPS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, LAST = 32, 1280


def convolution(
    channels_in: int, channels_out: int, kernel: int, *, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution that keeps the sides, its normalization, and a ReLU that ends at 6."""
    layer = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [layer, nn.BatchNorm2d(channels_out), nn.ReLU6()]


class InvertedResidual(nn.Module):
    """A block that widens its input, filters every channel by itself, and narrows it again without an activation.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output; the input is added where neither they nor the sides change.
        stride: stride of the filter.
        expansion: by how much the block widens its input.
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
    """MobileNetV2, of which the images of 32 pixels reach the last block as 4x4 features, with ``cut`` stages on the device.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        num_classes: number of classes.
        cut: stages on the device, 1 to 18; the first stage and the last are a convolution, those between a block.
        bottleneck: number of channels or ``[noRELU_][Kk]CcSs``; 0 releases the last stage's own features.
        features: activation of the released features, ``sigmoid`` or ``relu``.

    Returns:
        The network, cut.

    Raises:
        ValueError: ``cut`` or ``bottleneck`` is out of range.

    Source:
        Sandler et al., "MobileNetV2: inverted residuals and linear bottlenecks", CVPR 2018, table 2.
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
