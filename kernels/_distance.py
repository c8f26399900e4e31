"""Squared distances of rows to the component means of their class, in one program or split by dimensions."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from cem_fast.kernels._configs import Config
from cem_fast.kernels._grouping import Groups
from cem_fast.kernels._launch import kernel, launch
from cem_fast.kernels._rows import find_segment, load_tile, rows_of
from torch import Tensor

# Scale of deviations whose squares float32 cannot hold. The largest leave room for the sum over 2^28 dimensions.
FAR: tl.constexpr = tl.constexpr(2.0**-80)


@triton.jit
def tile_distances(
    x, d, inside, means_ptr, variances_ptr, c, first_component, K, D,
    DIAG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``sum_d (x - mu_k)^2`` of one tile of x, ``[BLOCK_N, BLOCK_K]``; with DIAG ``sum_d (x - mu_k)^2 / v_k + log v_k``."""
    component = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], means_ptr.dtype.element_ty)
    for k in range(first_component, tl.minimum(first_component + BLOCK_K, K)):
        at = (c * K + k) * D
        deviation = x - tl.load(means_ptr + at + d, mask=inside, other=0)[None, :]
        if DIAG:
            variance = tl.load(variances_ptr + at + d, mask=inside, other=1)
            # the square alone may overflow
            distance = tl.sum(deviation * (1 / variance)[None, :] * deviation, 1) + tl.sum(tl.log(variance), 0)
        else:
            distance = tl.sum(deviation * deviation, 1)
        total += tl.where((component == k - first_component)[None, :], distance[:, None], 0.0)
    return total


