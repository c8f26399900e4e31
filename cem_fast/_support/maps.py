"""Features of any shape as maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FURTHER_TOKENS = 5  # of a transformer apart from its patches: a class token, a distillation token, registers


def as_maps(features: Tensor, image_shape: Sequence[int]) -> Tensor:
    """Features as maps ``[N, C, H, W]``.

    Tokens ``[N, T, D]`` of a grid of patches become maps of D channels; up to five further tokens, such as a class token, are repeated at
    every place. Vectors, and tokens without a grid, become maps of one pixel.

    Args:
        features: ``[N, ...]``.
        image_shape: ``(channels, height, width)`` of the images; the grid has their aspect ratio, apart from a cropped border.

    Source:
        Dosovitskiy et al., "An image is worth 16x16 words", ICLR 2021 (the grid, and a class token in front).

    Example:
        >>> import torch
        >>> from cem_fast._support.maps import as_maps
        >>> for shape in ((8, 4, 4), (16, 8), (17, 8), (9,)):
        ...     print(tuple(as_maps(torch.rand(2, *shape), (3, 32, 32)).shape))
        (2, 8, 4, 4)
        (2, 8, 4, 4)
        (2, 16, 4, 4)
        (2, 9, 1, 1)
    """
    if features.dim() == 4:
        return features
    if features.dim() == 3 and (grid := _grid(features.shape[1], image_shape)):
        rows, columns = grid
        further, places = features.tensor_split([features.shape[1] - rows * columns], dim=1)
        maps = places.transpose(1, 2).unflatten(2, grid)
        everywhere = further.flatten(1)[:, :, None, None].expand(-1, -1, rows, columns)
        return torch.cat([maps, everywhere], 1)
    return features.flatten(1)[:, :, None, None]


def _grid(tokens: int, image_shape: Sequence[int]) -> tuple[int, int] | None:
    """Rows and columns of a grid of square patches, behind at most five further tokens."""
    _, height, width = image_shape
    in_ratio = [(rows, rows * width // height) for rows in range(height, 1, -1) if rows * width % height == 0]
    cropped = [(height // side, width // side) for side in range(1, min(height, width) + 1)]
    for rows, columns in in_ratio + cropped:
        if rows * columns > 1 and 0 <= tokens - rows * columns <= FURTHER_TOKENS:
            return rows, columns
    return None
