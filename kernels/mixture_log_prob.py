"""Log-likelihood of rows under the mixture of their own class, its gradient in x, and the moments for its parameters."""

from __future__ import annotations

import torch
import triton.language as tl
from cem_fast.kernels import global_mixture
from cem_fast.kernels._configs import BLOCK_K, takes_products
from cem_fast.kernels._distance import distances, over_variance, split_distances
from cem_fast.kernels._grouping import group
from cem_fast.kernels._launch import aligned, cdiv, configuration, kernel, launch, row_windows, unit_stride
from cem_fast.kernels._reduce import Partials
from cem_fast.kernels._rows import find_segment, load_tile, only_if, rows_of, store_size
from torch import Tensor

LOG_2PI: tl.constexpr = tl.constexpr(1.8378770664093453)


@kernel("x_ptr", "stride", "means_ptr", "variances_ptr", "D")
def mixture_log_prob_fwd_kernel(
    x_ptr,
    stride,
    means_ptr,
    variances_ptr,
    weights_ptr,
    index_ptr,
    offsets_ptr,
    split_ptr,
    log_prob_ptr,
    responsibilities_ptr,
    N,
    D,
    C,
    K,
    P,
    grouping,
    splits,
    with_responsibilities,
    DIAG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Online logsumexp over tiles of components. The responsibilities hold the log joint density until the sum is complete."""
    dtype = means_ptr.dtype.element_ty
    c, begin, end = find_segment(tl.program_id(0), grouping, index_ptr, offsets_ptr, N, C, P, BLOCK_N)
    for start in range(begin.to(tl.int32), end.to(tl.int32), BLOCK_N):
        rank = start + tl.arange(0, BLOCK_N)
        valid = rank < end
        row = rows_of(rank, valid, c, grouping, index_ptr, N, C)
        highest = tl.full([BLOCK_N], float("-inf"), dtype)
        mass = tl.zeros([BLOCK_N], dtype)
        if c == C:
            mass += float("nan")
        for first in range(0, tl.where(c < C, K, 0), BLOCK_K):
            component = first + tl.arange(0, BLOCK_K)
            exists = component < K
            total = distances(
                x_ptr, stride, row, valid, means_ptr, variances_ptr, split_ptr, splits, c, first, K, N, D,
                DIAG, BLOCK_N, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            at = c * K + component
            constant = tl.log(tl.load(weights_ptr + at, mask=exists, other=1)) - 0.5 * LOG_2PI * D.to(dtype)
            if DIAG:
                joint = constant[None, :] - 0.5 * total
            else:
                variance = tl.load(variances_ptr + at, mask=exists, other=1)
                constant -= 0.5 * D.to(dtype) * tl.log(variance)
                joint = constant[None, :] - over_variance(
                    0.5, total, variance, x_ptr, stride, row, valid, means_ptr, c, first, K, D,
                    BLOCK_N, BLOCK_K, BLOCK_D,
                )  # fmt: skip
            joint = tl.where(exists[None, :], joint, float("-inf"))
            if with_responsibilities:
                mask = valid[:, None] & exists[None, :]
                tl.store(responsibilities_ptr + row.to(tl.int64)[:, None] * K + component[None, :], joint, mask=mask)
            new = tl.maximum(highest, tl.max(joint, 1))
            # -inf - -inf would make a row of zero density NaN
            anchor = tl.where(new == float("-inf"), 0.0, new)
            mass = mass * tl.exp(highest - anchor) + tl.sum(tl.exp(joint - anchor[:, None]), 1)
            highest = new
        log_prob = tl.where(highest == float("-inf"), 0.0, highest) + tl.log(mass)
        tl.store(log_prob_ptr + row, log_prob, mask=valid)
        if with_responsibilities:
            tl.debug_barrier()
            for first in range(0, K, BLOCK_K):
                component = first + tl.arange(0, BLOCK_K)
                mask = valid[:, None] & (component < K)[None, :]
                at = responsibilities_ptr + row.to(tl.int64)[:, None] * K + component[None, :]
                joint = tl.load(at, mask=only_if(c < C, mask), other=float("-inf"))
                tl.store(at, tl.exp(joint - log_prob[:, None]), mask=mask)


@kernel("x_ptr", "stride", "means_ptr", "variances_ptr", "dx_ptr", "D")
def mixture_log_prob_bwd_kernel(
    grad_ptr,
    x_ptr,
    stride,
    means_ptr,
    variances_ptr,
    index_ptr,
    offsets_ptr,
    responsibilities_ptr,
    dx_ptr,
    N,
    D,
    C,
    K,
    P,
    grouping,
    d_programs,
    DIAG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``dx = g sum_k r_k (mu_k - x) / v_k`` of one tile."""
    dtype = means_ptr.dtype.element_ty
    d = (tl.program_id(0) % d_programs) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    c, begin, end = find_segment(tl.program_id(0) // d_programs, grouping, index_ptr, offsets_ptr, N, C, P, BLOCK_N)
    for start in range(begin.to(tl.int32), end.to(tl.int32), BLOCK_N):
        rank = start + tl.arange(0, BLOCK_N)
        valid = rank < end
        row = rows_of(rank, valid, c, grouping, index_ptr, N, C)
        grad = tl.load(grad_ptr + row, mask=valid, other=0)
        x = load_tile(x_ptr, stride, row, valid, d, inside, dtype)
        dx = tl.zeros([BLOCK_N, BLOCK_D], dtype)
        if c == C:
            dx += float("nan")
        for k in range(0, tl.where(c < C, K, 0)):
            r = grad * tl.load(responsibilities_ptr + row.to(tl.int64) * K + k, mask=valid, other=0)
            at = (c * K + k) * D
            mean = tl.load(means_ptr + at + d, mask=inside, other=0)
            if DIAG:
                precision = 1 / tl.load(variances_ptr + at + d, mask=inside, other=1)
                dx += (r[:, None] * precision[None, :]) * (mean[None, :] - x)
            else:
                dx += (r / tl.load(variances_ptr + c * K + k))[:, None] * (mean[None, :] - x)
        tl.store(
            dx_ptr + row.to(tl.int64)[:, None] * D + d[None, :],
            dx.to(dx_ptr.dtype.element_ty),
            mask=valid[:, None] & inside[None, :],
        )


@kernel("x_ptr", "stride", "means_ptr", "partial_ptr", "D", "first_width", "second_width", "width")
def mixture_moments_kernel(
    row_weights_ptr,
    x_ptr,
    stride,
    means_ptr,
    index_ptr,
    offsets_ptr,
    responsibilities_ptr,
    partial_ptr,
    sizes_ptr,
    N,
    D,
    C,
    K,
    P,
    grouping,
    segments,
    rows_per_segment,
    d_programs,
    first_width,
    second_width,
    width,
    DIAG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """``sum_n a_nk (1, x - mu_k, (x - mu_k)^2)`` of one segment and one tile of dimensions, ``a = row_weights r``."""
    dtype = means_ptr.dtype.element_ty
    t = (tl.program_id(0) // d_programs).to(tl.int64)
    part = tl.program_id(0) % d_programs
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    c, begin, end = find_segment(t, grouping, index_ptr, offsets_ptr, N, C, P, rows_per_segment)
    if part == 0:
        store_size(t, c, begin, end, sizes_ptr, segments, grouping, offsets_ptr, N, C, P, rows_per_segment)
    target = partial_ptr + t * width
    narrow = target + first_width + second_width
    if c < C:
        for start in range(begin.to(tl.int32), end.to(tl.int32), BLOCK_N):
            rank = start + tl.arange(0, BLOCK_N)
            valid = rank < end
            row = rows_of(rank, valid, c, grouping, index_ptr, N, C)
            again = start > begin
            row_weights = tl.load(row_weights_ptr + row, mask=valid, other=0)
            x = load_tile(x_ptr, stride, row, valid, d, inside, dtype)
            for k in range(0, K):
                a = row_weights * tl.load(responsibilities_ptr + row.to(tl.int64) * K + k, mask=valid, other=0)
                mean = tl.load(means_ptr + (c * K + k) * D + d, mask=inside, other=0)
                deviation = tl.where(valid[:, None], x - mean[None, :], 0.0)
                weighted = a[:, None] * deviation
                at = target + k * D.to(tl.int64) + d
                s1 = tl.sum(weighted, 0)
                s2 = tl.sum(weighted * deviation, 0)
                tl.store(at, s1 + tl.load(at, mask=only_if(again, inside), other=0), mask=inside)
                if DIAG:
                    s2 += tl.load(at + first_width, mask=only_if(again, inside), other=0)
                    tl.store(at + first_width, s2, mask=inside)
                else:
                    s2_before = tl.load(narrow + (1 + part) * K + k, mask=again, other=0)
                    tl.debug_barrier()
                    tl.store(narrow + (1 + part) * K + k, s2_before + tl.sum(tl.where(inside, s2, 0.0), 0))
                if part == 0:
                    s0_before = tl.load(narrow + k, mask=again, other=0)
                    tl.debug_barrier()
                    tl.store(narrow + k, s0_before + tl.sum(a, 0))
            tl.debug_barrier()


def _takes_products(x: Tensor, means: Tensor, variances: Tensor, labels: Tensor | None) -> bool:
    _, K, D = means.shape
    return takes_products(labels is not None, K, D, means.element_size(), aligned(x, means, variances))


def mixture_log_prob_fwd(
    x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, labels: Tensor | None, with_responsibilities: bool
) -> tuple[Tensor, Tensor]:
    C, K, D = means.shape
    N = x.shape[0]
    log_prob = means.new_empty(N)
    responsibilities = means.new_empty(N, K if with_responsibilities else 0)
    if N == 0:
        return log_prob, responsibilities
    x, means, variances, weights = unit_stride(x), means.contiguous(), variances.contiguous(), weights.contiguous()
    if _takes_products(x, means, variances, labels):
        products = global_mixture.Products(x, means, variances, weights)
        log_prob = products.log_prob()
        if with_responsibilities:
            responsibilities = products.normalized(products.responsibilities(slice(0, N), log_prob))
        return log_prob, responsibilities
    config = configuration("distance", means)
    groups = group(labels, N, C, config.BLOCK_N, means)
    size = cdiv(cdiv(D, groups.splits(config.BLOCK_N, D, means)), config.BLOCK_D) * config.BLOCK_D
    splits = cdiv(D, size)
    tiles = dict(DIAG=variances.dim() == 3, BLOCK_N=config.BLOCK_N, BLOCK_K=BLOCK_K, BLOCK_D=config.BLOCK_D)
    shares = split_distances(groups, config, x, means, variances, splits, size, tiles)
    launch(
        mixture_log_prob_fwd_kernel,
        groups.segments(config.BLOCK_N),
        config,
        means,
        x_ptr=x,
        stride=x.stride(0),
        means_ptr=means,
        variances_ptr=variances,
        weights_ptr=weights,
        split_ptr=shares,
        log_prob_ptr=log_prob,
        responsibilities_ptr=responsibilities,
        D=D,
        K=K,
        splits=splits,
        with_responsibilities=int(with_responsibilities),
        **groups.arguments,
        **tiles,
    )
    return log_prob, responsibilities


def mixture_log_prob_bwd(
    grad: Tensor,
    x: Tensor,
    means: Tensor,
    variances: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    log_prob: Tensor,
    responsibilities: Tensor,
) -> Tensor:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.shape[0] == 0:
        return dx
    x, means, variances, weights = unit_stride(x), means.contiguous(), variances.contiguous(), weights.contiguous()
    grad, responsibilities = grad.contiguous(), responsibilities.contiguous()
    if _takes_products(x, means, variances, labels):
        products = global_mixture.Products(x, means, variances, weights)
        products.gradient(grad, log_prob.contiguous(), responsibilities, dx)
        return dx
    if responsibilities.shape[1]:
        _feature_gradient(grad, x, means, variances, labels, responsibilities, dx)
        return dx
    for rows in row_windows(x.shape[0], means.shape[1]):
        own = None if labels is None else labels[rows]
        _, r = mixture_log_prob_fwd(x[rows], means, variances, weights, own, True)
        _feature_gradient(grad[rows], x[rows], means, variances, own, r, dx[rows])
    return dx


def _feature_gradient(
    grad: Tensor, x: Tensor, means: Tensor, variances: Tensor, labels: Tensor | None, r: Tensor, dx: Tensor
) -> None:
    C, K, D = means.shape
    N = x.shape[0]
    config = configuration("gradient", means)
    groups = group(labels, N, C, config.BLOCK_N, means)
    d_programs = cdiv(D, config.BLOCK_D)
    launch(
        mixture_log_prob_bwd_kernel,
        groups.segments(config.BLOCK_N) * d_programs,
        config,
        means,
        grad_ptr=grad,
        x_ptr=x,
        stride=x.stride(0),
        means_ptr=means,
        variances_ptr=variances,
        responsibilities_ptr=r,
        dx_ptr=dx,
        D=D,
        K=K,
        d_programs=d_programs,
        **groups.arguments,
        DIAG=variances.dim() == 3,
        BLOCK_N=config.BLOCK_N,
        BLOCK_D=config.BLOCK_D,
    )


def mixture_moments(
    row_weights: Tensor,
    x: Tensor,
    means: Tensor,
    variances: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    log_prob: Tensor,
    responsibilities: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    x, means, variances, weights = unit_stride(x), means.contiguous(), variances.contiguous(), weights.contiguous()
    row_weights, responsibilities = row_weights.contiguous(), responsibilities.contiguous()
    if _takes_products(x, means, variances, labels):
        products = global_mixture.Products(x, means, variances, weights)
        return products.moments(row_weights, log_prob.contiguous(), responsibilities)
    if responsibilities.shape[1] and x.shape[0]:
        return _moments(row_weights, x, means, variances, labels, responsibilities)
    moments = means.new_zeros(means.shape[:2]), torch.zeros_like(means), torch.zeros_like(variances)
    for rows in row_windows(x.shape[0], means.shape[1]):
        own = None if labels is None else labels[rows]
        _, r = mixture_log_prob_fwd(x[rows], means, variances, weights, own, True)
        for total, part in zip(moments, _moments(row_weights[rows], x[rows], means, variances, own, r)):
            total += part
    return moments


def _moments(
    row_weights: Tensor, x: Tensor, means: Tensor, variances: Tensor, labels: Tensor | None, r: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    C, K, D = means.shape
    N = x.shape[0]
    diag = variances.dim() == 3
    s0, s1, s2 = means.new_empty(C, K), torch.empty_like(means), torch.empty_like(variances)
    config = configuration("moments", means)
    groups = group(labels, N, C, config.BLOCK_N, means)
    d_programs = cdiv(D, config.BLOCK_D)
    widths = (K * D, K * D if diag else 0)
    partials = Partials(means, groups, config.BLOCK_N, K, *widths, parts=0 if diag else d_programs)
    launch(
        mixture_moments_kernel,
        partials.segments * d_programs,
        config,
        means,
        row_weights_ptr=row_weights,
        x_ptr=x,
        stride=x.stride(0),
        means_ptr=means,
        responsibilities_ptr=r,
        sizes_ptr=partials.sizes,
        D=D,
        K=K,
        segments=partials.segments,
        d_programs=d_programs,
        second_width=partials.second,
        **groups.arguments,
        **partials.arguments,
        DIAG=diag,
        BLOCK_N=config.BLOCK_N,
        BLOCK_D=config.BLOCK_D,
    )
    partials.reduce(s1, s2, s0, s2)
    return s0, s1, s2
