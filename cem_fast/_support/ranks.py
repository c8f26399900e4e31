"""Processes (ranks) that share every batch; their steps equal those of one process with whole batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
