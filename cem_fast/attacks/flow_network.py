"""The network of the flow attack: the mean image given a noisy one and what a message says."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FREQUENCIES = 8  # of the sines and cosines of the time


class FlowNetwork(nn.Module):
    """Estimates ``E[x | (1 - t) e + t x, message]`` with a small U-Net on patches.

    The output is the first of the given images plus a correction, which is zero before training. A learned map and fully connected branches
    let the correction depend on the place in the image.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        feature_shape: shape of a message: maps ``(C, H, W)`` are also seen by the convolutions.
        given: images next to the noisy one.
        width: channels of the convolutions, a multiple of 4.
        narrow: width of the fully connected branches.

    Source:
        Ronneberger et al., "U-Net: convolutional networks for biomedical image segmentation", MICCAI 2015; Lipman et al., "Flow matching
        for generative modeling", ICLR 2023.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.flow_network import FlowNetwork
        >>> network = FlowNetwork((3, 30, 20), (8, 4, 4), given=2)
        >>> noisy, estimate, slope = torch.randn(3, 5, 3, 30, 20)
        >>> torch.equal(network(noisy, torch.rand(5), torch.randn(5, 8, 4, 4), [estimate, slope]), estimate)
        True
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        feature_shape: tuple[int, ...],
        *,
        given: int,
        width: int = 32,
        narrow: int = 96,
    ):
        super().__init__()
        channels, height, side = image_shape
        self.patch = 1 if min(height, side) < 12 else 2 if min(height, side) < 32 else 4
        rows, columns = (2 * math.ceil(size / (2 * self.patch)) for size in (height, side))
        self.padding = (0, columns * self.patch - side, 0, rows * self.patch - height)
        pixels, coarse = channels * self.patch**2, width * rows * columns // 4
        # the given images differ in scale, and the slope of a likelihood has any
        self.scale = nn.BatchNorm2d(channels * given, affine=False)
        self.time = nn.Sequential(nn.Linear(2 * FREQUENCIES, 2 * width), nn.SiLU())
        self.first = nn.Conv2d((1 + given) * pixels, width, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(1, width, rows, columns))
        self.message = nn.Sequential(
            nn.Flatten(),
            nn.Linear(math.prod(feature_shape), narrow),
            nn.SiLU(),
            nn.Linear(narrow, width * rows * columns),
            nn.Unflatten(1, (width, rows, columns)),
        )
        self.map = nn.Conv2d(feature_shape[0], width, 3, padding=1) if len(feature_shape) == 3 else None
        self.fine = nn.ModuleList(_Block(width) for _ in range(3))
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.coarse = _Block(width)
        self.everywhere = nn.Sequential(
            nn.Flatten(), nn.Linear(coarse, narrow), nn.SiLU(), _zero(nn.Linear(narrow, coarse))
        )
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.last = _zero(nn.Conv2d(width, pixels, 3, padding=1))

    def forward(self, noisy: Tensor, time: Tensor, message: Tensor, given: list[Tensor]) -> Tensor:
        phases = math.pi / 2 * torch.arange(1, 1 + FREQUENCIES, device=time.device) * time[:, None]
        at = self.time(torch.cat([phases.sin(), phases.cos()], 1))
        images = torch.cat([noisy, self.scale(torch.cat(given, 1))], 1)
        hidden = (
            self.first(F.pixel_unshuffle(F.pad(images, self.padding), self.patch)) + self.place + self.message(message)
        )
        if self.map is not None:
            hidden = hidden + F.interpolate(self.map(message), hidden.shape[2:], mode="bilinear")
        for block in self.fine[:2]:
            hidden = block(hidden, at)
        low = self.coarse(self.down(hidden), at)
        low = low + self.everywhere(low).view_as(low)
        high = F.interpolate(low, hidden.shape[2:], mode="nearest")
        hidden = self.fine[2](self.up(torch.cat([hidden, high], 1)), at)
        correction = F.pixel_shuffle(self.last(hidden), self.patch)
        return given[0] + correction[..., : noisy.shape[2], : noisy.shape[3]]


class _Block(nn.Module):
    """A residual block with group normalization, to which the time is added."""

    def __init__(self, width: int):
        super().__init__()
        self.before = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.shift = nn.Linear(2 * width, width)
        self.after = nn.Sequential(nn.GroupNorm(4, width), nn.SiLU(), _zero(nn.Conv2d(width, width, 3, padding=1)))

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        return hidden + self.after(self.before(hidden) + self.shift(time)[:, :, None, None])


def _zero(layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer
