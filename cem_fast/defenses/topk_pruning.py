"""Pruning of features: only the largest of every image are released."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_fast._support.counts import require_number
from cem_fast.defenses.base import Defense


class TopKPruning(Defense):
    """Releases the features of greatest magnitude of every image, and zero for the others.

    Args:
        pruned_share: share of the features of an image that is set to zero, between 0 and 1; at least one is kept.

    Raises:
        ValueError: ``pruned_share`` is not between 0 and 1.

    Source:
        Zhu, Liu and Han, "Deep leakage from gradients", NeurIPS 2019, where small entries of gradients are pruned before they are shared;
        the released code of Xia et al., CVPR 2025, which prunes features in this way.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> defenses.TopKPruning(pruned_share=0.5).release(torch.tensor([[0.1, -0.9, 0.2, 0.5]]))
        tensor([[ 0.0000, -0.9000,  0.0000,  0.5000]])
    """

    keeps_range = True

    def __init__(self, *, pruned_share: float):
        super().__init__()
        if not 0 < require_number("pruned_share", pruned_share) < 1:
            raise ValueError(f"pruned_share must be between 0 and 1, got {pruned_share}")
        self.pruned_share = pruned_share

    def release(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        rows = features.flatten(1)
        kept = max(1, round((1 - self.pruned_share) * rows.shape[1]))
        mask = torch.zeros_like(rows).scatter(1, rows.abs().topk(kept, dim=1).indices, 1.0)
        return features * mask.view_as(features)