@triton.jit
def squared_distances(
    x_ptr, stride, row, valid, means_ptr, variances_ptr, c, first_component, K, d_begin, d_end, D,
    DIAG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """:func:`tile_distances` summed over the dimensions ``[d_begin, d_end)``."""
    total = tl.zeros([BLOCK_N, BLOCK_K], means_ptr.dtype.element_ty)
    for start in range(d_begin, d_end, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < d_end
        x = load_tile(x_ptr, stride, row, valid, d, inside, means_ptr.dtype.element_ty)
        total += tile_distances(
            x, d, inside, means_ptr, variances_ptr, c, first_component, K, D, DIAG, BLOCK_N, BLOCK_K
        )  # fmt: skip
    return total


@triton.jit
def distances(
    x_ptr,
    stride,
    row,
    valid,
    means_ptr,
    variances_ptr,
    split_ptr,
    splits,
    c,
    first_component,
    K,
    N,
    D,
    DIAG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """:func:`squared_distances` over all dimensions, or the ordered sum of the shares from ``distance_kernel``."""
    if splits > 1:
        component = first_component + tl.arange(0, BLOCK_K)
        total = tl.zeros([BLOCK_N, BLOCK_K], means_ptr.dtype.element_ty)
        mask = valid[:, None] & (component < K)[None, :]
        for s in range(splits):
            total += tl.load(
                split_ptr + (s * N.to(tl.int64) + row[:, None]) * K + component[None, :], mask=mask, other=0
            )
    else:
        total = squared_distances(
            x_ptr, stride, row, valid, means_ptr, variances_ptr, c, first_component, K, 0, D, D,
            DIAG, BLOCK_N, BLOCK_K, BLOCK_D,
        )  # fmt: skip
    return total


@triton.jit
def far_squares(x, mean):
    """``(x - mu)^2`` of one tile of x and one component, scaled by ``FAR`` squared."""
    # one operation, because x FAR would be kept in registers for all components
    deviation = tl.fma(x, tl.full([1, 1], FAR, x.dtype), -(mean * FAR)[None, :])
    return deviation * deviation


@triton.jit
def far_distance(
    x_ptr, stride, row, valid, means_ptr, component, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``sum_d (x - mu)^2`` of one component, scaled by ``FAR`` squared, ``[BLOCK_N]``."""
    dtype = means_ptr.dtype.element_ty
    total = tl.zeros([BLOCK_N], dtype)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < D
        x = load_tile(x_ptr, stride, row, valid, d, inside, dtype)
        total += tl.sum(far_squares(x, tl.load(means_ptr + component * D + d, mask=inside, other=0)), 1)
    return total


@triton.jit
def next_wanted(wanted, j, BLOCK_K: tl.constexpr):
    """First column after j with a True element; BLOCK_K if there is none."""
    column = tl.arange(0, BLOCK_K)
    some = tl.max(wanted.to(tl.int32), 0)
    return tl.min(tl.where((some > 0) & (column > j), column, BLOCK_K), 0)


@triton.jit
def over_variance(
    factor: tl.constexpr, total, variance, x_ptr, stride, row, valid, means_ptr, c, first, K, D,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``factor total / variance`` of a tile of components. Distances that float32 cannot hold are computed again, scaled."""
    ratio = factor * total / variance[None, :]
    if total.dtype == tl.float32:
        column = tl.arange(0, BLOCK_K)
        beyond = (total == float("inf")) & valid[:, None] & (first + column < K)[None, :]
        j = next_wanted(beyond, -1, BLOCK_K)
        while j < BLOCK_K:
            far = far_distance(x_ptr, stride, row, valid, means_ptr, c * K + first + j, D, BLOCK_N, BLOCK_D)
            scaled = factor * far[:, None] / (variance * FAR)[None, :] / FAR
            ratio = tl.where(beyond & (column == j)[None, :], scaled, ratio)
            j = next_wanted(beyond, j, BLOCK_K)
    return ratio


@kernel("x_ptr", "stride", "means_ptr", "variances_ptr", "D", "split_size")
def distance_kernel(
    x_ptr,
    stride,
    means_ptr,
    variances_ptr,
    index_ptr,
    offsets_ptr,
    split_ptr,  # [splits, N, K]
    N,
    D,
    C,
    K,
    P,
    grouping,
    splits,
    split_size,  # a multiple of BLOCK_D
    DIAG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Few rows and many dimensions: one program for each segment and share of the dimensions."""
    s = tl.program_id(0) % splits
    c, begin, end = find_segment(tl.program_id(0) // splits, grouping, index_ptr, offsets_ptr, N, C, P, BLOCK_N)
    if c < C:
        d_begin = s * split_size
        d_end = tl.minimum(d_begin + split_size, D)
        for start in range(begin.to(tl.int32), end.to(tl.int32), BLOCK_N):
            rank = start + tl.arange(0, BLOCK_N)
            valid = rank < end
            row = rows_of(rank, valid, c, grouping, index_ptr, N, C)
            for first in range(0, K, BLOCK_K):
                total = squared_distances(
                    x_ptr, stride, row, valid, means_ptr, variances_ptr, c, first, K, d_begin, d_end, D,
                    DIAG, BLOCK_N, BLOCK_K, BLOCK_D,
                )  # fmt: skip
                component = first + tl.arange(0, BLOCK_K)
                at = (s * N.to(tl.int64) + row[:, None]) * K + component[None, :]
                tl.store(split_ptr + at, total, mask=valid[:, None] & (component < K)[None, :])


def split_distances(
    groups: Groups,
    config: Config,
    x: Tensor,
    means: Tensor,
    variances: Tensor,
    splits: int,
    size: int,
    tiles: dict[str, Any],
) -> Tensor:
    """Returns the distances over each share of the dimensions, ``[splits, N, K]``; empty if there is only one share."""
    N, (_, K, D) = x.shape[0], means.shape
    if splits == 1:
        return means.new_empty(0)
    shares = means.new_empty(splits, N, K)
    launch(
        distance_kernel,
        groups.segments(config.BLOCK_N) * splits,
        config,
        means,
        x_ptr=x,
        stride=x.stride(0),
        means_ptr=means,
        variances_ptr=variances,
        split_ptr=shares,
        D=D,
        K=K,
        splits=splits,
        split_size=size,
        **groups.arguments,
        **tiles,
    )
    return shares
