"""The bottleneck between device and cloud: few, bounded channels."""

from __future__ import annotations

from torch import nn

from cem_fast._support.bottleneck import Bottleneck

ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU}  # of released features


class Compress(nn.Sequential):
    """The device's half of a bottleneck: a convolution to few channels, and the activation of released features.

    A Sigmoid bounds the features to (0, 1), so that training cannot outgrow noise of a fixed standard deviation. A ReLU, or no activation,
    does not.

    Args:
        channels: channels of the encoder's last stage.
        bottleneck: shape of the convolution.
        features: activation, ``sigmoid`` or ``relu``; a bottleneck with ``noRELU_`` has no ReLU.

    Example:
        >>> import torch
        >>> from cem_fast.models.bottleneck import Bottleneck, Compress
        >>> Compress(64, Bottleneck(channels=8, stride=2))(torch.rand(2, 64, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, channels: int, bottleneck: Bottleneck, features: str = "sigmoid"):
        kernel, stride = bottleneck.kernel, bottleneck.stride
        super().__init__(nn.Conv2d(channels, bottleneck.channels, kernel, stride=stride, padding=kernel // 2))
        if features != "relu" or bottleneck.relu:
            self.append(ACTIVATIONS[features]())


class Expand(nn.Sequential):
    """The cloud's half of a bottleneck: a convolution to the width of the network, transposed for strides above 1, and a ReLU.

    Sides that are not a multiple of the stride are larger afterwards than before the bottleneck.

    Args:
        bottleneck: shape of the convolution.
        channels: input channels of the decoder's first stage.

    Example:
        >>> import torch
        >>> from cem_fast.models.bottleneck import Bottleneck, Expand
        >>> Expand(Bottleneck(channels=8, stride=2), 64)(torch.rand(2, 8, 4, 4)).shape
        torch.Size([2, 64, 8, 8])
    """

    def __init__(self, bottleneck: Bottleneck, channels: int):
        kernel, stride = bottleneck.kernel, bottleneck.stride
        convolution: nn.Module
        if stride == 1:
            convolution = nn.Conv2d(bottleneck.channels, channels, kernel, padding=kernel // 2)
        else:
            convolution = nn.ConvTranspose2d(
                bottleneck.channels, channels, kernel, stride=stride, padding=kernel // 2, output_padding=stride - 1
            )
        super().__init__(convolution)
        if bottleneck.relu:
            self.append(nn.ReLU())
