"""A bottleneck alone: few channels leave the device, unchanged."""

from __future__ import annotations

from cem_fast.defenses.base import Defense


class Bottleneck(Defense):
    """Releases the bottleneck's features as they are.

    Source:
        Eshratifar et al., "BottleNet: a deep learning architecture for intelligent mobile cloud computing services", ISLPED 2019 (to
        save traffic); Li et al., "ResSFL: a resistance transfer framework for defending model inversion attack in split federated
        learning", CVPR 2022 (to resist inversion).

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> features = torch.rand(2, 8, 4, 4)
        >>> torch.equal(defenses.Bottleneck().release(features), features)
        True
    """

    keeps_range = True
