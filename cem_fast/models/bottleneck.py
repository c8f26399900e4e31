"""The bottleneck between device and cloud: few channels to send, and bounded ones."""

from __future__ import annotations

from torch import nn

from cem_fast._support.bottleneck import Bottleneck

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}  # what released features may end in


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
