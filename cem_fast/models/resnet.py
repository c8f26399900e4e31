"""Residual networks for small images, split between two of their blocks."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from cem_fast.models.assembly import divide, finish
from cem_fast.models.split import SplitModel


class BasicBlock(nn.Module):
    """``shortcut(x) + BN(conv(ReLU(BN(conv(x)))))``; the activation after the sum belongs to the stage.

    The shortcut has no parameters: it subsamples pixels by the stride and pads channels with zeros.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output.
        stride: stride of the first convolution.

    Example:
        >>> import torch
        >>> from cem_fast.models.resnet import BasicBlock
        >>> BasicBlock(4, 8, stride=2)(torch.rand(2, 4, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.residual = nn.Sequential(
            nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels_out),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        shortcut, residual = hidden[:, :, :: self.stride, :: self.stride], self.residual(hidden)
        return F.pad(shortcut, (0, 0, 0, 0, 0, residual.shape[1] - shortcut.shape[1])) + residual


def build(
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    cut: int,
    bottleneck: int | str,
    features: str,
    blocks: int,
) -> SplitModel:
    """A residual network of ``6 * blocks + 2`` layers whose first ``cut`` stages run on the device.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        num_classes: number of classes.
        cut: number of stages on the device, 1 to ``3 * blocks``; the first stage is a convolution, the others a block of two.
        bottleneck: number of channels, or a notation such as ``K5C8S2`` or ``D64``; 0 releases the features of the device's last stage.
        features: activation of the released features, ``sigmoid`` or ``relu``.
        blocks: blocks per width: 16 channels, then 32 and 64 at a half and a quarter of the images' sides.

    Returns:
        The split network.

    Raises:
        ValueError: ``cut`` or ``bottleneck`` is out of range.

    Source:
        He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2 (with shortcuts of option A).

    Example:
        >>> import torch
        >>> from cem_fast.models import resnet
        >>> shape = {"image_shape": (3, 16, 16), "num_classes": 5}
        >>> model = resnet.build(**shape, cut=2, bottleneck=8, features="relu", blocks=1)
        >>> model.encoder(torch.rand(2, 3, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """
    widths = [16]
    stem = (nn.Conv2d(image_shape[0], 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    stages = [nn.Sequential(*stem)]
    for width in (16, 32, 64):
        for _ in range(blocks):
            block = BasicBlock(widths[-1], width, stride=1 if width == widths[-1] else 2)
            stages.append(nn.Sequential(block, nn.ReLU()))
            widths.append(width)
    encoder, decoder = divide(
        stages, widths, image_shape=image_shape, cut=cut, bottleneck=bottleneck, features=features
    )
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes)]
    return finish(encoder, [*decoder, *head])
