"""Smooth random warps of the attacker's images: more images of the same kind to learn from."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ROTATION = 0.17  # greatest angle in radians
SCALING = 0.08  # greatest relative change of size
SHIFT = 0.08  # greatest shift in halves of a side
ELASTIC = 0.03  # standard deviation of the local shifts in halves of a side
KNOTS = 4  # local shifts are drawn on a grid of this side and interpolated


def warped(images: Tensor, *, mirror: bool) -> Tensor:
    """Returns every image shifted, rotated, scaled and distorted at random, and mirrored with probability 1/2 if asked for.

    Args:
        images: ``[N, C, H, W]``.
        mirror: whether mirrored images are images of the same kind.

    Source:
        Simard, Steinkraus and Platt, "Best practices for convolutional neural networks applied to visual document analysis", ICDAR 2003.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.warps import warped
        >>> warped(torch.rand(3, 1, 8, 8), mirror=True).shape
        torch.Size([3, 1, 8, 8])
    """
    count, device = len(images), images.device

    def spread(size: float, *shape: int) -> Tensor:
        return (2 * torch.rand(count, *shape, device=device) - 1) * size

    angle, zoom = spread(ROTATION), 1 + spread(SCALING)
    aspect = images.shape[2] / images.shape[3]  # places are in halves of a side
    turn = torch.stack([angle.cos(), -angle.sin() * aspect, angle.sin() / aspect, angle.cos()], 1)
    turn = turn.view(-1, 2, 2) * zoom.view(-1, 1, 1)
    if mirror:
        turn = turn * torch.stack([spread(1.0).sign(), torch.ones(count, device=device)], 1)[:, None]
    shift, knots = spread(SHIFT, 2, 1), ELASTIC * torch.randn(count, 2, KNOTS**2, device=device)
    height, width = images.shape[2:]
    places = torch.cat([turn, shift, knots], 2) @ fields(height, width, device)
    places = places.unflatten(2, (height, width)).permute(0, 2, 3, 1)
    return F.grid_sample(images, places, mode="bilinear", padding_mode="border", align_corners=False)


def fields(height: int, width: int, device: torch.device) -> Tensor:
    """What a warp combines, ``[3 + KNOTS^2, H W]``: x and y of every pixel, 1, and the part of every knot in the local shift."""
    size, identity = [height, width], torch.eye(2, 3, device=device)
    affine = F.affine_grid(identity[None], [1, 1, *size], align_corners=False).flatten(0, 2).T
    knots = torch.eye(KNOTS**2, device=device).view(1, -1, KNOTS, KNOTS)
    local = F.interpolate(knots, size, mode="bicubic", align_corners=True)[0].flatten(1)
    return torch.cat([affine, torch.ones_like(affine[:1]), local])


def are_mirrored(images: Tensor, *, held_out: Tensor, rest: Tensor) -> bool:
    """Whether mirrored images are of the same kind: principal components of the others explain mirrored held-out images as well.

    Few components are used, up to 16. More of them would tell details from their mirror image.

    Args:
        images: the attacker's images ``[N, C, H, W]``.
        held_out: indices of the held-out images.
        rest: indices of the others.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.warps import are_mirrored
        >>> images = torch.rand(60, 1, 6, 1).expand(60, 1, 6, 6) * torch.linspace(0, 1, 6)
        >>> are_mirrored(images, held_out=torch.arange(12), rest=torch.arange(12, 60))
        False
    """
    known = images[rest].flatten(1)
    mean = known.mean(0)
    rank = max(1, min(math.ceil(len(known) / 32), 16))
    _, _, axes = torch.linalg.svd((known - mean)[:2048], full_matrices=False)
    axes = axes[:rank]

    def unexplained(others: Tensor) -> float:
        centered = others.flatten(1) - mean
        return float((centered - centered @ axes.T @ axes).square().mean())

    return unexplained(images[held_out].flip(3)) <= 1.3 * unexplained(images[held_out]) + 1e-9
