"""Synchronized batch normalization: statistics over the rows of all processes, on any device and in any precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cem_fast._support.ranks import Ranks


class _Sum(torch.autograd.Function):
    """The sum over ranks; its gradient is the sum of the gradients of all ranks' losses."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(gradient.contiguous()), None


class _Synchronized(_BatchNorm):
    """Batch normalization by the statistics of all ranks' rows; torch's ``SyncBatchNorm`` is limited to GPUs."""

    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        sums = _Sum.apply(torch.cat([wide.sum(axes), wide.new_tensor([x.numel() // x.shape[1]])]), self.ranks)
        rows, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centered = wide - mean.view(shape)
        variance = _Sum.apply(centered.square().sum(axes), self.ranks) / rows
        self._follow(mean.detach(), variance.detach() * rows / (rows - 1).clamp_min(1))
        normal = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)

    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Moves the running statistics, if there are any, towards those of a batch."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


_SYNCHRONIZED: dict[type[nn.Module], type[_Synchronized]] = {
    kind: type(kind.__name__, (_Synchronized, kind), {}) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}


@contextmanager
def synchronized(network: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Synchronizes the batch normalization of a network inside the block; its parameters and buffers stay the same objects.

    Args:
        network: the network; subclasses of torch's batch normalization are left alone.
        ranks: the processes that train together; a single one changes nothing.

    Example:
        >>> from torch import nn
        >>> from cem_fast._support.ranks import Ranks
        >>> network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> with synchronized(network, Ranks()):
        ...     type(network[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    plain = [module for module in network.modules() if type(module) in _SYNCHRONIZED] if ranks.count > 1 else []
    kinds = [type(module) for module in plain]
    for module, kind in zip(plain, kinds):
        module.__class__ = _SYNCHRONIZED[kind]
        module.__dict__["ranks"] = ranks
    try:
        yield
    finally:
        for module, kind in zip(plain, kinds):
            del module.__dict__["ranks"]
            module.__class__ = kind
