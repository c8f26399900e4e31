"""Rows of a fit: in chunks, streams and shards of several processes, with their classes and sample weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from cem_fast.ops.library import OPERATORS

_STATISTICS = OPERATORS["component_statistics_fwd"]

# Rows of classes that have not converged are copied together once they are at most this share of all rows.
ACTIVE_SHARE = 0.25

# Least mass of a component that has rows, if rows have sample weights. Otherwise it is one row.
LEAST_MASS = torch.finfo(torch.float64).tiny


class Chunk(NamedTuple):
    """Rows ``[n, D]``; their labels ``[n]``, int64 in range, or None for one class; their sample weights ``[n]``, or None."""

    x: Tensor
    labels: Tensor | None = None
    mass: Tensor | None = None


class Rows:
    """Chunks that can be iterated any number of times: this rank's shard of all rows.

    Args:
        chunks: re-iterable; ``(x, labels)`` or ``(x, labels, sample weights)``.
        group: torch.distributed group of the ranks that hold the shards; None for a single process.
        name: their name in errors.
        weighted: whether rows of any rank have sample weights.
    """

    def __init__(
        self,
        chunks: Iterable[tuple[Any, ...]],
        group: distributed.ProcessGroup | None = None,
        name: str = "x",
        weighted: bool = False,
    ):
        self.chunks, self.group, self.name, self.weighted = chunks, group, name, weighted

    def __iter__(self) -> Iterator[Chunk]:
        return (Chunk(*chunk) for chunk in self.chunks)

    def like(self, chunks: Iterable[Chunk]) -> Rows:
        """Other rows of the same ranks."""
        return Rows(chunks, self.group, self.name, self.weighted)

    @property
    def in_one_piece(self) -> bool:
        return self.group is None and isinstance(self.chunks, list) and len(self.chunks) == 1

    @property
    def least_mass(self) -> float:
        return LEAST_MASS if self.weighted else 1.0

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else distributed.get_rank(self.group)

    def reduce(self, value: Tensor, operation: distributed.ReduceOp.RedOpType = distributed.ReduceOp.SUM) -> Tensor:
        """Sum (or another reduction) over the ranks' values; all ranks get the same bits.

        Raises:
            RuntimeError: a rank has ended or does not answer before the timeout.
        """
        if self.group is not None:
            value = value.contiguous()
            try:
                distributed.all_reduce(value, operation, group=self.group)
            except RuntimeError as error:
                raise RuntimeError(
                    f"rank {self.rank} of {self.ranks} cannot sum its statistics with the others: a rank has ended, "
                    f"or did not answer within the process group's timeout ({error})"
                ) from error
        return value

    def add_up(self, values: Iterable[tuple[Tensor, ...]], like: tuple[Tensor, ...]) -> list[Tensor]:
        """Sums of statistics over chunks and ranks, in double precision; ``like`` gives their shapes."""
        total: list[Tensor] | None = None
        for parts in values:
            more = [part.double() for part in parts]
            total = more if total is None else [a + b for a, b in zip(total, more)]
        if total is None:
            total = [torch.zeros_like(t, dtype=torch.float64) for t in like]
        if self.group is not None:
            sums = self.reduce(torch.cat([t.flatten() for t in total]))
            total = list(sums.split_with_sizes([t.numel() for t in like]))  # torch.split checks more than it splits
        return [part.reshape(t.shape) for part, t in zip(total, like)]

    def renumbered(self, classes: Tensor, num_classes: int) -> Rows:
        """Copies of the rows of the given classes ``[n]``, which become the classes 0, 1, ..."""
        place = torch.full((num_classes,), -1, device=classes.device)
        place[classes] = torch.arange(len(classes), device=classes.device)
        chunks: list[Chunk] = []
        for x, labels, mass in self:
            if labels is not None:
                new = place[labels]
                keep = new >= 0
                x, labels, mass = x[keep], new[keep], None if mass is None else mass[keep]
            chunks.append(Chunk(x, labels, mass))
        return self.like(chunks)

    def of(self, classes: Tensor) -> Rows:
        """Copies of the rows of the given classes ``[C]`` (bool) if they are few; otherwise all rows."""
        if not isinstance(self.chunks, list):
            return self
        kept = []
        for x, labels, mass in self:
            if labels is None:
                return self
            rows = classes[labels].nonzero().squeeze(1)
            if len(rows) > ACTIVE_SHARE * len(x):
                return self
            kept.append(Chunk(x[rows], labels[rows], None if mass is None else mass[rows]))
        return self.like(kept)


def require_iterable_again(name: str, batches: Any) -> None:
    """Requires an iterable that is no iterator."""
    if isinstance(batches, Iterator) or not hasattr(batches, "__iter__"):
        got = "an iterator" if isinstance(batches, Iterator) else type(batches).__name__
        raise TypeError(f"{name} must be iterable more than once (a list or a loader), got {got}")


class Stream:
    """Chunks that are read again in every pass; ``on_pass(number, rows)`` is called after each.

    Raises:
        ValueError: batches differ in their number of features, or passes in their number of rows.
    """

    def __init__(
        self,
        read: Callable[[], Iterator[tuple[Any, ...]]],
        on_pass: Callable[[int, int], None] | None = None,
        name: str = "batches",
    ):
        self.read, self.on_pass, self.name, self.passes = read, on_pass, name, 0
        self.rows = 0  # of the first pass

    def __iter__(self) -> Iterator[Chunk]:
        self.passes += 1
        count, width = 0, None
        for chunk in self.read():
            if width not in (None, chunk[0].shape[1]):
                raise ValueError(
                    f"{self.name} must agree in features, got {width} and then {chunk[0].shape[1]} of a row"
                )
            count, width = count + len(chunk[0]), chunk[0].shape[1]
            yield Chunk(*chunk)
        if self.passes > 1 and count != self.rows:
            # such as a loader of an iterator, which is exhausted after the first pass
            raise ValueError(
                f"{self.name} must give the same rows in every iteration over them, got {self.rows} and then {count}"
            )
        self.rows = count
        if self.on_pass is not None:
            self.on_pass(self.passes, count)


def draw_sample(
    stream: Stream, num_classes: int, memory_budget: int, generator: torch.Generator | None
) -> tuple[list[Chunk], Tensor, bool]:
    """Rows of one pass: all of them if they fit in half the memory budget, otherwise a uniform sample of each class.

    Returns:
        The rows as chunks, the mass ``[C]`` of the rows of each class in the pass, and whether all were kept.

    Raises:
        ValueError: labels are out of range, or only some batches have sample weights.
    """
    held: list[tuple[Tensor, ...]] = []  # rows, labels, random keys, and sample weights if there are any
    sizes, complete, size = torch.zeros(num_classes, dtype=torch.float64), True, 0
    device = "cpu" if generator is None else generator.device

    def bytes_of(chunk: tuple[Tensor, ...]) -> int:
        return sum(part.numel() * part.element_size() for part in chunk)

    def shrink() -> None:
        labels, keys = (torch.cat([kept[part] for kept in held]) for part in (1, 2))
        order = keys.argsort()
        order = order[labels[order].argsort(stable=True)]
        counts = torch.bincount(labels, minlength=num_classes)
        place = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
        stays = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        stays[order[place < max(1, memory_budget * len(labels) // (4 * num_classes * size))]] = True
        # chunk by chunk, so that memory never holds all rows twice
        for i, of_chunk in enumerate(torch.split(stays, [len(kept[0]) for kept in held])):
            rows = of_chunk.nonzero().squeeze(1)
            held[i] = tuple(part[rows] for part in held[i])
        held[:] = [tuple(torch.cat(parts) for parts in zip(*held))]

    for x, labels, mass in stream:
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if labels is None else labels
        weights = () if mass is None else (mass,)
        if held and len(held[0]) != 3 + len(weights):
            raise ValueError("sample_weight must come with every batch or with none, got some batches without it")
        held.append((x, labels, torch.rand(len(x), generator=generator, device=device).to(x.device), *weights))
        each = torch.ones_like(labels, dtype=torch.float64) if mass is None else mass.double()
        sizes = sizes.to(x.device) + class_totals(each, labels, num_classes)
        size += bytes_of(held[-1])
        if size > memory_budget // 2:
            shrink()
            complete, size = False, bytes_of(held[0])
    sizes = sizes.cpu()
    if bool(sizes.isnan().any()):
        raise ValueError(f"labels must lie in [0, {num_classes}), got others in a batch")
    if not complete:
        shrink()  # later rows must not be more likely to stay than earlier ones
    return [Chunk(x, labels, *weights) for x, labels, _, *weights in held], sizes, complete


def class_totals(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sums of float64 values ``[N]`` by class ``[C]``, the same bits in every run."""
    if values.is_cpu:
        return values.new_zeros(num_classes).index_add_(0, labels, values)
    return ordered_totals(values, labels, num_classes)


