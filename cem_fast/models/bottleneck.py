"""The bottleneck between device and cloud: few channels to send, and bounded ones."""

from __future__ import annotations

from torch import nn


class Compress(nn.Sequential):
    """The device's half: a 3x3 convolution down to a few channels, then a Sigmoid.

    The Sigmoid bounds the features to (0, 1): noise of a fixed standard deviation cannot be drowned by features that grow.

    Args:
        channels: channels of the encoder's last stage.
        bottleneck: channels of the features that leave the device.
    """

    def __init__(self, channels: int, bottleneck: int):
        super().__init__(nn.Conv2d(channels, bottleneck, 3, padding=1), nn.Sigmoid())


class Expand(nn.Sequential):
    """The cloud's half: a 3x3 convolution back to the width of the network, then a ReLU.

    Args:
        bottleneck: channels of the features that leave the device.
        channels: channels that the first stage of the cloud expects.
    """

    def __init__(self, bottleneck: int, channels: int):
        super().__init__(nn.Conv2d(bottleneck, channels, 3, padding=1), nn.ReLU())
