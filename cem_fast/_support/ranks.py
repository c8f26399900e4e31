"""Processes (ranks) that share every batch; their steps equal those of one process with whole batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# A rank that has ended is noticed at once, wherever it leaves the others waiting; one that hangs, after this.
PATIENCE = timedelta(minutes=30)
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # what torchrun tells every process that it starts


@dataclass(frozen=True)
class Ranks:
    """The processes that train one network together.

    Args:
        group: their torch.distributed group; None for a single process.

    Example:
        >>> import torch
        >>> from cem_fast._support.ranks import Ranks
        >>> alone = Ranks()
        >>> alone.count, alone.rank
        (1, 0)
        >>> alone.share(torch.arange(3))
        tensor([0, 1, 2])
    """

    group: ProcessGroup | None = None

    @property
    def count(self) -> int:
        """Number of processes."""
        return 1 if self.group is None else distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        """Index of this process, from 0."""
        return 0 if self.group is None else distributed.get_rank(self.group)

    def share(self, rows: Tensor) -> Tensor:
        """Returns this rank's rows, a view; the shares of all ranks in order make up ``rows``."""
        return rows.tensor_split(self.count)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum over the ranks, the same bits on all of them."""
        if self.group is not None:
            values = values.clone()
            distributed.all_reduce(values, group=self.group)
        return values

    def average_gradients(self, parameters: Iterable[nn.Parameter], *, rows: int) -> None:
        """Replaces gradients of means over this rank's rows by those of the means over the rows of all ranks.

        Args:
            parameters: the parameters, in the same order on every rank.
            rows: number of this rank's rows.
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