def ordered_totals(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Class totals on a GPU, where ``index_add_`` would add in any order; NaN if a label is out of range."""
    zeros = values.new_zeros(num_classes, 1, 1)
    sums: Tensor = _STATISTICS(values.unsqueeze(1), zeros, labels, None, None, False, True)[2]
    return sums.flatten()


def running_sum(values: Tensor) -> Tensor:
    """Cumulative sum of float64 values ``[N]``, the same bits in every run."""
    return values.cumsum(0) if values.is_cpu else blocked_running_sum(values)


def blocked_running_sum(values: Tensor) -> Tensor:
    """Cumulative sum on a GPU: torch scans a vector in an order that depends on timing, but each row of a matrix in one block."""
    rows = torch.nn.functional.pad(values, (0, -len(values) % 1024)).view(-1, 1024).cumsum(1)
    before = torch.nn.functional.pad(rows[:-1, -1], (1, 0)).expand(2, -1).cumsum(1)[0]
    return (rows + before.unsqueeze(1)).flatten()[: len(values)]


def class_sizes(rows: Rows, num_classes: int, device: torch.device) -> Tensor:
    """Mass of the rows of each class in this shard ``[C]``, float64."""
    sizes = torch.zeros(num_classes, dtype=torch.float64, device=device)
    for x, labels, mass in rows:
        if labels is None and mass is None:
            sizes += len(x)
            continue
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if labels is None else labels
        each = torch.ones_like(labels, dtype=torch.float64) if mass is None else mass.double()
        sizes += class_totals(each, labels, num_classes)
    return sizes
