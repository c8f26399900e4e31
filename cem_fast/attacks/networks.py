"""Networks from features to images, and a critic of images."""

from __future__ import annotations

import math
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn import functional as F


class PreActivationBlock(nn.Module):
    """A residual block with batch normalization and ReLU before each of its two convolutions.

    Args:
        channels_in: channels of the input.
        channels_out: channels of the output; if they differ, the shortcut is a normalized 1x1 convolution.

    Source:
        He et al., "Identity mappings in deep residual networks", ECCV 2016.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.networks import PreActivationBlock
        >>> PreActivationBlock(3, 8)(torch.rand(2, 3, 8, 8)).shape
        torch.Size([2, 8, 8, 8])
    """

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(channels_in),
            nn.ReLU(),
            nn.Conv2d(channels_in, channels_out, 3, padding=1),
            nn.BatchNorm2d(channels_out),
            nn.ReLU(),
            nn.Conv2d(channels_out, channels_out, 3, padding=1),
        )
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, hidden: Tensor) -> Tensor:
        return self.shortcut(hidden) + self.residual(hidden)


class ResNormDecoder(nn.Sequential):
    """Residual decoder with batch normalization: 10 blocks, of which 8 have 64 channels throughout, upsampled at the end.

    The layout is inferred from the published size: 711,539 parameters from 8x8x8 features to 3x32x32 images.

    Args:
        feature_shape: ``(channels, height, width)`` of the features.
        images: the attacker's images ``[N, C, H, W]``; only their shape is used.

    Source:
        Xia et al., CVPR 2025 (their decoder attack, with 8 blocks and 64 channels).

    Example:
        >>> import torch
        >>> from cem_fast.attacks.networks import ResNormDecoder
        >>> network = ResNormDecoder((8, 8, 8), torch.rand(2, 3, 32, 32))
        >>> sum(parameter.numel() for parameter in network.parameters())
        711539
    """

    learning_rate = 2e-3

    def __init__(self, feature_shape: tuple[int, int, int], images: Tensor):
        blocks, width = 8, 64
        channels, height, side = images.shape[1:]
        layers: list[nn.Module] = [PreActivationBlock(feature_shape[0], width)]
        layers += [PreActivationBlock(width, width) for _ in range(blocks)]
        for _ in range(_doublings(feature_shape[1], height)):
            layers.append(nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1))
            layers.append(nn.BatchNorm2d(width))
        super().__init__(*layers, _Resize((height, side)), PreActivationBlock(width, channels), nn.Sigmoid())


class ConvDecoder(nn.Sequential):
    """Decoder without shortcuts: convolutions of 64 channels at the features' resolution, then upsampling.

    ``plain`` has no normalization, as in the first attacks on split inference. ``conv_norm`` has, and is deeper.

    Args:
        feature_shape: ``(channels, height, width)`` of the features.
        images: the attacker's images ``[N, C, H, W]``; only their shape is used.
        normalized: whether each convolution but the last is followed by batch normalization; there are 8 with it and 2 without.

    Source:
        He, Zhang and Lee, "Model inversion attacks against collaborative inference", ACSAC 2019; Xia et al., CVPR 2025 (depth and width).

    Example:
        >>> import torch
        >>> from cem_fast.attacks.networks import ConvDecoder
        >>> network = ConvDecoder((8, 8, 8), torch.rand(2, 3, 32, 32), normalized=False)
        >>> network(torch.rand(2, 8, 8, 8)).shape
        torch.Size([2, 3, 32, 32])
    """

    def __init__(self, feature_shape: tuple[int, int, int], images: Tensor, *, normalized: bool):
        width = 64
        channels, height, side = images.shape[1:]
        sizes = [feature_shape[0]] + [width] * (8 if normalized else 2)
        layers: list[nn.Module] = []
        for before, after in zip(sizes, sizes[1:]):
            layers.append(nn.Conv2d(before, after, 3, padding=1))
            layers += [nn.BatchNorm2d(after), nn.ReLU()] if normalized else [nn.ReLU()]
        for _ in range(_doublings(feature_shape[1], height)):
            layers.append(nn.ConvTranspose2d(width, width, 3, stride=2, padding=1, output_padding=1))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if normalized else [nn.ReLU()]
        super().__init__(*layers, _Resize((height, side)), nn.Conv2d(width, channels, 3, padding=1), nn.Sigmoid())
        self.learning_rate = 2e-3 if normalized else 1e-3


