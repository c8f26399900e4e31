"""Notation of bottlenecks; without torch, so that settings are checked before it is imported."""

from __future__ import annotations

import re
from dataclasses import dataclass

GRAMMAR = re.compile(r"(noRELU_)?(?:K([0-9]{1,4}))?C([0-9]{1,4})S([0-9]{1,4})")


@dataclass(frozen=True)
class Bottleneck:
    """Shape of the two convolutions of a bottleneck.

    Args:
        channels: channels of the released features.
        stride: stride of the convolution on the device, and of the transposed one in the cloud.
        kernel: side of both windows in pixels, odd.
        relu: whether a ReLU follows each convolution without a Sigmoid.

    Source:
        Xia et al., CVPR 2025, and Li et al., "ResSFL: a resistance transfer framework for defending model inversion attack in split
        federated learning", CVPR 2022 (the notation).

    Example:
        >>> from cem_fast import models
        >>> models.Bottleneck(channels=8)
        Bottleneck(channels=8, stride=1, kernel=3, relu=True)
    """

    channels: int
    stride: int = 1
    kernel: int = 3
    relu: bool = True

    @classmethod
    def parse(cls, text: int | str) -> Bottleneck | None:
        """Parse the notation of a bottleneck.

        Args:
            text: a number of channels, or ``[noRELU_][Kk]CcSs``: ``noRELU_C8S1`` and ``K5C8S2`` have 8 channels, a stride of 1 and 2, and
                a window of 3 and 5 pixels. 8 means ``C8S1``.

        Returns:
            The bottleneck; None for 0 channels.

        Raises:
            ValueError: the text is neither, or a number is out of range.

        Example:
            >>> from cem_fast.models import Bottleneck
            >>> Bottleneck.parse("noRELU_K5C8S2")
            Bottleneck(channels=8, stride=2, kernel=5, relu=False)
        """
        if isinstance(text, int):
            if text < 0:
                raise ValueError(f"bottleneck must be a number of channels or 0, got {text}")
            return cls(text) if text else None
        found = GRAMMAR.fullmatch(text)
        if not found:
            raise ValueError(
                "bottleneck must be a number of channels, 0 for none, or [noRELU_][Kk]CcSs as in noRELU_K3C8S1, "
                f"got {text!r}"
            )
        linear, kernel, channels, stride = found.groups()
        bottleneck = cls(int(channels), int(stride), int(kernel or 3), linear is None)
        if not bottleneck.channels or not bottleneck.stride:
            raise ValueError(f"bottleneck must have at least 1 channel and a stride of at least 1, got {text!r}")
        if not bottleneck.kernel % 2 or bottleneck.kernel < bottleneck.stride:
            raise ValueError(f"bottleneck must have an odd window no smaller than its stride, got {text!r}")
        return bottleneck
