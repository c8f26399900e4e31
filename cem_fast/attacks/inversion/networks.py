"""Networks of the inversion attack: decoders of maps and of other features, and a correction."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 32  # channels at the features' resolution
SEEDS = 16  # channels of the maps that features without places become
LARGE = 32  # pixels of a side from which such maps have a fourth of the image's resolution, and not half
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

    Local: convolutions, between pixels rearranged to channels and back, at the resolution of feature maps. Tokens, vectors and maps of one
    place become maps by a linear layer. Global: a fully connected branch, which combines all features and depends on the place in the
    image; with one more block where features are no maps. The last layers start from zero.

    Args:
        feature_shape: shape of one image's features: ``(C, H, W)``, or any other.
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
        channels, height, width = self.image_shape = image_shape
        pixels, numbers = math.prod(image_shape), math.prod(feature_shape)
        self.spread: nn.Module = nn.Identity()
        if len(feature_shape) == 3 and feature_shape[1] * feature_shape[2] > 1:
            blocks, seen = 1, feature_shape[0]
            self.factor = 2 ** max(0, math.ceil(math.log2(height / feature_shape[1])))
        else:
            blocks, seen = 2, SEEDS
            self.factor = 4 if min(height, width) >= LARGE else 2
            places = [math.ceil(side / self.factor) for side in (height, width)]
            self.spread = nn.Sequential(
                nn.Flatten(), nn.Linear(numbers, seen * math.prod(places)), nn.Unflatten(1, (seen, *places))
            )
        last = nn.Linear(NARROW, pixels)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.global_ = nn.Sequential(
            nn.Linear(numbers + guides * pixels, NARROW),
            *(LinearBlock(NARROW) for _ in range(blocks)),
            nn.LayerNorm(NARROW),
            nn.SiLU(),
            nn.Dropout(DROPOUT),
            last,
        )
        self.local = nn.Sequential(
            nn.Conv2d(seen + guides * channels * self.factor**2, WIDTH, 3, padding=1),
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
        maps = self.spread(features)
        below = F.pixel_unshuffle(_resized(images, [self.factor * side for side in maps.shape[2:]]), self.factor)
        above = self.local(torch.cat([maps, below], 1).contiguous(memory_format=torch.channels_last))
        return self.global_(flat).view(-1, *self.image_shape) + _resized(above, list(images.shape[2:]))


def _resized(images: Tensor, size: list[int]) -> Tensor:
    return images if list(images.shape[2:]) == size else F.interpolate(images, size, mode="bilinear")


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(max(1, channels // GROUPS), channels)