class SlimDecoder(nn.Module):
    """Small decoder for a CPU: ``mean image + spread * (local(z) + global(z))``.

    The local part consists of convolutions at the features' resolution, whose output channels are rearranged to pixels. The global part is
    fully connected through a narrow layer: it combines all features and depends on the position in the image.

    Args:
        feature_shape: ``(channels, height, width)`` of the features.
        images: the attacker's images ``[N, C, H, W]``, for their mean and spread.
        width: channels of the local part.
        narrow: width of the hidden layer of the global part.
        dropout: fraction of that layer that is dropped in training.

    Source:
        Shi et al., "Real-time single image and video super-resolution using an efficient sub-pixel convolutional neural network", CVPR
        2016 (channels rearranged to pixels).

    Example:
        >>> import torch
        >>> from cem_fast.attacks.networks import SlimDecoder
        >>> network = SlimDecoder((8, 8, 8), torch.rand(2, 3, 32, 32))
        >>> network(torch.rand(2, 8, 8, 8)).shape
        torch.Size([2, 3, 32, 32])
    """

    learning_rate = 1e-2

    def __init__(
        self,
        feature_shape: tuple[int, int, int],
        images: Tensor,
        *,
        width: int = 24,
        narrow: int = 128,
        dropout: float = 0.3,
    ):
        super().__init__()
        channels, height, side = shape = images.shape[1:]
        factor = 2 ** _doublings(feature_shape[1], height)
        self.local = nn.Sequential(
            nn.Conv2d(feature_shape[0], width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels * factor**2, 3, padding=1),
            nn.PixelShuffle(factor),
            _Resize((height, side)),
        )
        last = nn.Linear(narrow, math.prod(shape))
        nn.init.zeros_(last.weight)
        self.global_ = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(feature_shape), narrow),
            nn.BatchNorm1d(narrow),
            nn.ReLU(),
            nn.Dropout(dropout),
            last,
            nn.Unflatten(1, tuple(shape)),
        )
        mean = images.mean(0)
        self.register_buffer("mean", mean)
        self.register_buffer("spread", (images - mean).square().mean().sqrt())

    def forward(self, features: Tensor) -> Tensor:
        return self.mean + self.spread * (self.local(features) + self.global_(features))


DecoderNetwork: TypeAlias = ResNormDecoder | ConvDecoder | SlimDecoder


class Critic(nn.Sequential):
    """Scores images by strided convolutions that double the channels, without batch normalization, and a linear layer.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        width: channels of the first layer.

    Source:
        Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017 (no batch normalization: the penalty is one per image).

    Example:
        >>> import torch
        >>> from cem_fast.attacks.networks import Critic
        >>> Critic((3, 32, 32))(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2])
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int = 16):
        channels, height, side = image_shape
        layers: list[nn.Module] = []
        while min(height, side) > 4 and len(layers) < 8:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            channels, width, height, side = width, 2 * width, -(-height // 2), -(-side // 2)
        super().__init__(*layers, nn.Flatten(), nn.Linear(channels * height * side, 1), nn.Flatten(0))


class _Resize(nn.Module):
    """Resizes images to their final size if doubling the features' size does not give it exactly."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        return images if images.shape[2:] == self.size else F.interpolate(images, self.size, mode="bilinear")


def _doublings(small: int, large: int) -> int:
    return max(0, math.ceil(math.log2(large / small)))
