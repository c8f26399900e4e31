"""The dense bottleneck between device and cloud: few bounded numbers, each a weighted sum over all channels and positions."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from cem_fast._support.bottleneck import DenseBottleneck
from cem_fast.models.bottleneck import ACTIVATIONS

Shape = tuple[int, int, int]


class GroupedLinear(nn.Module):
    """One linear map per group of values: ``y_g = W_g x_g + b_g`` for ``[N, groups, n]``, flattened to ``[N, groups * m]``.

    Args:
        groups: number of groups.
        inputs: values of a group, n.
        outputs: results of a group, m.
        bias: whether to add a bias.

    Example:
        >>> import torch
        >>> from cem_fast.models.dense import GroupedLinear
        >>> GroupedLinear(4, 8, 2, bias=False)(torch.rand(3, 32)).shape
        torch.Size([3, 8])
    """

    bias: nn.Parameter | None

    def __init__(self, groups: int, inputs: int, outputs: int, bias: bool):
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(groups, outputs, inputs).uniform_(-bound, bound))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(groups * outputs).uniform_(-bound, bound)) if bias else None
        )

    def forward(self, values: Tensor) -> Tensor:
        count, groups = values.shape[0], self.weight.shape[0]  # len() would fix the batch in an export
        rows = values.reshape(count, groups, -1).transpose(0, 1)
        found = torch.bmm(rows, self.weight.mT).transpose(0, 1).reshape(count, -1)
        return found if self.bias is None else found + self.bias


class Squares(nn.Module):
    """Feature maps to rows with the values of each square of positions next to each other: ``[N, C, H, W] -> [N, groups C h w]``.

    Args:
        shape: ``(C, H, W)``; the sides are divided by the root of ``groups``.
        groups: number of squares.
        inverse: whether to turn rows into feature maps instead.

    Example:
        >>> import torch
        >>> from cem_fast.models.dense import Squares
        >>> maps = torch.arange(16.0).view(1, 1, 4, 4)
        >>> rows = Squares((1, 4, 4), 4)(maps)
        >>> rows[:, :4]
        tensor([[0., 1., 4., 5.]])
        >>> torch.equal(Squares((1, 4, 4), 4, inverse=True)(rows), maps)
        True
    """

    def __init__(self, shape: Shape, groups: int, *, inverse: bool = False):
        super().__init__()
        self.shape, self.side, self.inverse = shape, math.isqrt(groups), inverse

    def forward(self, values: Tensor) -> Tensor:
        (channels, height, width), side = self.shape, self.side
        if self.inverse:
            rows = values.view(-1, side, side, channels, height // side, width // side)
            return rows.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, height, width)
        maps = values.reshape(-1, channels, side, height // side, side, width // side)
        return maps.permute(0, 2, 4, 1, 3, 5).flatten(1)


class DenseCompress(nn.Sequential):
    """The device's half of a dense bottleneck: ``f = activation(BN(A vec(h)))``, as maps ``[N, r, 1, 1]``.

    A has no bias, since the normalization has one. A pool or a convolution in front shrinks h; groups and a rank structure A.

    Args:
        shape: ``(channels, height, width)`` of the features of the encoder's last stage.
        bottleneck: shape of the bottleneck.
        features: activation of the released features, ``sigmoid`` or ``relu``.

    Example:
        >>> import torch
        >>> from cem_fast.models import DenseBottleneck
        >>> from cem_fast.models.dense import DenseCompress
        >>> DenseCompress((16, 8, 8), DenseBottleneck(numbers=64, pool=2))(torch.rand(2, 16, 8, 8)).shape
        torch.Size([2, 64, 1, 1])
    """

    def __init__(self, shape: Shape, bottleneck: DenseBottleneck, features: str = "sigmoid"):
        super().__init__()
        channels, groups, numbers = shape[0], bottleneck.groups, bottleneck.numbers
        if convolution := bottleneck.convolution:
            window, channels = convolution.kernel, convolution.channels
            self.append(nn.Conv2d(shape[0], channels, window, stride=convolution.stride, padding=window // 2))
            if bottleneck.relu:
                self.append(nn.ReLU())
        elif bottleneck.pool > 1:
            self.append(nn.AvgPool2d(bottleneck.pool))
        height, width = (side // bottleneck.shrinkage for side in shape[1:])
        self.append(nn.Flatten() if groups == 1 else Squares((channels, height, width), groups))
        inputs = channels * height * width
        if bottleneck.rank is not None:
            self.append(_linear(groups, inputs, groups * bottleneck.rank, bias=False))
            inputs = groups * bottleneck.rank
        self.append(_linear(groups, inputs, numbers, bias=False))
        self.append(nn.BatchNorm1d(numbers))
        if features != "relu" or bottleneck.relu:
            self.append(ACTIVATIONS[features]())
        self.append(nn.Unflatten(1, (numbers, 1, 1)))

    def frozen(self) -> nn.Sequential:
        """The same map for use, with the normalization folded into A and a bias; a copy.

        Example:
            >>> from cem_fast.models import DenseBottleneck
            >>> from cem_fast.models.dense import DenseCompress
            >>> [type(layer).__name__ for layer in DenseCompress((4, 2, 2), DenseBottleneck(numbers=8)).frozen()]
            ['Flatten', 'Linear', 'Sigmoid', 'Unflatten']
        """
        layers = list(copy.deepcopy(self).eval())
        place = next(index for index, layer in enumerate(layers) if isinstance(layer, nn.BatchNorm1d))
        linear, normal = layers[place - 1], layers.pop(place)
        assert isinstance(linear, nn.Linear | GroupedLinear)
        assert isinstance(normal, nn.BatchNorm1d)
        assert normal.running_mean is not None
        assert normal.running_var is not None
        with torch.no_grad():
            scale = normal.weight * (normal.running_var + normal.eps).rsqrt()
            linear.weight *= scale.view(*linear.weight.shape[:-1], 1)
            linear.bias = nn.Parameter(normal.bias - normal.running_mean * scale)
        return nn.Sequential(*layers)


class DenseExpand(nn.Sequential):
    """The cloud's half of a dense bottleneck: ``h = ReLU(B z + b)``, as feature maps of the network's width and sides.

    Args:
        bottleneck: shape of the bottleneck.
        shape: ``(channels, height, width)`` of the features of the encoder's last stage.

    Example:
        >>> import torch
        >>> from cem_fast.models import DenseBottleneck
        >>> from cem_fast.models.dense import DenseExpand
        >>> DenseExpand(DenseBottleneck(numbers=64, groups=4), (16, 8, 8))(torch.rand(2, 64, 1, 1)).shape
        torch.Size([2, 16, 8, 8])
    """

    def __init__(self, bottleneck: DenseBottleneck, shape: Shape):
        groups = bottleneck.groups
        super().__init__(
            nn.Flatten(),
            _linear(groups, bottleneck.numbers, math.prod(shape), bias=True),
            nn.Unflatten(1, shape) if groups == 1 else Squares(shape, groups, inverse=True),
        )
        if bottleneck.relu:
            self.append(nn.ReLU())


def _linear(groups: int, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
    if groups == 1:
        return nn.Linear(inputs, outputs, bias=bias)
    return GroupedLinear(groups, inputs // groups, outputs // groups, bias)
