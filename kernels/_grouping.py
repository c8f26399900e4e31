"""Rows grouped by class on the device, without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from cem_fast.kernels import _configs
from cem_fast.kernels._launch import cdiv, configuration, kernel, launch, multiprocessors
from cem_fast.kernels._rows import NATURAL, SCANNED, SCANNED_ROWS, SORTED
from torch import Tensor


@triton.jit
def _load_classes(labels_ptr, n, N, C):
    """Classes of rows; stray labels are class C, rows behind the last class C + 1."""
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


class Groups(NamedTuple):
    """How the kernels of one operation find their rows.

    ``index`` holds the labels ``[N]`` (scanned) or the sorted rows (sorted), ``offsets`` the first rank of every class
    ``[C + 2]`` (sorted only), ``pieces`` the number of segments that every class is cut into (scanned only).
    """

    grouping: int
    index: Tensor
    offsets: Tensor
    pieces: int
    rows: int
    classes: int

    def segments(self, block_n: int) -> int:
        if self.grouping == SCANNED.value:
            return (self.classes + 1) * self.pieces
        if self.grouping == SORTED.value:
            return self.rows // block_n + self.classes + 1
        return cdiv(self.rows, block_n)

    def splits(self, block_n: int, D: int, like: Tensor) -> int:
        """Into how many parts a forward cuts the dimensions, so that two programs go to every multiprocessor."""
        if self.rows > _configs.PAIRWISE_SORT_ROWS:
            return 1
        busy = self.rows // block_n + min(self.classes, self.rows)
        wanted = cdiv(2 * multiprocessors(like), max(1, busy))
        return max(1, min(wanted, D // _configs.SPLIT_DIMENSIONS, 16))


def group(labels: Tensor | None, N: int, C: int, block_n: int, like: Tensor) -> Groups:
    """Groups rows by class; one launch where N is beyond what every program can scan for itself.

    Raises:
        ValueError: there are more rows than fit 32 bits (their elements need not).
    """
    if N >= 2**31 - 2**16:
        raise ValueError(f"x must have fewer than 2^31 - 2^16 rows, got {N}")
    nothing = like.new_empty(0, dtype=torch.int64)
    if labels is None:
        return Groups(NATURAL.value, nothing, nothing, 1, N, C)
    labels = labels.contiguous()
    if N <= SCANNED_ROWS:
        return Groups(SCANNED.value, labels, nothing, max(1, cdiv(N, C * block_n)), N, C)
    if N <= _configs.PAIRWISE_SORT_ROWS:
        order, offsets = torch.empty_like(labels), labels.new_empty(C + 2)
        config = configuration("sort", labels)
        block = config.BLOCK_N
        row_programs = cdiv(N, block)
        launch(
            pairwise_sort_kernel,
            row_programs + cdiv(C + 2, block),
            config,
            labels,
            labels,
            order,
            offsets,
            N,
            C,
            row_programs,
            BLOCK=block,
            CHUNK=config.BLOCK_D,
        )
        return Groups(SORTED.value, order, offsets, 1, N, C)
    placed, order = torch.sort(torch.where((labels >= 0) & (labels < C), labels, C), stable=True)
    offsets = torch.searchsorted(placed, torch.arange(C + 2, device=labels.device))
    return Groups(SORTED.value, order, offsets, 1, N, C)
