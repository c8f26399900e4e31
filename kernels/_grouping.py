"""Rows grouped by class on the device, without synchronization."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from cem_fast.kernels import _configs
from cem_fast.kernels._launch import cdiv, configuration, kernel, launch, multiprocessors
from cem_fast.kernels._rows import NATURAL, SCANNED, SCANNED_ROWS, SORTED, only_if
from torch import Tensor


@triton.jit
def _load_classes(labels_ptr, n, N, C):
    """Classes of rows; labels out of range are class C, rows past the end class C + 1."""
    label = tl.load(labels_ptr + n, mask=n < N, other=0)
    label = tl.where((label >= 0) & (label < C), label, C).to(tl.int32)
    return tl.where(n < N, label, C + 1)


@kernel()
def pairwise_sort_kernel(
    labels_ptr, order_ptr, offsets_ptr, N, C, row_programs, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Stable sort by class: the place of a row is the number of rows before it. The last programs count the offsets."""
    program = tl.program_id(0)
    count = tl.zeros([BLOCK], tl.int32)
    if program < row_programs:
        n = program * BLOCK + tl.arange(0, BLOCK)
        label = _load_classes(labels_ptr, n, N, C)
        for start in range(0, N, CHUNK):
            m = start + tl.arange(0, CHUNK)
            other = _load_classes(labels_ptr, m, N, C)
            earlier = (other[None, :] == label[:, None]) & (m[None, :] < n[:, None])
            count += tl.sum(((other[None, :] < label[:, None]) | earlier).to(tl.int32), 1)
        tl.store(order_ptr + count, n.to(tl.int64), mask=n < N)
    else:
        c = (program - row_programs) * BLOCK + tl.arange(0, BLOCK)
        for start in range(0, N, CHUNK):
            other = _load_classes(labels_ptr, start + tl.arange(0, CHUNK), N, C)
            count += tl.sum((other[None, :] < c[:, None]).to(tl.int32), 1)
        tl.store(offsets_ptr + c, count.to(tl.int64), mask=c < C + 2)


@triton.jit
def place_rows(labels_ptr, next_ptr, order_ptr, begin, end, C, with_order, CHUNK: tl.constexpr):
    """Assigns rows in order to the places ``next[class]++``; stores them there if ``with_order``."""
    i = tl.arange(0, CHUNK)
    for start in range(begin, end, CHUNK):
        n = start + i
        label = _load_classes(labels_ptr, n, end, C)
        same = label[:, None] == _load_classes(labels_ptr, n, end, C)[None, :]
        earlier = tl.sum((same & (i[None, :] < i[:, None])).to(tl.int32), 1)
        later = tl.sum((same & (i[None, :] > i[:, None])).to(tl.int32), 1)
        place = tl.load(next_ptr + label, mask=n < end, other=0) + earlier
        tl.debug_barrier()
        if with_order:
            tl.store(order_ptr + place, n.to(tl.int64), mask=n < end)
        tl.store(next_ptr + label, place + 1, mask=(n < end) & (later == 0))
        tl.debug_barrier()


@kernel()
def count_kernel(labels_ptr, counts_ptr, N, C, rows_of_program, SPAN: tl.constexpr, CHUNK: tl.constexpr):
    """Number of each program's rows per class, ``[programs, C + 1]``."""
    program = tl.program_id(0)
    counts_ptr += program.to(tl.int64) * (C + 1)
    for first in range(0, C + 1, SPAN):
        c = first + tl.arange(0, SPAN)
        tl.store(counts_ptr + c, (c * 0).to(tl.int64), mask=c <= C)
    tl.debug_barrier()
    begin = program * rows_of_program
    # the sum may exceed 32 bits
    end = begin + tl.minimum(rows_of_program, N - begin)
    place_rows(labels_ptr, counts_ptr, counts_ptr, begin, end, C, False, CHUNK)


