"""The log-likelihood of one class with many components, and its gradients, by matrix products on tensor cores.

``sum_d (x - mu)^2 / v`` is expanded about a common shift, the mean of some component means. The expansion loses accuracy for
components many standard deviations from the shift. If such a component contributes to a row, its distance is computed directly.
To know what contributes, a first pass over all components finds a floor of each row's highest joint density. Components are
processed tile by tile, and no ``[N, K]`` matrix is stored.

Each product is added to its sum outside of the tensor cores, which round towards zero. No operand is a sum of two products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from cem_fast.kernels._configs import Config
from cem_fast.kernels._distance import next_wanted
from cem_fast.kernels._launch import (
    cdiv,
    configuration,
    kernel,
    launch,
    multiprocessors,
    product_precision,
    row_windows,
)
from cem_fast.kernels._rows import load_tile, only_if
from torch import Tensor

LOG_2PI: tl.constexpr = tl.constexpr(1.8378770664093453)

# Components this many nats below a row's highest joint density keep the expanded distance: each adds less than 1e-8 of it.
NEAR: tl.constexpr = tl.constexpr(20.0)
# A distance is computed directly if the component's distance to the shift is more than this share of it.
MATERIAL: tl.constexpr = tl.constexpr(0.25)
# Maximum error of the expansion, in nats per unit of its terms.
ROUNDING: tl.constexpr = tl.constexpr(2.0**-19)


# Components whose means are averaged to the shift.
SAMPLES: tl.constexpr = tl.constexpr(16)


@triton.jit
def sampled_shift(means_ptr, d, inside, D, K):
    k = (tl.arange(0, SAMPLES).to(tl.int64) * K) // SAMPLES
    means = tl.load(means_ptr + k[:, None] * D + d[None, :], mask=inside[None, :], other=0)
    return tl.sum(means, 0) / SAMPLES


@kernel("means_ptr", "variances_ptr", "D")
def component_terms_kernel(
    shift_ptr, means_ptr, variances_ptr, weights_ptr, constant_ptr, norm_ptr, D, K, DIAG: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Joint log-density of one component at its mean, and the squared distance of its mean to the shift."""
    k = tl.program_id(0).to(tl.int64)
    # log(2 pi v), because 2 pi v is nearer to 1 than v and 2 pi
    logs = tl.zeros([BLOCK], means_ptr.dtype.element_ty)
    norm = tl.zeros([BLOCK], means_ptr.dtype.element_ty)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < D
        shift = sampled_shift(means_ptr, d, inside, D, K)
        tl.store(shift_ptr + d, shift, mask=only_if(k == 0, inside))
        away = tl.load(means_ptr + k * D + d, mask=inside, other=0) - tl.where(inside, shift, 0.0)
        if DIAG:
            variance = tl.load(variances_ptr + k * D + d, mask=inside, other=1)
            logs += tl.where(inside, tl.log(variance) + LOG_2PI, 0.0)
        else:
            variance = tl.zeros([BLOCK], means_ptr.dtype.element_ty) + tl.load(variances_ptr + k)
        norm += away * away / variance
    determinant = tl.sum(logs, 0)
    if not DIAG:
        # a sum of equal terms would accumulate the same rounding error
        determinant = (tl.log(tl.load(variances_ptr + k)) + LOG_2PI) * D.to(means_ptr.dtype.element_ty)
    tl.store(constant_ptr + k, tl.log(tl.load(weights_ptr + k)) - 0.5 * determinant)
    tl.store(norm_ptr + k, tl.sum(norm, 0))


@triton.jit
def component_tile(shift, means_ptr, variances_ptr, component, exists, d, inside, D, DIAG: tl.constexpr):
    """Of a tile ``[BLOCK_K, BLOCK_D]``: means about the shift and, 1 outside, variances."""
    both = exists[:, None] & inside[None, :]
    at = component.to(tl.int64)[:, None] * D + d[None, :]
    away = tl.where(both, tl.load(means_ptr + at, mask=both, other=0) - shift[None, :], 0.0)
    variance = away * 0 + 1
    if DIAG:
        variance = tl.load(variances_ptr + at, mask=both, other=1)
    return away, variance


@triton.jit
def centered_tile(x_ptr, stride, shift, row, valid, d, inside, dtype: tl.constexpr):
    """Rows of x about the shift; 0 outside."""
    x = load_tile(x_ptr, stride, row, valid, d, inside, dtype)
    return tl.where(valid[:, None] & inside[None, :], x - shift[None, :], 0.0)


