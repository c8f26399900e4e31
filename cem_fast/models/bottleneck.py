"""The bottleneck between device and cloud: few channels to send, and bounded ones."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}  # what released features may end in
GRAMMAR = re.compile(r"(noRELU_)?(?:K([0-9]{1,4}))?C([0-9]{1,4})S([0-9]{1,4})")


@dataclass(frozen=True)
class Bottleneck:
    """What a bottleneck's two convolutions are like.

    Args:
        channels: channels of the features that leave the device.
        stride: by how much the device shrinks the features' sides, and the cloud enlarges them again.
        kernel: side of both convolutions' windows, odd.
        relu: whether a ReLU follows a convolution that no Sigmoid follows.

    Source:
        Xia et al., CVPR 2025, and Li et al., "ResSFL: a resistance transfer framework for defending model inversion attack in split
        federated learning", CVPR 2022 (the notation).
    """

    channels: int
    stride: int = 1
    kernel: int = 3
    relu: bool = True

    @classmethod
    def parse(cls, text: int | str) -> Bottleneck | None:
        """Reads a bottleneck as users write it.

        Args:
            text: a number of channels, or ``[noRELU_][Kk]CcSs``: ``noRELU_C8S1`` and ``K5C8S2`` have 8 channels, a stride of 1 and 2, and
                a window of 3 and 5 pixels. 8 means ``C8S1``.

        Returns:
            The bottleneck; None for 0 channels, which is none.

        Raises:
            ValueError: it is neither, or one of its numbers is out of range.
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


class Compress(nn.Sequential):
    """The device's half: a convolution down to a few channels, then the activation of released features.

    A Sigmoid bounds the features to (0, 1): noise of a fixed standard deviation cannot be drowned by features that grow. A ReLU, or
    nothing, lets them grow.

    Args:
        channels: channels of the encoder's last stage.
        bottleneck: what the convolution is like.
        features: ``sigmoid``, or ``relu``, which ``noRELU_`` leaves out.
    """

    def __init__(self, channels: int, bottleneck: Bottleneck, features: str = "sigmoid"):
        kernel, stride = bottleneck.kernel, bottleneck.stride
        super().__init__(nn.Conv2d(channels, bottleneck.channels, kernel, stride=stride, padding=kernel // 2))
        if features != "relu" or bottleneck.relu:
            self.append(ACTIVATIONS[features]())


class Expand(nn.Sequential):
    """The cloud's half: a convolution back to the width of the network, transposed where the device shrank the sides, then a ReLU.

    Sides that the stride does not divide come back larger than they were.

    Args:
        bottleneck: what the convolution is like.
        channels: channels that the first stage of the cloud expects.
    """

    def __init__(self, bottleneck: Bottleneck, channels: int):
        kernel, stride = bottleneck.kernel, bottleneck.stride
        if stride == 1:
            convolution = nn.Conv2d(bottleneck.channels, channels, kernel, padding=kernel // 2)
        else:
            convolution = nn.ConvTranspose2d(
                bottleneck.channels, channels, kernel, stride=stride, padding=kernel // 2, output_padding=stride - 1
            )
        super().__init__(convolution)
        if bottleneck.relu:
            self.append(nn.ReLU())