@kernel()
def place_kernel(
    labels_ptr,
    counts_ptr,
    next_ptr,  # [programs, C + 1]: where the next row of each class of each program's rows goes
    order_ptr,
    offsets_ptr,
    N,
    C,
    rows_of_program,
    programs,
    SPAN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Stable sort by class: rows of lower classes come first, then those of the same class that earlier programs hold."""
    program = tl.program_id(0)
    next_ptr += program.to(tl.int64) * (C + 1)
    placed = tl.zeros([1], tl.int64)
    for first in range(0, C + 1, SPAN):
        c = first + tl.arange(0, SPAN)
        size = tl.zeros([SPAN], tl.int64)
        before = tl.zeros([SPAN], tl.int64)
        for start in range(0, programs, SPAN):
            p = start + tl.arange(0, SPAN)
            at = p.to(tl.int64)[:, None] * (C + 1) + c[None, :]
            count = tl.load(counts_ptr + at, mask=(p < programs)[:, None] & (c <= C)[None, :], other=0)
            size += tl.sum(count, 0)
            before += tl.sum(tl.where((p < program)[:, None], count, 0), 0)
        offset = placed + tl.cumsum(size, 0) - size
        tl.store(next_ptr + c, offset + before, mask=c <= C)
        tl.store(offsets_ptr + c, offset, mask=only_if(program == 0, c <= C))
        placed += tl.sum(size, 0)
    tl.store(offsets_ptr + C + 1 + tl.arange(0, 1), placed, mask=only_if(program == 0, tl.arange(0, 1) == 0))
    tl.debug_barrier()
    begin = program * rows_of_program
    end = begin + tl.minimum(rows_of_program, N - begin)
    place_rows(labels_ptr, next_ptr, order_ptr, begin, end, C, True, CHUNK)


class Groups(NamedTuple):
    """Rows of one operation by class.

    ``index`` holds the labels ``[N]`` (scanned) or the sorted rows (sorted), ``offsets`` the first rank of every class
    ``[C + 2]`` (sorted only), ``pieces`` the number of segments that every class is cut into (scanned only).
    """

    grouping: int
    index: Tensor
    offsets: Tensor
    pieces: int
    rows: int
    classes: int

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a kernel that finds its rows with ``find_segment``."""
        return dict(
            index_ptr=self.index,
            offsets_ptr=self.offsets,
            N=self.rows,
            C=self.classes,
            P=self.pieces,
            grouping=self.grouping,
        )

    def segments(self, size: int) -> int:
        """Segments of at most ``size`` rows."""
        if self.grouping == SCANNED.value:
            return (self.classes + 1) * self.pieces
        if self.grouping == SORTED.value:
            return self.rows // size + self.classes + 1
        return cdiv(self.rows, size)

    def segment_size(self, block_n: int, partials: int, like: Tensor) -> int:
        """Rows per segment, a multiple of ``block_n``, if each segment stores ``partials`` numbers.

        With enough rows there are two to four segments per multiprocessor, or fewer, but at least one, to save memory.
        """
        wanted, least = 2 * multiprocessors(like), multiprocessors(like)
        wanted = min(wanted, max(least, _configs.PARTIALS // partials))
        return block_n * max(1, self.rows // (block_n * wanted))

    def splits(self, block_n: int, D: int, like: Tensor) -> int:
        """Parts into which a forward splits the dimensions, for two programs per multiprocessor."""
        if self.rows > _configs.SPLIT_ROWS:
            return 1
        busy = self.rows // block_n + min(self.classes, self.rows)
        wanted = cdiv(2 * multiprocessors(like), max(1, busy))
        return max(1, min(wanted, D // _configs.SPLIT_DIMENSIONS, 16))


def group(labels: Tensor | None, N: int, C: int, block_n: int, like: Tensor) -> Groups:
    """Groups rows by class: without a launch up to ``SCANNED_ROWS``, with one up to ``PAIRWISE_SORT_ROWS``, else with two.

    Raises:
        ValueError: the number of rows exceeds 32 bits (the number of elements may).
    """
    if N >= 2**31 - 2**16:
        raise ValueError(f"x must have fewer than 2^31 - 2^16 rows, got {N}")
    nothing = like.new_empty(0, dtype=torch.int64)
    if labels is None:
        return Groups(NATURAL.value, nothing, nothing, 1, N, C)
    labels = labels.contiguous()
    if N <= SCANNED_ROWS:
        return Groups(SCANNED.value, labels, nothing, max(1, cdiv(N, C * block_n)), N, C)
    order, offsets = torch.empty_like(labels), labels.new_empty(C + 2)
    if N <= _configs.PAIRWISE_SORT_ROWS:
        _sort_by_pairs(labels, order, offsets)
    else:
        _sort_by_counting(labels, order, offsets)
    return Groups(SORTED.value, order, offsets, 1, N, C)


def _sort_by_pairs(labels: Tensor, order: Tensor, offsets: Tensor) -> None:
    N, C = labels.shape[0], offsets.shape[0] - 2
    config = configuration("sort", labels)
    block = config.BLOCK_N
    row_programs = cdiv(N, block)
    launch(
        pairwise_sort_kernel,
        row_programs + cdiv(C + 2, block),
        config,
        labels,
        labels_ptr=labels,
        order_ptr=order,
        offsets_ptr=offsets,
        N=N,
        C=C,
        row_programs=row_programs,
        BLOCK=block,
        CHUNK=config.BLOCK_D,
    )


def _sort_by_counting(labels: Tensor, order: Tensor, offsets: Tensor) -> None:
    N, C = labels.shape[0], offsets.shape[0] - 2
    config = configuration("count", labels)
    programs = max(1, min(_configs.COUNTS // (C + 1), cdiv(N, _configs.COUNTED_ROWS)))
    rows_of_program = cdiv(cdiv(N, programs), config.BLOCK_N) * config.BLOCK_N
    programs = cdiv(N, rows_of_program)
    counts, following = labels.new_empty(programs, C + 1), labels.new_empty(programs, C + 1)
    shared = dict(
        labels_ptr=labels,
        counts_ptr=counts,
        N=N,
        C=C,
        rows_of_program=rows_of_program,
        SPAN=config.BLOCK_D,
        CHUNK=config.BLOCK_N,
    )
    launch(count_kernel, programs, config, labels, **shared)
    launch(
        place_kernel,
        programs,
        config,
        labels,
        next_ptr=following,
        order_ptr=order,
        offsets_ptr=offsets,
        programs=programs,
        **shared,
    )