@triton.jit
def expanded_distances(
    x_ptr, stride, shift_ptr, means_ptr, variances_ptr, weights_ptr, constant_ptr, norm_ptr, row, valid, first, last,
    D, K, stores,
    TERMS: tl.constexpr, DIAG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``sum_d (x - mu)^2 / v`` as ``x^2 (1/v) - 2 x (mu/v) + mu^2 / v``, ``[BLOCK_N, BLOCK_K]``; and the terms of the components,
    see ``component_terms_kernel``. With ``TERMS``, they are computed and, if the program ``stores``, written; else they are read.
    """
    dtype = means_ptr.dtype.element_ty
    component = first + tl.arange(0, BLOCK_K)
    exists = component < last
    total = tl.zeros([BLOCK_N, BLOCK_K], dtype)
    square = tl.zeros([BLOCK_N], dtype)
    norms = tl.zeros([BLOCK_K, BLOCK_D], dtype)
    logs = tl.zeros([BLOCK_K, BLOCK_D], dtype)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < D
        if TERMS:
            shift = sampled_shift(means_ptr, d, inside, D, K)
            tl.store(shift_ptr + d, shift, mask=only_if(stores, inside))
        else:
            shift = tl.load(shift_ptr + d, mask=inside, other=0)
        x = centered_tile(x_ptr, stride, shift, row, valid, d, inside, dtype)
        away, variance = component_tile(shift, means_ptr, variances_ptr, component, exists, d, inside, D, DIAG)
        if DIAG:
            both = exists[:, None] & inside[None, :]
            precision = tl.where(both, 1 / variance, 0.0)
            if TERMS:
                norms += away * away * precision
                logs += tl.where(both, tl.log(variance) + LOG_2PI, 0.0)
            mixed = tl.dot(x, tl.trans(away * precision), input_precision=PRECISION)
            total += tl.dot(x * x, tl.trans(precision), input_precision=PRECISION) - 2 * mixed
        else:
            if TERMS:
                norms += away * away
            total -= 2 * tl.dot(x, tl.trans(away), input_precision=PRECISION)
            square += tl.sum(x * x, 1)
    if TERMS:
        norm = tl.sum(norms, 1)
        determinant = tl.sum(logs, 1)
        if not DIAG:
            variance = tl.load(variances_ptr + component, mask=exists, other=1)
            norm /= variance
            determinant = (tl.log(variance) + LOG_2PI) * D.to(dtype)
        constant = tl.log(tl.load(weights_ptr + component, mask=exists, other=1)) - 0.5 * determinant
        tl.store(constant_ptr + component, constant, mask=only_if(stores, exists))
        tl.store(norm_ptr + component, norm, mask=only_if(stores, exists))
    else:
        constant = tl.load(constant_ptr + component, mask=exists, other=0)
        norm = tl.load(norm_ptr + component, mask=exists, other=0)
    if not DIAG:
        variance = tl.load(variances_ptr + component, mask=exists, other=1)
        total = (total + square[:, None]) / variance[None, :]
    return total + norm[None, :], constant, norm


@triton.jit
def certain_floor(total, constant, norm, exists):
    """What each row's highest joint density reaches for certain ``[BLOCK_N]``, and the margins of a tile."""
    margin = ROUNDING * (tl.abs(total) + 2 * norm[None, :])
    certain = tl.where(exists[None, :], constant[None, :] - 0.5 * total - margin, float("-inf"))
    return tl.max(tl.where(certain == certain, certain, float("-inf")), 1), margin


@triton.jit
def root_scale(variance):
    """A power of two, at most 1 and near ``variance ** -0.5``: deviations times it can be squared, and lose no bit."""
    exponent = tl.maximum(variance.to(tl.int32, bitcast=True) >> 23, 127) - 127
    return ((127 - exponent // 2) << 23).to(tl.float32, bitcast=True)


@triton.jit
def direct_distance(
    x_ptr, stride, means_ptr, variances_ptr, row, valid, k, D,
    DIAG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``sum_d (x - mu)^2 / v`` of one component without expansion, ``[BLOCK_N]``."""
    dtype = means_ptr.dtype.element_ty
    # one column per dimension of a tile: their rounding errors cancel, those of a single running sum would accumulate
    squares = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = d < D
        mean = tl.load(means_ptr + k.to(tl.int64) * D + d, mask=inside, other=0)
        if DIAG:
            variance = tl.load(variances_ptr + k.to(tl.int64) * D + d, mask=inside, other=1)
        else:
            variance = tl.full([BLOCK_D], 0, dtype) + tl.load(variances_ptr + k)
        scale = root_scale(variance)
        x = load_tile(x_ptr, stride, row, valid, d, inside, dtype)
        deviation = x * scale[None, :] - (mean * scale)[None, :]
        square = deviation * deviation
        if DIAG:
            square *= (1 / (variance * scale * scale))[None, :]
        squares += square
    total = tl.sum(squares, 1)
    if not DIAG:
        variance = tl.load(variances_ptr + k)
        scale = root_scale(variance)
        total /= variance * scale * scale
    return total


@triton.jit
def joint_tile(
    floor, x_ptr, stride, shift_ptr, means_ptr, variances_ptr, weights_ptr, constant_ptr, norm_ptr, row, valid, first,
    last, D, K, stores,
    TERMS: tl.constexpr, DIAG: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The log joint density of a tile, -inf from component ``last`` on: from expanded distances, or from direct ones where a
    component may reach ``floor - NEAR``. Each row's highest density is at least its floor ``[BLOCK_N]``.
    """
    column = tl.arange(0, BLOCK_K)
    exists = first + column < last
    total, constant, norm = expanded_distances(
        x_ptr, stride, shift_ptr, means_ptr, variances_ptr, weights_ptr, constant_ptr, norm_ptr, row, valid, first,
        last, D, K, stores, TERMS, DIAG, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION,
    )  # fmt: skip
    joint = constant[None, :] - 0.5 * total
    reached, margin = certain_floor(total, constant, norm, exists)
    floor = tl.maximum(floor, reached)
    near = (joint + margin >= floor[:, None] - NEAR) & (norm[None, :] > total * MATERIAL)
    # the expansion of huge values overflows, and may give inf - inf
    near = (near | ~(tl.abs(total) < float("inf"))) & valid[:, None] & exists[None, :]
    j = next_wanted(near, -1, BLOCK_K)
    while j < BLOCK_K:
        distance = direct_distance(
            x_ptr, stride, means_ptr, variances_ptr, row, valid, first + j, D, DIAG, BLOCK_N, BLOCK_D
        )  # fmt: skip
        total = tl.where(near & (column == j)[None, :], distance[:, None], total)
        j = next_wanted(near, j, BLOCK_K)
    return tl.where(exists[None, :], constant[None, :] - 0.5 * total, float("-inf"))


@kernel("x_ptr", "stride", "means_ptr", "variances_ptr", "D")
def global_floor_kernel(
    x_ptr,
    stride,
    shift_ptr,
    means_ptr,
    variances_ptr,
    weights_ptr,
    constant_ptr,
    norm_ptr,
    floor_ptr,  # [shares, N]
    ticket_ptr,  # [blocks of rows]
    N,
    D,
    K,
    shares,
    share_size,  # a multiple of BLOCK_K
    DIAG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A floor of the highest joint density of each row in one share of the components, without any direct distance.

    The programs of the first rows store the terms of the components, those of the first share clear the tickets.
    """
    share = tl.program_id(0) % shares
    block = tl.program_id(0) // shares
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < N
    floor = tl.full([BLOCK_N], float("-inf"), means_ptr.dtype.element_ty)
    last = tl.minimum((share + 1) * share_size, K)
    for first in range(share * share_size, last, BLOCK_K):
        total, constant, norm = expanded_distances(
            x_ptr, stride, shift_ptr, means_ptr, variances_ptr, weights_ptr, constant_ptr, norm_ptr, row, valid, first,
            last, D, K, block == 0, True, DIAG, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION,
        )  # fmt: skip
        reached, _ = certain_floor(total, constant, norm, first + tl.arange(0, BLOCK_K) < last)
        floor = tl.maximum(floor, reached)
    tl.store(floor_ptr + share * N.to(tl.int64) + row, floor, mask=valid)
    if share == 0:
        tl.store(ticket_ptr + block, 0)


@kernel("x_ptr", "stride", "shift_ptr", "means_ptr", "variances_ptr", "D")
def global_log_prob_kernel(
    x_ptr,
    stride,
    shift_ptr,
    means_ptr,
    variances_ptr,
    constant_ptr,
    norm_ptr,
    floor_ptr,  # [shares, N]
    partial_ptr,  # [shares, N]
    ticket_ptr,  # [blocks of rows]
    log_prob_ptr,
    N,
    D,
    K,
    shares,
    share_size,  # a multiple of BLOCK_K
    DIAG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online logsumexp of a block of rows over the tiles of one share of the components; the last share adds up all, in order."""
    dtype = means_ptr.dtype.element_ty
    share = tl.program_id(0) % shares
    block = tl.program_id(0) // shares
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < N
    floor = tl.full([BLOCK_N], float("-inf"), dtype)
    for s in range(0, shares):
        floor = tl.maximum(floor, tl.load(floor_ptr + s * N.to(tl.int64) + row, mask=valid, other=0))
    highest = tl.full([BLOCK_N], float("-inf"), dtype)
    mass = tl.zeros([BLOCK_N], dtype)
    last = tl.minimum((share + 1) * share_size, K)
    for first in range(share * share_size, last, BLOCK_K):
        joint = joint_tile(
            floor, x_ptr, stride, shift_ptr, means_ptr, variances_ptr, means_ptr, constant_ptr, norm_ptr, row, valid,
            first, last, D, K, False, False, DIAG, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION,
        )  # fmt: skip
        new = tl.maximum(highest, tl.max(tl.where(joint == joint, joint, float("-inf")), 1))
        anchor = tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp(highest - anchor) + tl.sum(tl.exp(joint - anchor[:, None]), 1)
        highest = new
    log_prob = tl.where(highest == float("-inf"), 0.0, highest) + tl.log(mass)
    tl.store(partial_ptr + share * N.to(tl.int64) + row, log_prob, mask=valid)
    tl.debug_barrier()
    if tl.atomic_add(ticket_ptr + block, 1) == shares - 1:
        highest = tl.full([BLOCK_N], float("-inf"), dtype)
        mass = tl.zeros([BLOCK_N], dtype)
        for s in range(0, shares):
            part = tl.load(partial_ptr + s * N.to(tl.int64) + row, mask=valid, other=0, cache_modifier=".cg")
            new = tl.maximum(highest, tl.where(part == part, part, float("-inf")))
            # an infinite maximum is the answer itself
            anchor = tl.where(tl.abs(new) == float("inf"), 0.0, new)
            mass = mass * tl.exp(highest - anchor) + tl.exp(part - anchor)
            highest = new
        log_prob = tl.where(tl.abs(highest) == float("inf"), 0.0, highest) + tl.log(mass)
        tl.store(log_prob_ptr + row, log_prob, mask=valid)


@kernel("x_ptr", "stride", "means_ptr", "variances_ptr", "D")
def global_responsibilities_kernel(
    x_ptr,
    stride,
    shift_ptr,
    means_ptr,
    variances_ptr,
    weights_ptr,
    constant_ptr,
    norm_ptr,
    log_prob_ptr,
    responsibilities_ptr,
    N,
    D,
    K,
    tiles,
    DIAG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``r_nk = exp(joint_nk - log p(x_n))`` of one tile; the programs of the first rows store the terms of the components."""
    first = (tl.program_id(0) % tiles) * BLOCK_K
    row = (tl.program_id(0) // tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < N
    log_prob = tl.load(log_prob_ptr + row, mask=valid, other=0)
    joint = joint_tile(
        log_prob, x_ptr, stride, shift_ptr, means_ptr, variances_ptr, weights_ptr, constant_ptr, norm_ptr, row, valid,
        first, K, D, K, tl.program_id(0) < tiles, True, DIAG, BLOCK_N, BLOCK_K, BLOCK_D, PRECISION,
    )  # fmt: skip
    component = first + tl.arange(0, BLOCK_K)
    at = row.to(tl.int64)[:, None] * K + component[None, :]
    mask = valid[:, None] & (component < K)[None, :]
    tl.store(responsibilities_ptr + at, tl.exp(joint - log_prob[:, None]), mask=mask)


@triton.jit
def responsibility_tile(responsibilities_ptr, log_prob_ptr, constant_ptr, norm_ptr, row, valid, component, exists, K):
    """``r`` of a tile, 0 outside, and the elements to compute directly, chosen as for the distances."""
    both = valid[:, None] & exists[None, :]
    r = tl.load(responsibilities_ptr + row.to(tl.int64)[:, None] * K + component[None, :], mask=both, other=0)
    log_prob = tl.load(log_prob_ptr + row, mask=valid, other=0)
    constant = tl.load(constant_ptr + component, mask=exists, other=0)
    norm = tl.load(norm_ptr + component, mask=exists, other=0)
    log_r = tl.log(tl.where(r > 0, r, 1.0))
    distance = 2 * (constant[None, :] - log_prob[:, None] - log_r)
    return r, (r > 0) & (log_r > -NEAR) & (norm[None, :] > distance * MATERIAL)


@kernel("x_ptr", "stride", "shift_ptr", "means_ptr", "variances_ptr", "dx_ptr", "D")
def global_gradient_kernel(
    grad_ptr,
    x_ptr,
    stride,
    shift_ptr,
    means_ptr,
    variances_ptr,
    constant_ptr,
    norm_ptr,
    log_prob_ptr,
    responsibilities_ptr,
    dx_ptr,
    N,
    D,
    K,
    d_programs,
    DIAG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``dx = g sum_k r_k (mu_k - x) / v_k`` of one tile, as ``r (mu/v) - x (r (1/v))``, or directly. Each row's r are divided by
    their sum, so that they sum to 1 whatever the rounding of the log-likelihood."""
    dtype = means_ptr.dtype.element_ty
    d = (tl.program_id(0) % d_programs) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    row = (tl.program_id(0) // d_programs) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = row < N
    shift = tl.load(shift_ptr + d, mask=inside, other=0)
    x = centered_tile(x_ptr, stride, shift, row, valid, d, inside, dtype)
    pull = tl.zeros([BLOCK_N, BLOCK_D], dtype)
    push = tl.zeros([BLOCK_N], dtype)
    mass = tl.zeros([BLOCK_N], dtype)
    column = tl.arange(0, BLOCK_K)
    for first in range(0, K, BLOCK_K):
        component = first + column
        exists = component < K
        r, direct = responsibility_tile(
            responsibilities_ptr, log_prob_ptr, constant_ptr, norm_ptr, row, valid, component, exists, K
        )  # fmt: skip
        mass += tl.sum(r, 1)
        if not DIAG:
            r /= tl.load(variances_ptr + component, mask=exists, other=1)[None, :]
        far = tl.where(direct, 0.0, r)
        away, variance = component_tile(shift, means_ptr, variances_ptr, component, exists, d, inside, D, DIAG)
        if DIAG:
            precision = tl.where(exists[:, None] & inside[None, :], 1 / variance, 0.0)
            pushed = x * tl.dot(far, precision, input_precision=PRECISION)
            pull += tl.dot(far, away * precision, input_precision=PRECISION) - pushed
        else:
            pull -= tl.dot(-far, away, input_precision=PRECISION)
            push += tl.sum(far, 1)
        j = next_wanted(direct, -1, BLOCK_K)
        while j < BLOCK_K:
            at = (first + j).to(tl.int64) * D + d
            own = tl.sum(tl.where(direct & (column == j)[None, :], r, 0.0), 1)
            mean = tl.load(means_ptr + at, mask=inside, other=0)
            deviation = mean[None, :] - load_tile(x_ptr, stride, row, valid, d, inside, dtype)
            if DIAG:
                deviation *= (1 / tl.load(variances_ptr + at, mask=inside, other=1))[None, :]
            pull += own[:, None] * deviation
            j = next_wanted(direct, j, BLOCK_K)
    grad = tl.load(grad_ptr + row, mask=valid, other=0) / mass
    dx = grad[:, None] * (pull - x * push[:, None])
    at = row.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=valid[:, None] & inside[None, :])


@kernel("x_ptr", "stride", "shift_ptr", "means_ptr", "first_ptr", "D")
def global_moments_kernel(
    row_weights_ptr,
    x_ptr,
    stride,
    shift_ptr,
    means_ptr,
    constant_ptr,
    norm_ptr,
    log_prob_ptr,
    responsibilities_ptr,
    mass_ptr,
    first_ptr,
    second_ptr,  # DIAG: [K, D], else [d_programs, K]
    N,
    D,
    K,
    d_programs,
    DIAG: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``sum_n a_nk (1, x - mu_k, (x - mu_k)^2)`` of a tile of components and dimensions, ``a = row_weights r``."""
    dtype = means_ptr.dtype.element_ty
    part = tl.program_id(0) % d_programs
    d = part * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = d < D
    column = tl.arange(0, BLOCK_K)
    begin = (tl.program_id(0) // d_programs) * BLOCK_K
    component = begin + column
    exists = component < K
    both = exists[:, None] & inside[None, :]
    at = component.to(tl.int64)[:, None] * D + d[None, :]
    shift = tl.load(shift_ptr + d, mask=inside, other=0)
    mass = tl.zeros([BLOCK_K], dtype)
    first = tl.zeros([BLOCK_K, BLOCK_D], dtype)
    second = tl.zeros([BLOCK_K, BLOCK_D], dtype)
    for start in range(0, N, BLOCK_N):
        row = start + tl.arange(0, BLOCK_N)
        valid = row < N
        r, direct = responsibility_tile(
            responsibilities_ptr, log_prob_ptr, constant_ptr, norm_ptr, row, valid, component, exists, K
        )  # fmt: skip
        a = tl.load(row_weights_ptr + row, mask=valid, other=0)[:, None] * r
        mass += tl.sum(a, 0)
        far = tl.where(direct, 0.0, a)
        x = centered_tile(x_ptr, stride, shift, row, valid, d, inside, dtype)
        away, _ = component_tile(shift, means_ptr, means_ptr, component, exists, d, inside, D, False)
        far_mass = tl.sum(far, 0)[:, None]
        sums = tl.dot(tl.trans(far), x, input_precision=PRECISION)
        first += sums - away * far_mass
        squares = tl.dot(tl.trans(far), x * x, input_precision=PRECISION)
        second += (squares - 2 * away * sums) + away * away * far_mass
        j = next_wanted(direct, -1, BLOCK_K)
        while j < BLOCK_K:
            own = tl.sum(tl.where(direct & (column == j)[None, :], a, 0.0), 1)
            mean = tl.load(means_ptr + (begin + j).to(tl.int64) * D + d, mask=inside, other=0)
            deviation = load_tile(x_ptr, stride, row, valid, d, inside, dtype) - mean[None, :]
            weighted = own[:, None] * tl.where(valid[:, None], deviation, 0.0)
            mine = (column == j)[:, None]
            first += tl.where(mine, tl.sum(weighted, 0)[None, :], 0.0)
            second += tl.where(mine, tl.sum(weighted * deviation, 0)[None, :], 0.0)
            j = next_wanted(direct, j, BLOCK_K)
    tl.store(first_ptr + at, first, mask=both)
    if DIAG:
        tl.store(second_ptr + at, second, mask=both)
    else:
        squares = tl.sum(tl.where(inside[None, :], second, 0.0), 1)
        tl.store(second_ptr + part * K.to(tl.int64) + component, squares, mask=exists)
    tl.store(mass_ptr + component, mass, mask=only_if(part == 0, exists))


class Products:
    """The operations on rows of one mixture without labels; tensors are contiguous, but rows of x may lie apart."""

    def __init__(self, x: Tensor, means: Tensor, variances: Tensor, weights: Tensor):
        self.x, self.means, self.variances, self.weights = x, means, variances, weights
        _, self.K, self.D = means.shape
        self.shift = means.new_empty(self.D)
        self.constant, self.norm = torch.empty_like(weights), torch.empty_like(weights)
        self.diag = variances.dim() == 3

    def _terms(self) -> None:
        """Terms of the components, where no kernel has stored them that computes joint densities."""
        config = configuration("entropy", self.means)
        launch(
            component_terms_kernel,
            self.K,
            config,
            self.means,
            shift_ptr=self.shift,
            means_ptr=self.means,
            variances_ptr=self.variances,
            weights_ptr=self.weights,
            constant_ptr=self.constant,
            norm_ptr=self.norm,
            D=self.D,
            K=self.K,
            DIAG=self.diag,
            BLOCK=config.BLOCK_D,
        )

    def _arguments(self, x: Tensor, config: Config) -> dict[str, Any]:
        """Arguments of every kernel that reads these rows."""
        return dict(
            x_ptr=x,
            stride=x.stride(0),
            shift_ptr=self.shift,
            means_ptr=self.means,
            constant_ptr=self.constant,
            norm_ptr=self.norm,
            N=x.shape[0],
            D=self.D,
            K=self.K,
            DIAG=self.diag,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            BLOCK_D=config.BLOCK_D,
            PRECISION=product_precision(self.means),
        )

    def log_prob(self) -> Tensor:
        N, K = self.x.shape[0], self.K
        config = configuration("product", self.means)
        blocks = cdiv(N, config.BLOCK_N)
        # two programs to every multiprocessor
        shares = min(cdiv(2 * multiprocessors(self.means), blocks), cdiv(K, config.BLOCK_K))
        size = cdiv(cdiv(K, shares), config.BLOCK_K) * config.BLOCK_K
        shares = cdiv(K, size)
        floor, partial = self.means.new_empty(2, shares, N).unbind()
        ticket = torch.empty(blocks, dtype=torch.int64, device=self.means.device)
        log_prob = self.means.new_empty(N)
        common = self._arguments(self.x, config) | dict(
            variances_ptr=self.variances, floor_ptr=floor, ticket_ptr=ticket, shares=shares, share_size=size
        )
        launch(global_floor_kernel, blocks * shares, config, self.means, weights_ptr=self.weights, **common)
        launch(
            global_log_prob_kernel,
            blocks * shares,
            config,
            self.means,
            partial_ptr=partial,
            log_prob_ptr=log_prob,
            **common,
        )
        return log_prob

    def responsibilities(self, rows: slice, log_prob: Tensor) -> Tensor:
        """Responsibilities whose sum may differ from 1 by the rounding of the log-likelihood."""
        x = self.x[rows]
        r = self.means.new_empty(x.shape[0], self.K)
        config = configuration("product", self.means)
        tiles = cdiv(self.K, config.BLOCK_K)
        launch(
            global_responsibilities_kernel,
            cdiv(x.shape[0], config.BLOCK_N) * tiles,
            config,
            self.means,
            variances_ptr=self.variances,
            weights_ptr=self.weights,
            log_prob_ptr=log_prob[rows],
            responsibilities_ptr=r,
            tiles=tiles,
            **self._arguments(x, config),
        )
        return r

    @staticmethod
    def normalized(r: Tensor) -> Tensor:
        return r.div_(r.sum(1, keepdim=True))

    def _windows(self, log_prob: Tensor, kept: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their responsibilities: all rows if the forward kept them, else windows of recomputed ones."""
        if kept.shape[1]:
            self._terms()
            yield slice(0, self.x.shape[0]), kept
            return
        for rows in row_windows(self.x.shape[0], self.K):
            yield rows, self.responsibilities(rows, log_prob)

    def gradient(self, grad: Tensor, log_prob: Tensor, kept: Tensor, dx: Tensor) -> None:
        config = configuration("product_gradient", self.means)
        d_programs = cdiv(self.D, config.BLOCK_D)
        for rows, r in self._windows(log_prob, kept):
            x = self.x[rows]
            launch(
                global_gradient_kernel,
                cdiv(x.shape[0], config.BLOCK_N) * d_programs,
                config,
                self.means,
                grad_ptr=grad[rows],
                variances_ptr=self.variances,
                log_prob_ptr=log_prob[rows],
                responsibilities_ptr=r,
                dx_ptr=dx[rows],
                d_programs=d_programs,
                **self._arguments(x, config),
            )

    def moments(self, row_weights: Tensor, log_prob: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mass, first, second = (
            torch.zeros_like(self.constant),
            torch.zeros_like(self.means),
            torch.zeros_like(self.variances),
        )
        for rows, r in self._windows(log_prob, kept):
            r = r if kept.shape[1] else self.normalized(r)
            parts = self._moments(self.x[rows], row_weights[rows], log_prob[rows], r)
            for total, part in zip((mass, first, second), parts):
                total += part
        return mass, first, second

    def _moments(self, x: Tensor, row_weights: Tensor, log_prob: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = configuration("product_moments", self.means)
        d_programs = cdiv(self.D, config.BLOCK_D)
        mass, first = torch.empty_like(self.constant), torch.empty_like(self.means)
        second = torch.empty_like(self.means) if self.diag else self.means.new_empty(d_programs, self.K)
        launch(
            global_moments_kernel,
            cdiv(self.K, config.BLOCK_K) * d_programs,
            config,
            self.means,
            row_weights_ptr=row_weights,
            log_prob_ptr=log_prob,
            responsibilities_ptr=r,
            mass_ptr=mass,
            first_ptr=first,
            second_ptr=second,
            d_programs=d_programs,
            **self._arguments(x, config),
        )
        return mass, first, second if self.diag else second.sum(0)
