"""Counts, scatter, sums and assignment of rows about the means of their own class, and the gradient of the scatter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from cem_fast.kernels import _configs
from cem_fast.kernels._configs import BLOCK_K
from cem_fast.kernels._distance import distances, far_distance, far_squares, over_variance, split_distances
from cem_fast.kernels._grouping import group
from cem_fast.kernels._launch import aligned, cdiv, configuration, kernel, launch, unit_stride
from cem_fast.kernels._reduce import Partials
from cem_fast.kernels._rows import find_segment, load_tile, only_if, rows_of, store_size
from torch import Tensor


@triton.jit
def add_moments(
    x, valid, best, d, inside, means_ptr, target, c, K, D, again, later, per_dimension, sums, totals, first_width, narrow,
):  # fmt: skip
    """Adds one tile of x to a segment's sums per dimension: scatter at ``target``, deviations ``first_width`` behind it.

    With ``totals``, adds the scatter of the tile at ``narrow``. ``again``: earlier rows have stored sums; ``later``: earlier rows or
    dimensions have stored totals.
    """
    for k in range(0, K):
        mine = valid & (best == k)
        mean = tl.load(means_ptr + (c * K + k) * D + d, mask=inside, other=0)
        deviation = tl.where(mine[:, None], x - mean[None, :], 0.0)
        scatter = tl.sum(deviation * deviation, 0)
        at = target + k * D.to(tl.int64) + d
        if per_dimension:
            tl.store(at, scatter + tl.load(at, mask=only_if(again, inside), other=0), mask=inside)
        if totals:
            before = tl.load(narrow + k, mask=later, other=0)
            tl.debug_barrier()
            tl.store(narrow + k, before + tl.sum(tl.where(inside, scatter, 0.0), 0))
        if sums:
            total = tl.sum(deviation, 0)
            tl.store(
                at + first_width, total + tl.load(at + first_width, mask=only_if(again, inside), other=0), mask=inside
            )


@triton.jit
def nearest_of_far(
    x_ptr, stride, row, valid, means_ptr, c, K, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The nearest mean of rows whose squared distances float32 cannot hold."""
    lowest = tl.full([BLOCK_N], float("inf"), means_ptr.dtype.element_ty)
    best = tl.zeros([BLOCK_N], tl.int32)
    for k in range(0, K):
        distance = far_distance(x_ptr, stride, row, valid, means_ptr, c * K + k, D, BLOCK_N, BLOCK_D)
        better = distance < lowest
        lowest = tl.where(better, distance, lowest)
        best = tl.where(better, k, best)
    return best


