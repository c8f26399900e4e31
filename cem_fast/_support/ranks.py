"""Data-parallel training: every process (rank) takes its share of a batch, and the step is that of one process with the whole batch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm

# A rank that has ended is noticed at once, wherever it leaves the others waiting; one that hangs, after this.
PATIENCE = timedelta(minutes=30)
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # what torchrun tells every process that it starts


@dataclass(frozen=True)
class Ranks:
    """The processes that train one network together.

    Args:
        group: their torch.distributed group; None for a single process.
    """

    group: Any = None

    @property
    def count(self) -> int:
        return 1 if self.group is None else distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else distributed.get_rank(self.group)

    def share(self, rows: Tensor) -> Tensor:
        """This rank's rows, a view; the shares of all ranks in their order are the rows again."""
        return rows.tensor_split(self.count)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks, the same bits on all of them."""
        if self.group is not None:
            values = values.clone()
            distributed.all_reduce(values, group=self.group)
        return values

    def average_gradients(self, parameters: Iterable[nn.Parameter], *, rows: int) -> None:
        """Makes gradients of means over this rank's rows those of the means over the rows of all ranks.

        Args:
            parameters: what has the gradients, the same on every rank.
            rows: rows of this rank.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.group is None or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        total = self.sum(torch.cat([flat * rows, flat.new_tensor([rows])]))
        for gradient, mean in zip(gradients, (total[:-1] / total[-1]).split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))


def count() -> int:
    """How many processes torchrun has started, this one included; 1 without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in LAUNCHER) else 1


def rank() -> int:
    """Which of them this process is; 0 without torchrun."""
    return int(os.environ["RANK"]) if count() > 1 else 0


@contextmanager
def together(device: torch.device) -> Iterator[tuple[Any, torch.device]]:
    """Joins the processes that torchrun has started, and parts from them when all are done.

    Args:
        device: where to compute; ``cuda`` without an index gives every process of a machine a GPU of its own.

    Yields:
        The group of the processes, None for a single one, and this process's device.

    Raises:
        ConnectionError: another process has ended before its time, or does not answer.
    """
    if count() == 1:
        yield None, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) if device.index is None else device.index)
        torch.cuda.set_device(device)
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        yield distributed.group.WORLD, device
        distributed.barrier()  # whoever leaves while another still talks to it aborts that one
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"process {rank()} of {count()} has lost another one, which has ended or did not answer within {PATIENCE}: {reason}"
        ) from error
    distributed.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends this process, at once if it has not parted from the others in order.

    A thread of gloo's may then still hold a tensor of Python's, and letting go of it takes the interpreter: asked for while the
    interpreter ends, that aborts the process.

    Args:
        status: the exit status.

    Source:
        https://github.com/pytorch/pytorch/issues/190489
    """
    if distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def _is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error comes from talking to another process: gloo has no exception of its own."""
    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in ("gloo", "process group"))


class _Sum(torch.autograd.Function):
    """The sum over ranks, whose gradient is the sum of what every rank's loss gives it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return ranks.sum(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.ranks.sum(gradient.contiguous()), None


class _OverRanks(_BatchNorm):
    """Batch normalization by the statistics of all ranks' rows; torch's SyncBatchNorm is the same for GPUs alone."""

    ranks: Ranks

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        rows = wide.new_tensor([x.numel() // x.shape[1]])
        sums = _Sum.apply(torch.cat([wide.sum(axes), rows]), self.ranks)
        rows, mean = sums[-1].detach(), sums[:-1] / sums[-1].detach()
        centered = wide - mean.view(shape)
        variance = _Sum.apply(centered.square().sum(axes), self.ranks) / rows
        if self.running_mean is not None:
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), share)
            self.running_var.lerp_(variance.detach() * rows / (rows - 1).clamp_min(1), share)
        normal = centered * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(x.dtype)


_SYNCHRONIZED = {
    kind: type(kind.__name__, (_OverRanks, kind), {}) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
}


@contextmanager
def synchronized(network: nn.Module, ranks: Ranks) -> Iterator[None]:
    """Lets the batch normalization of a network take its statistics over the rows of all ranks inside the block."""
    plain = [(module, type(module)) for module in network.modules() if type(module) in _SYNCHRONIZED]
    if ranks.count == 1:
        plain = []
    for module, kind in plain:
        module.ranks, module.__class__ = ranks, _SYNCHRONIZED[kind]
    try:
        yield
    finally:
        for module, kind in plain:
            del module.ranks
            module.__class__ = kind
