"""Networks of the inversion attack: decoders of maps and of other features, and a correction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 32  # channels at the features' resolution
NARROW = 256  # width of fully connected layers
GROUPS = 8  # channels of a group in normalization
DROPOUT = 0.2


class ConvBlock(nn.Module):
    """A residual block of two 3x3 convolutions, each after group normalization and SiLU.

    Args:
        channels: channels of input and output.

    Source:
        He et al., "Identity mappings in deep residual networks", ECCV 2016; Wu and He, "Group normalization", ECCV 2018.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.inversion.networks import ConvBlock
        >>> ConvBlock(8)(torch.rand(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [_norm(channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)]
        self.residual = nn.Sequential(*layers)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.residual(hidden)


class LinearBlock(nn.Module):
    """A residual block of two linear layers with layer normalization, SiLU and dropout.

    Args:
        width: width of input and output.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.inversion.networks import LinearBlock
        >>> LinearBlock(8)(torch.rand(2, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, width: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Dropout(DROPOUT),
            nn.Linear(width, width),
        )

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.residual(hidden)


class Painter(nn.Module):
    """From features and images to an image: ``local(features, images) + global(features, images)``.

    Maps: convolutions at the features' resolution, between pixels rearranged to channels and back; and a fully connected branch, which
    combines all features and depends on the place in the image. Tokens and vectors: the fully connected
    branch alone, with residual blocks. The last layers start from zero.

    Args:
        feature_shape: shape of one image's features: ``(C, H, W)``, or any other for the fully connected branch alone.
        image_shape: ``(channels, height, width)`` of the result.
        guides: images of that shape among the inputs.

    Source:
        Shi et al., "Real-time single image and video super-resolution using an efficient sub-pixel convolutional neural network", CVPR
        2016 (channels rearranged to pixels).

    Example:
        >>> import torch
        >>> from cem_fast.attacks.inversion.networks import Painter
        >>> for shape in ((8, 4, 4), (5, 6), (9,)):
        ...     network = Painter(shape, (1, 16, 16), guides=1)
        ...     print(network(torch.rand(2, *shape), torch.rand(2, 1, 16, 16)).shape)
        torch.Size([2, 1, 16, 16])
        torch.Size([2, 1, 16, 16])
        torch.Size([2, 1, 16, 16])
    """

    def __init__(self, feature_shape: Sequence[int], image_shape: tuple[int, int, int], *, guides: int):
        super().__init__()
        channels, height, _ = self.image_shape = image_shape
        pixels = math.prod(image_shape)
        self.is_map = len(feature_shape) == 3
        blocks = 1 if self.is_map else 2
        last = nn.Linear(NARROW, pixels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.global_ = nn.Sequential(
            nn.Linear(math.prod(feature_shape) + guides * pixels, NARROW),
            *(LinearBlock(NARROW) for _ in range(blocks)),
            nn.LayerNorm(NARROW),
            nn.SiLU(),
            nn.Dropout(DROPOUT),
            last,
        )
        if self.is_map:
            self.factor = 2 ** max(0, math.ceil(math.log2(height / feature_shape[1])))
            self.local = nn.Sequential(
                nn.Conv2d(feature_shape[0] + guides * channels * self.factor**2, WIDTH, 3, padding=1),
                ConvBlock(WIDTH),
                ConvBlock(WIDTH),
                _norm(WIDTH),
                nn.SiLU(),
                nn.Conv2d(WIDTH, channels * self.factor**2, 3, padding=1),
                nn.PixelShuffle(self.factor),
            ).to(memory_format=torch.channels_last)
            nn.init.zeros_(self.local[-2].weight)  # type: ignore[arg-type]

    def forward(self, features: Tensor, images: Tensor) -> Tensor:
        flat = torch.cat([features.flatten(1), images.flatten(1)], 1)
        painted = self.global_(flat).view(-1, *self.image_shape)
        if self.is_map:
            size = [self.factor * side for side in features.shape[2:]]
            below = F.pixel_unshuffle(_resized(images, size), self.factor)
            seen = torch.cat([features, below], 1).contiguous(memory_format=torch.channels_last)
            above = self.local(seen)
            painted = painted + _resized(above, list(images.shape[2:]))
        return painted


def _resized(images: Tensor, size: list[int]) -> Tensor:
    return images if list(images.shape[2:]) == size else F.interpolate(images, size, mode="bilinear")


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(max(1, channels // GROUPS), channels)
