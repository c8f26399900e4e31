"""Second half of every per-class sum: adds the partial results of a class's segments in order."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from cem_fast.kernels._grouping import Groups
from cem_fast.kernels._launch import cdiv, configuration, kernel, launch
from cem_fast.kernels._rows import first_segment, only_if
from torch import Tensor


@kernel("partial_ptr", "width")
def reduce_kernel(
    partial_ptr,  # [segments, width]: first wide block, second wide block, first K, parts x second K
    sizes_ptr,  # [segments + 1]: rows of each segment; the last is the number of rows without a class
    offsets_ptr,
    first_wide_ptr,
    second_wide_ptr,
    first_narrow_ptr,
    second_narrow_ptr,
    first_width,
    second_width,
    width,
    N,
    C,
    K,
    P,
    grouping,
    parts,
    segments,
    rows_per_segment,
    column_programs,
    BLOCK: tl.constexpr,
):
    """Outputs ``[C, first_width]``, ``[C, second_width]``, ``[C, K]`` and ``[C, K]``; NaN if any row has no class."""
    c = (tl.program_id(0) // column_programs).to(tl.int64)
    column = (tl.program_id(0) % column_programs) * BLOCK + tl.arange(0, BLOCK)
    wide = first_width + second_width
    filled_width = wide + K + tl.where(parts > 0, K, 0)
    total = tl.zeros([BLOCK], partial_ptr.dtype.element_ty)
    first = first_segment(c, grouping, offsets_ptr, N, C, P, rows_per_segment)
    last = first_segment(c + 1, grouping, offsets_ptr, N, C, P, rows_per_segment)
    for t in range(first, last):
        filled = tl.load(sizes_ptr + t) > 0
        at = partial_ptr + t * width
        total += tl.load(at + column, mask=only_if(filled, column < width), other=0)
        for part in range(1, parts):
            last_group = (column >= wide + K) & (column < wide + 2 * K)
            total += tl.load(at + part * K + column, mask=only_if(filled, last_group), other=0)
    total = tl.where(tl.load(sizes_ptr + segments) > 0, float("nan"), total)
    tl.store(first_wide_ptr + c * first_width + column, total, mask=column < first_width)
    in_second = (column >= first_width) & (column < wide)
    tl.store(second_wide_ptr + c * second_width + column - first_width, total, mask=in_second)
    tl.store(first_narrow_ptr + c * K + column - wide, total, mask=(column >= wide) & (column < wide + K))
    in_last = (column >= wide + K) & (column < filled_width)
    tl.store(second_narrow_ptr + c * K + column - wide - K, total, mask=in_last)


class Partials:
    """Partial results of one operation's segments: ``[segments, width]`` values and the size of every segment."""

    def __init__(self, like: Tensor, groups: Groups, block_n: int, K: int, first: int, second: int, parts: int = 1):
        self.groups, self.K, self.parts = groups, K, parts
        self.first, self.second = first, second
        # a multiple of 16 keeps the rows aligned for wide access
        self.width = cdiv(first + second + (1 + parts) * K, 16) * 16
        self.rows_per_segment = groups.segment_size(block_n, self.width, like)
        self.segments = groups.segments(self.rows_per_segment)
        self.values = like.new_empty(self.segments, self.width)
        self.sizes = groups.index.new_empty(self.segments + 1)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a kernel that stores partial results."""
        return dict(
            partial_ptr=self.values,
            rows_per_segment=self.rows_per_segment,
            first_width=self.first,
            width=self.width,
        )

    def reduce(self, first: Tensor, second: Tensor, narrow: Tensor, last: Tensor) -> None:
        config = configuration("reduce", self.values)
        groups, K = self.groups, self.K
        columns = cdiv(self.first + self.second + 2 * K, config.BLOCK_D)
        launch(
            reduce_kernel,
            groups.classes * columns,
            config,
            self.values,
            sizes_ptr=self.sizes,
            offsets_ptr=groups.offsets,
            first_wide_ptr=first,
            second_wide_ptr=second,
            first_narrow_ptr=narrow,
            second_narrow_ptr=last,
            second_width=self.second,
            N=groups.rows,
            C=groups.classes,
            K=K,
            P=groups.pieces,
            grouping=groups.grouping,
            parts=self.parts,
            segments=self.segments,
            column_programs=columns,
            BLOCK=config.BLOCK_D,
            **self.arguments,
        )
