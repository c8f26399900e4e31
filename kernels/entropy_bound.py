"""CEM loss of a batch's statistics and its derivative to the scatter: Eq. 5-7 of the paper, or the released code's hinge."""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton
import triton.language as tl
from cem_fast.kernels._launch import configuration, kernel, launch
from cem_fast.kernels._reduce import Partials
from cem_fast.kernels._rows import NATURAL, first_segment, only_if
from torch import Tensor


def double_bits(value: float) -> int:
    """Bits of a float64. Triton passes a Python number as float32, which would round it."""
    # the bits of 0 would be a 32-bit argument, which needs another version of the kernel; those of -0 are not
    return struct.unpack("<q", struct.pack("<d", value or -0.0))[0]


@triton.jit
def as_double(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def log1p(u):
    """``log(1 + u)``. For small u, the factor ``u / ((1 + u) - 1)`` restores the digits that 1 + u drops."""
    w = 1 + u
    small = tl.where(w == 1, u, tl.log(w) * (u / tl.where(w == 1, 1.0, w - 1)))
    return tl.where(u > 1, tl.log(w), small)


@triton.jit
def blend_of_paper(counts, weights, class_prior, num_rows, total, b):
    """Eq. 5-6 in Algorithm 1's order: the new mixture weight pi, and the shares of the batch and of the fit in the variance."""
    dtype = counts.dtype
    # b may be total / num_rows: rounding must not make a mass negative, and NaN must pass
    left = total - b * num_rows
    left = tl.where(left < 0, 0.0, left)
    of_fit = class_prior * weights * left.to(dtype)
    of_batch = b.to(dtype) * counts
    mass = of_fit + of_batch
    seen = counts > 0
    divisor = tl.where(seen, mass, 1.0)
    # two shares, because fitted + share (observed - fitted) cancels where observed is small
    return mass / total.to(dtype), tl.where(seen, of_batch / divisor, 0.0), tl.where(seen, of_fit / divisor, 1.0)


@triton.jit
def boost_of_batch(num_rows, total, boost):
    largest = total / tl.where(num_rows < 1, 1.0, num_rows)
    return tl.where(largest > boost, boost, largest)


@triton.jit
def minus_log(pi):
    """``-pi log pi``, 0 at 0."""
    return tl.where(pi == 0, 0.0, -pi * tl.log(tl.where(pi == 0, 1.0, pi)))


@triton.jit
def sum_of(pointer, size, BLOCK: tl.constexpr):
    """Sum in double, in fixed order."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(pointer + i, mask=i < size, other=0).to(tl.float64)
    return tl.sum(total, 0)


@kernel()
def entropy_bound_spherical_kernel(
    counts_ptr,
    scatter_ptr,
    variances_ptr,
    weights_ptr,
    class_prior_ptr,
    num_samples_ptr,
    noise_ptr,
    value_ptr,
    slope_ptr,
    D,
    C,
    K,
    official,
    boost,
    unbiased,
    mean,
    threshold,
    gamma,
    BLOCK: tl.constexpr,
):
    """Value and slope for one variance a component and one noise level, in a single program."""
    dtype = variances_ptr.dtype.element_ty
    size = C * K
    total = tl.load(num_samples_ptr).to(tl.float64)
    noise = tl.load(noise_ptr).to(tl.float64)
    boost = as_double(boost)
    dimension = D.to(tl.float64)
    num_rows = sum_of(counts_ptr, size, BLOCK)
    b = boost_of_batch(num_rows, total, boost)
    scale = tl.where(mean != 0, 1 / dimension, 1.0)
    gradient = 0.5 * scale * tl.where(unbiased != 0, 1 / tl.where(num_rows < 1, 1.0, num_rows), b / total)
    classes = tl.zeros([BLOCK], tl.int32)
    if official:
        for start in range(0, C, BLOCK):
            c = start + tl.arange(0, BLOCK)
            rows = tl.zeros([BLOCK], dtype)
            for k in range(0, K):
                rows += tl.load(counts_ptr + c * K + k, mask=c < C, other=0)
            classes += (rows > 0).to(tl.int32)
    present = tl.maximum(tl.sum(classes, 0), 1).to(dtype)
    level = tl.log(as_double(threshold) * noise + as_double(gamma)).to(dtype)
    offset = as_double(gamma).to(dtype)
    value = tl.zeros([BLOCK], tl.float64)
    for start in range(0, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < size
        counts = tl.load(counts_ptr + i, mask=inside, other=0)
        variances = tl.load(variances_ptr + i, mask=inside, other=1)
        weights = tl.load(weights_ptr + i, mask=inside, other=0)
        n = tl.where(counts < 1, 1.0, counts) * dimension.to(dtype)
        observed = tl.load(scatter_ptr + i, mask=inside, other=0) / n
        if official:
            seen = counts > 0
            share = boost.to(dtype) * counts / tl.where(seen, weights * (total.to(dtype) / C), 1.0)
            share = tl.where(seen, share, 0.0)
            share = tl.where(share < 1, share, tl.full([BLOCK], 0.99, dtype))
            padded = (1 - share) * variances + share * observed + offset
            hinge = tl.log(padded) - level
            weight = tl.where(seen, weights / present, 0.0)
            # NaN counts and hinges pass, so that an invalid batch differs from one below the threshold
            weight = tl.where(counts == counts, weight, counts)
            term = weight * tl.where(hinge <= 0, 0.0, hinge)
            slope = tl.where(hinge > 0, weight, 0.0) * share / (padded * n)
        else:
            prior = tl.load(class_prior_ptr + i // K, mask=inside, other=0)
            pi, share, rest = blend_of_paper(counts, weights, prior, num_rows, total, b)
            blended = rest * variances + share * observed
            entropy = 0.5 * dimension.to(dtype) * log1p(blended / noise.to(dtype))
            term = scale.to(dtype) * (pi * entropy + minus_log(pi))
            slope = gradient.to(dtype) / (blended + noise.to(dtype))
        value += tl.where(inside, term, 0.0).to(tl.float64)
        tl.store(slope_ptr + i, slope.to(dtype), mask=inside)
    tl.store(value_ptr, tl.sum(value, 0).to(dtype))


@triton.jit
def sum_of_segments(pointer, width, sizes_ptr, first, last, offset, inside, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Ordered sum over the segments of a class at ``offset``."""
    total = tl.zeros([BLOCK], dtype)
    for t in range(first, last):
        filled = tl.load(sizes_ptr + t) > 0
        total += tl.load(pointer + t * width + offset, mask=only_if(filled, inside), other=0)
    return total


@kernel("scatter_ptr", "variances_ptr", "slope_ptr", "D", "width")
def entropy_bound_kernel(
    counts_ptr,  # FROM_PARTIALS: [segments, width], both the scatter and, first_width behind it, the counts
    scatter_ptr,
    sizes_ptr,
    offsets_ptr,
    variances_ptr,
    weights_ptr,
    class_prior_ptr,
    num_samples_ptr,
    noise_ptr,
    terms_ptr,  # [C, K], the summands of the value
    slope_ptr,
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
    num_rows,  # -1: the sum of the counts
    boost,
    unbiased,
    mean,
    noise_per_dimension,
    DIAG: tl.constexpr,
    FROM_PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The paper's bound for variances or noise per dimension, one component per program.

    FROM_PARTIALS: sums the statistics over the segments here, so that the scatter is never stored.
    """
    dtype = variances_ptr.dtype.element_ty
    i = tl.program_id(0).to(tl.int64)
    total = tl.load(num_samples_ptr).to(tl.float64)
    rows = num_rows.to(tl.float64)
    if num_rows < 0:
        rows = sum_of(counts_ptr, C * K, BLOCK)
    b = boost_of_batch(rows, total, as_double(boost))
    dimension = D.to(tl.float64)
    scale = tl.where(mean != 0, 1 / dimension, 1.0)
    gradient = (0.5 * scale * tl.where(unbiased != 0, 1 / tl.where(rows < 1, 1.0, rows), b / total)).to(dtype)
    if FROM_PARTIALS:
        c = i // K
        first = first_segment(c, grouping, offsets_ptr, N, C, P, rows_per_segment)
        last = first_segment(c + 1, grouping, offsets_ptr, N, C, P, rows_per_segment)
        one = tl.arange(0, 1)
        counts = tl.sum(
            sum_of_segments(counts_ptr, width, sizes_ptr, first, last, first_width + i % K + one, one == 0, dtype, 1), 0
        )
        counts = tl.where(tl.load(sizes_ptr + segments) > 0, float("nan"), counts)
    else:
        counts = tl.load(counts_ptr + i)
    n = tl.where(counts < 1, 1.0, counts)
    weight, prior = tl.load(weights_ptr + i), tl.load(class_prior_ptr + i // K)
    pi, share, rest = blend_of_paper(counts, weight, prior, rows, total, b)
    logs = tl.zeros([BLOCK], dtype)
    precisions = tl.zeros([BLOCK], dtype)
    if not DIAG:
        observed_all = tl.load(scatter_ptr + i) / (n * dimension.to(dtype))
        blended_all = rest * tl.load(variances_ptr + i) + share * observed_all
    noise = tl.zeros([BLOCK], dtype) + tl.load(noise_ptr).to(dtype)
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        inside = d < D
        at = i * D + d
        blended = tl.full([BLOCK], 0, dtype)
        if noise_per_dimension:
            noise = tl.load(noise_ptr + d, mask=inside, other=1).to(dtype)
        if DIAG:
            variances = tl.load(variances_ptr + at, mask=inside, other=0)
            if FROM_PARTIALS:
                offset = (i % K) * D + d
                observed = sum_of_segments(scatter_ptr, width, sizes_ptr, first, last, offset, inside, dtype, BLOCK) / n
            else:
                observed = tl.load(scatter_ptr + at, mask=inside, other=0) / n
            blended = rest * variances + share * observed
        else:
            blended += blended_all
        logs += tl.where(inside, log1p(blended / noise), 0.0)
        precision = 1 / (blended + noise)
        if DIAG:
            tl.store(slope_ptr + at, gradient * precision, mask=inside)
        else:
            precisions += tl.where(inside, precision, 0.0)
    if not DIAG:
        tl.store(slope_ptr + i, gradient * (tl.sum(precisions, 0) / dimension.to(dtype)))
    entropy = 0.5 * tl.sum(logs, 0)
    tl.store(terms_ptr + i, scale.to(dtype) * (pi * entropy + minus_log(pi)))


@kernel()
def sum_kernel(terms_ptr, value_ptr, size, BLOCK: tl.constexpr):
    tl.store(value_ptr, sum_of(terms_ptr, size, BLOCK).to(value_ptr.dtype.element_ty))


def entropy_bound(
    counts: Tensor,
    scatter: Tensor,
    dimension: int,
    variances: Tensor,
    weights: Tensor,
    class_prior: Tensor,
    num_samples: Tensor,
    noise_variance: Tensor,
    official: bool = False,
    boost: float = 1.0,
    unbiased: bool = True,
    mean: bool = True,
    threshold: float = 0.125,
    gamma: float = 0.01,
) -> tuple[Tensor, Tensor]:
    counts, scatter, variances, weights, class_prior, noise_variance = (
        t.contiguous() for t in (counts, scatter, variances, weights, class_prior, noise_variance)
    )
    C, K = counts.shape
    value, slope = variances.new_empty(()), variances.new_empty(variances.shape)
    config = configuration("entropy", variances)
    priors = dict(
        variances_ptr=variances,
        weights_ptr=weights,
        class_prior_ptr=class_prior,
        num_samples_ptr=num_samples,
        noise_ptr=noise_variance,
    )
    diag, noisy = variances.dim() == 3, noise_variance.shape[0] > 1
    if not diag and not noisy:
        launch(
            entropy_bound_spherical_kernel,
            1,
            config,
            variances,
            counts_ptr=counts,
            scatter_ptr=scatter,
            value_ptr=value,
            slope_ptr=slope,
            D=dimension,
            C=C,
            K=K,
            official=int(official),
            boost=double_bits(boost),
            unbiased=int(unbiased),
            mean=int(mean),
            threshold=double_bits(threshold),
            gamma=double_bits(gamma),
            **priors,
            BLOCK=config.BLOCK_D,
        )
        return value, slope
    nothing = counts.new_empty(0, dtype=torch.int64)
    statistics = dict(
        counts_ptr=counts,
        scatter_ptr=scatter,
        sizes_ptr=nothing,
        offsets_ptr=nothing,
        N=0,
        P=1,
        grouping=NATURAL.value,
        segments=0,
        rows_per_segment=1,
        first_width=0,
        width=0,
        num_rows=-1,
    )
    return _bound_by_dimension(statistics, priors, dimension, boost, unbiased, mean, from_partials=False)


def entropy_bound_of_partials(
    partials: Partials,
    variances: Tensor,
    weights: Tensor,
    class_prior: Tensor,
    num_samples: Tensor,
    noise_variance: Tensor,
    boost: float,
    unbiased: bool,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """The paper's bound for variances per dimension, from the partial statistics of segments."""
    groups = partials.groups
    statistics = dict(
        counts_ptr=partials.values,
        scatter_ptr=partials.values,
        sizes_ptr=partials.sizes,
        offsets_ptr=groups.offsets,
        N=groups.rows,
        P=groups.pieces,
        grouping=groups.grouping,
        segments=partials.segments,
        rows_per_segment=partials.rows_per_segment,
        first_width=partials.first + partials.second,
        width=partials.width,
        num_rows=groups.rows,
    )
    priors = dict(
        variances_ptr=variances.contiguous(),
        weights_ptr=weights.contiguous(),
        class_prior_ptr=class_prior.contiguous(),
        num_samples_ptr=num_samples,
        noise_ptr=noise_variance.contiguous(),
    )
    return _bound_by_dimension(statistics, priors, variances.shape[2], boost, unbiased, mean, from_partials=True)


def _bound_by_dimension(
    statistics: dict[str, Any],
    priors: dict[str, Tensor],
    dimension: int,
    boost: float,
    unbiased: bool,
    mean: bool,
    *,
    from_partials: bool,
) -> tuple[Tensor, Tensor]:
    variances, weights = priors["variances_ptr"], priors["weights_ptr"]
    C, K = weights.shape
    value, slope, terms = variances.new_empty(()), torch.empty_like(variances), torch.empty_like(weights)
    config = configuration("entropy", variances)
    launch(
        entropy_bound_kernel,
        weights.numel(),
        config,
        variances,
        terms_ptr=terms,
        slope_ptr=slope,
        D=dimension,
        C=C,
        K=K,
        boost=double_bits(boost),
        unbiased=int(unbiased),
        mean=int(mean),
        noise_per_dimension=int(priors["noise_ptr"].shape[0] > 1),
        **statistics,
        **priors,
        DIAG=variances.dim() == 3,
        FROM_PARTIALS=from_partials,
        BLOCK=config.BLOCK_D,
    )
    launch(sum_kernel, 1, config, variances, terms_ptr=terms, value_ptr=value, size=C * K, BLOCK=config.BLOCK_D)
    return value, slope