@kernel("x_ptr", "stride", "means_ptr", "variances_ptr", "partial_ptr", "D", "first_width", "second_width", "width")
def component_statistics_fwd_kernel(
    x_ptr,
    stride,
    means_ptr,
    variances_ptr,
    weights_ptr,
    index_ptr,
    offsets_ptr,
    split_ptr,
    partial_ptr,
    sizes_ptr,
    assignment_ptr,
    N,
    D,
    C,
    K,
    P,
    grouping,
    posterior,
    splits,
    segments,
    rows_per_segment,
    first_width,
    second_width,
    width,
    DIAG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Assignment, counts and scatter of one segment. ``scatter_kernel`` computes sums per dimension.

    The score of a component is its squared distance or, if ``posterior``, minus twice its log joint density. DIAG requires
    ``posterior`` and leaves all of the scatter to ``scatter_kernel``.
    """
    dtype = means_ptr.dtype.element_ty
    t = tl.program_id(0)
    c, begin, end = find_segment(t, grouping, index_ptr, offsets_ptr, N, C, P, rows_per_segment)
    store_size(t, c, begin, end, sizes_ptr, segments, grouping, offsets_ptr, N, C, P, rows_per_segment)
    target = partial_ptr + t.to(tl.int64) * width
    narrow = target + first_width + second_width
    for start in range(begin.to(tl.int32), end.to(tl.int32), BLOCK_N):
        rank = start + tl.arange(0, BLOCK_N)
        valid = rank < end
        row = rows_of(rank, valid, c, grouping, index_ptr, N, C)
        again = start > begin
        if again:
            tl.debug_barrier()
        if c < C:
            lowest = tl.full([BLOCK_N], float("inf"), dtype)
            square = tl.zeros([BLOCK_N], dtype)
            best = tl.zeros([BLOCK_N], tl.int32)
            for first in range(0, K, BLOCK_K):
                component = first + tl.arange(0, BLOCK_K)
                exists = component < K
                total = distances(
                    x_ptr, stride, row, valid, means_ptr, variances_ptr, split_ptr, splits, c, first, K, N, D,
                    DIAG, BLOCK_N, BLOCK_K, BLOCK_D,
                )  # fmt: skip
                score = total
                if posterior:
                    at = c * K + component
                    constant = -2 * tl.log(tl.load(weights_ptr + at, mask=exists, other=1))
                    if DIAG:
                        score = total + constant[None, :]
                    else:
                        variance = tl.load(variances_ptr + at, mask=exists, other=1)
                        ratio = over_variance(
                            1.0, total, variance, x_ptr, stride, row, valid, means_ptr, c, first, K, D,
                            BLOCK_N, BLOCK_K, BLOCK_D,
                        )  # fmt: skip
                        score = ratio + (constant + D * tl.log(variance))[None, :]
                # torch's order: NaN before every number, then the lowest index
                score = tl.where(score == score, score, float("-inf"))
                score = tl.where(exists[None, :], score, float("inf"))
                tile_lowest = tl.min(score, 1)
                tile_best = tl.min(tl.where(score == tile_lowest[:, None], component[None, :], K), 1)
                tile_square = tl.sum(tl.where(component[None, :] == tile_best[:, None], total, 0.0), 1)
                better = (tile_lowest < lowest) | (first == 0)
                lowest = tl.where(better, tile_lowest, lowest)
                square = tl.where(better, tile_square, square)
                best = tl.where(better, tile_best, best)
            if dtype == tl.float32 and not DIAG:
                beyond = valid & (lowest == float("inf")) & (posterior == 0)
                if tl.max(beyond.to(tl.int32), 0) > 0:
                    nearest = nearest_of_far(x_ptr, stride, row, valid, means_ptr, c, K, D, BLOCK_N, BLOCK_D)
                    best = tl.where(beyond, nearest, best)
            tl.store(assignment_ptr + row, best.to(tl.int64), mask=valid)
            for first in range(0, K, BLOCK_K):
                component = first + tl.arange(0, BLOCK_K)
                exists = component < K
                member = valid[:, None] & (best[:, None] == component[None, :])
                count = tl.load(narrow + component, mask=only_if(again, exists), other=0)
                tl.store(narrow + component, count + tl.sum(member.to(dtype), 0), mask=exists)
                if not DIAG:
                    scatter = tl.load(narrow + K + component, mask=only_if(again, exists), other=0)
                    scatter += tl.sum(tl.where(member, square[:, None], 0.0), 0)
                    tl.store(narrow + K + component, scatter, mask=exists)
        else:
            tl.store(assignment_ptr + row, tl.full([BLOCK_N], -1, tl.int64), mask=valid)


@kernel("x_ptr", "stride", "means_ptr", "partial_ptr", "D", "first_width", "width")
def resident_statistics_kernel(
    x_ptr,
    stride,
    means_ptr,
    index_ptr,
    offsets_ptr,
    partial_ptr,
    sizes_ptr,
    assignment_ptr,
    N,
    D,
    C,
    K,
    P,
    grouping,
    segments,
    rows_per_segment,
    first_width,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Nearest means, counts and scatter per dimension, if one tile holds all dimensions. Reads x once."""
    dtype = means_ptr.dtype.element_ty
    t = tl.program_id(0)
    c, begin, end = find_segment(t, grouping, index_ptr, offsets_ptr, N, C, P, rows_per_segment)
    store_size(t, c, begin, end, sizes_ptr, segments, grouping, offsets_ptr, N, C, P, rows_per_segment)
    target = partial_ptr + t.to(tl.int64) * width
    d = tl.arange(0, BLOCK_D)
    inside = d < D
    for start in range(begin.to(tl.int32), end.to(tl.int32), BLOCK_N):
        rank = start + tl.arange(0, BLOCK_N)
        valid = rank < end
        row = rows_of(rank, valid, c, grouping, index_ptr, N, C)
        again = start > begin
        if again:
            # the counts that another thread has stored are loaded below
            tl.debug_barrier()
        best = tl.full([BLOCK_N], -1, tl.int32)
        if c < C:
            x = load_tile(x_ptr, stride, row, valid, d, inside, dtype)
            lowest = tl.full([BLOCK_N], float("inf"), dtype)
            for k in range(0, K):
                mean = tl.load(means_ptr + (c * K + k) * D + d, mask=inside, other=0)
                deviation = x - mean[None, :]
                distance = tl.sum(deviation * deviation, 1)
                distance = tl.where(distance == distance, distance, float("-inf"))
                better = (distance < lowest) | (k == 0)
                lowest = tl.where(better, distance, lowest)
                best = tl.where(better, k, best)
            if dtype == tl.float32:
                # squares of smaller deviations keep the order where all others overflow
                beyond = valid & (lowest == float("inf"))
                if tl.max(beyond.to(tl.int32), 0) > 0:
                    for k in range(0, K):
                        mean = tl.load(means_ptr + (c * K + k) * D + d, mask=inside, other=0)
                        distance = tl.sum(far_squares(x, mean), 1)
                        better = beyond & (distance < lowest)
                        lowest = tl.where(better, distance, lowest)
                        best = tl.where(better, k, best)
            best = tl.where(valid, best, -1)
            for k in range(0, K):
                mine = best == k
                mean = tl.load(means_ptr + (c * K + k) * D + d, mask=inside, other=0)
                deviation = tl.where(mine[:, None], x - mean[None, :], 0.0)
                at = target + k * D.to(tl.int64) + d
                scatter = tl.sum(deviation * deviation, 0)
                tl.store(at, scatter + tl.load(at, mask=only_if(again, inside), other=0), mask=inside)
                count = tl.load(target + first_width + k, mask=again, other=0)
                tl.debug_barrier()
                tl.store(target + first_width + k, count + tl.sum(mine.to(dtype), 0))
        tl.store(assignment_ptr + row, best.to(tl.int64), mask=valid)


@kernel("x_ptr", "stride", "means_ptr", "partial_ptr", "D", "d_size", "first_width", "second_width", "width")
def scatter_kernel(
    x_ptr,
    stride,
    means_ptr,
    index_ptr,
    offsets_ptr,
    partial_ptr,
    assignment_ptr,
    N,
    D,
    C,
    K,
    P,
    grouping,
    per_dimension,
    sums,
    totals,
    d_programs,
    d_size,  # a multiple of BLOCK_D
    rows_per_segment,
    first_width,
    second_width,
    width,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums per dimension for a known assignment: the second read of x."""
    t = tl.program_id(0) // d_programs
    part = tl.program_id(0) % d_programs
    c, begin, end = find_segment(t, grouping, index_ptr, offsets_ptr, N, C, P, rows_per_segment)
    target = partial_ptr + t.to(tl.int64) * width
    narrow = target + first_width + second_width + (1 + part) * K
    if c < C:
        d_begin = part * d_size
        d_end = tl.minimum(d_begin + d_size, D)
        for start in range(begin.to(tl.int32), end.to(tl.int32), BLOCK_N):
            rank = start + tl.arange(0, BLOCK_N)
            valid = rank < end
            row = rows_of(rank, valid, c, grouping, index_ptr, N, C)
            best = tl.load(assignment_ptr + row, mask=valid, other=-1).to(tl.int32)
            for d_start in range(d_begin, d_end, BLOCK_D):
                d = d_start + tl.arange(0, BLOCK_D)
                inside = d < d_end
                x = load_tile(x_ptr, stride, row, valid, d, inside, means_ptr.dtype.element_ty)
                tl.debug_barrier()
                add_moments(
                    x, valid, best, d, inside, means_ptr, target, c, K, D, start > begin,
                    (start > begin) | (d_start > d_begin), per_dimension, sums, totals, first_width, narrow,
                )  # fmt: skip


@kernel("grad_ptr", "x_ptr", "stride", "means_ptr", "dx_ptr", "D")
def component_statistics_bwd_kernel(
    grad_ptr,
    scale_ptr,
    x_ptr,
    stride,
    means_ptr,
    index_ptr,
    offsets_ptr,
    assignment_ptr,
    dx_ptr,
    N,
    D,
    C,
    K,
    P,
    grouping,
    scaled,
    labeled,
    per_dimension,
    d_programs,
    GATHER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``dx = 2 scale g (x - mu)`` of one tile. With GATHER every row loads its own mean; else rows share the means of a class."""
    dtype = means_ptr.dtype.element_ty
    d = (tl.program_id(0) % d_programs) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    c, begin, end = find_segment(tl.program_id(0) // d_programs, grouping, index_ptr, offsets_ptr, N, C, P, BLOCK_N)
    scale = tl.full([], 2, dtype)
    if scaled:
        scale = 2 * tl.load(scale_ptr)
    for start in range(begin.to(tl.int32), end.to(tl.int32), BLOCK_N):
        rank = start + tl.arange(0, BLOCK_N)
        valid = rank < end
        row = rows_of(rank, valid, c, grouping, index_ptr, N, C)
        k_of_row = tl.load(assignment_ptr + row, mask=valid, other=-1).to(tl.int32)
        mask = valid[:, None] & inside[None, :]
        x = load_tile(x_ptr, stride, row, valid, d, inside, dtype)
        if GATHER:
            label = tl.zeros([BLOCK_N], tl.int64)
            if labeled:
                label = tl.load(index_ptr + row, mask=valid, other=0)
            known = valid & (label >= 0) & (label < C) & (k_of_row >= 0) & (k_of_row < K)
            component = tl.where(known, label * K + k_of_row, 0)
            at = component[:, None] * D + d[None, :]
            both = known[:, None] & inside[None, :]
            mean = tl.load(means_ptr + at, mask=both, other=0)
            factor = tl.where(known[:, None], mean * 0, float("nan"))
            if per_dimension:
                factor += tl.load(grad_ptr + at, mask=both, other=0)
            else:
                factor += tl.load(grad_ptr + component, mask=known, other=0)[:, None]
        else:
            mean = tl.zeros([BLOCK_N, BLOCK_D], dtype)
            # rows without a component stay NaN
            factor = tl.full([BLOCK_N, BLOCK_D], float("nan"), dtype)
            for k in range(0, tl.where(c < C, K, 0)):
                mine = (k_of_row == k)[:, None]
                at = (c * K + k) * D
                mean = tl.where(mine, tl.load(means_ptr + at + d, mask=inside, other=0)[None, :], mean)
                if per_dimension:
                    factor = tl.where(mine, tl.load(grad_ptr + at + d, mask=inside, other=0)[None, :], factor)
                else:
                    factor = tl.where(mine, tl.load(grad_ptr + c * K + k), factor)
        dx = scale * factor * (x - mean)
        tl.store(dx_ptr + row.to(tl.int64)[:, None] * D + d[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _resident_family(x: Tensor, means: Tensor) -> str | None:
    """Configuration family whose tile holds all dimensions, if any. Only the aligned version of the wide tile fits in registers."""
    D = x.shape[1]
    if D <= configuration("resident_narrow", means).BLOCK_D:
        return "resident_narrow"
    wide = configuration("resident_wide", means)
    return "resident_wide" if wide is not None and D <= wide.BLOCK_D and aligned(x, means) else None


def partial_statistics(
    x: Tensor,
    means: Tensor,
    labels: Tensor | None,
    variances: Tensor | None,
    weights: Tensor | None,
    per_dimension: bool,
    sums: bool,
) -> tuple[Partials, Tensor]:
    """Partial statistics of the segments, and the assignment."""
    C, K, D = means.shape
    N = x.shape[0]
    assignment = x.new_empty(N, dtype=torch.int64)
    x, means = unit_stride(x), means.contiguous()
    posterior = variances is not None and weights is not None
    variances = variances.contiguous() if posterior else means
    weights = weights.contiguous() if posterior else means
    diag = posterior and variances.dim() == 3

    widths = (K * D if per_dimension else 0, K * D if sums else 0)
    resident = None
    if per_dimension and not sums and not posterior:
        resident = _resident_family(x, means)
    if resident is not None:
        config = configuration(resident, means)
        groups = group(labels, N, C, config.BLOCK_N, means)
        partials = Partials(means, groups, config.BLOCK_N, K, *widths, parts=0)
        launch(
            resident_statistics_kernel,
            partials.segments,
            config,
            means,
            x_ptr=x,
            stride=x.stride(0),
            means_ptr=means,
            sizes_ptr=partials.sizes,
            assignment_ptr=assignment,
            D=D,
            K=K,
            segments=partials.segments,
            **groups.arguments,
            **partials.arguments,
            BLOCK_N=config.BLOCK_N,
            BLOCK_D=config.BLOCK_D,
        )
        return partials, assignment

    config = configuration("distance", means)
    block_n = config.BLOCK_N
    groups = group(labels, N, C, block_n, means)
    d_size = cdiv(cdiv(D, groups.splits(block_n, D, means)), config.BLOCK_D) * config.BLOCK_D
    splits = cdiv(D, d_size)
    partials = Partials(means, groups, block_n, K, *widths, parts=splits if diag else 1)
    tiles = dict(DIAG=diag, BLOCK_N=block_n, BLOCK_K=BLOCK_K, BLOCK_D=config.BLOCK_D)
    shares = split_distances(groups, config, x, means, variances, splits, d_size, tiles)
    shared = dict(
        x_ptr=x,
        stride=x.stride(0),
        means_ptr=means,
        assignment_ptr=assignment,
        D=D,
        K=K,
        second_width=partials.second,
        **groups.arguments,
        **partials.arguments,
    )
    launch(
        component_statistics_fwd_kernel,
        partials.segments,
        config,
        means,
        variances_ptr=variances,
        weights_ptr=weights,
        split_ptr=shares,
        sizes_ptr=partials.sizes,
        posterior=int(posterior),
        splits=splits,
        segments=partials.segments,
        **shared,
        **tiles,
    )
    if per_dimension or sums or diag:
        launch(
            scatter_kernel,
            partials.segments * splits,
            config,
            means,
            per_dimension=int(per_dimension),
            sums=int(sums),
            totals=int(diag),
            d_programs=splits,
            d_size=d_size,
            **shared,
            BLOCK_N=block_n,
            BLOCK_D=config.BLOCK_D,
        )
    return partials, assignment


def component_statistics_fwd(
    x: Tensor,
    means: Tensor,
    labels: Tensor | None,
    variances: Tensor | None,
    weights: Tensor | None,
    per_dimension: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    C, K, D = means.shape
    counts = means.new_empty(C, K)
    scatter = means.new_empty((C, K, D) if per_dimension else (C, K))
    totals = means.new_empty((C, K, D) if sums else (0,))
    if x.shape[0] == 0:
        return counts.zero_(), scatter.zero_(), totals.zero_(), x.new_empty(0, dtype=torch.int64)
    partials, assignment = partial_statistics(x, means, labels, variances, weights, per_dimension, sums)
    # with sums per dimension, the totals go to a temporary
    partials.reduce(scatter, totals, counts, means.new_empty(C, K) if per_dimension else scatter)
    if sums:
        # sums of deviations, because raw values with a common offset would cancel a small spread
        totals.addcmul_(counts.unsqueeze(-1), means)
    return counts, scatter, totals, assignment


def component_statistics_bwd(
    grad_scatter: Tensor, scale: Tensor | None, x: Tensor, means: Tensor, labels: Tensor | None, assignment: Tensor
) -> Tensor:
    C, K, D = means.shape
    N = x.shape[0]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if N == 0:
        return dx
    x, means, grad_scatter = unit_stride(x), means.contiguous(), grad_scatter.contiguous()
    config = configuration("gradient", means)
    # rows that share the means and gradients of a class read less, which pays for the sort of a few rows only
    gather = grad_scatter.dim() == 2 or K > BLOCK_K or N < C * K or N > _configs.PAIRWISE_SORT_ROWS
    labels = labels if labels is None else labels.contiguous()
    if gather:
        groups = group(None, N, C, config.BLOCK_N, means)
        groups = groups if labels is None else groups._replace(index=labels)
    else:
        groups = group(labels, N, C, config.BLOCK_N, means)
    d_programs = cdiv(D, config.BLOCK_D)
    launch(
        component_statistics_bwd_kernel,
        groups.segments(config.BLOCK_N) * d_programs,
        config,
        means,
        grad_ptr=grad_scatter,
        scale_ptr=grad_scatter if scale is None else scale,
        x_ptr=x,
        stride=x.stride(0),
        means_ptr=means,
        assignment_ptr=assignment.contiguous(),
        dx_ptr=dx,
        D=D,
        K=K,
        scaled=int(scale is not None),
        labeled=int(labels is not None),
        per_dimension=int(grad_scatter.dim() == 3),
        d_programs=d_programs,
        **groups.arguments,
        GATHER=gather,
        BLOCK_N=config.BLOCK_N,
        BLOCK_D=config.BLOCK_D,
    )
    return dx
