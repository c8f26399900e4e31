"""Operations in plain torch, the specification of every compiled backend.

Each function has the signature of its dispatcher operator (see ``library.py``). Rows are processed in blocks, so that no
``N x K x D`` tensor is created. A row whose label lies outside ``[0, C)`` makes its own log-probability NaN and all
statistics of the batch NaN; nothing is read out of bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# Largest number of elements of a rows x K x D block, unless a single row already exceeds it.
BLOCK_ELEMENTS = 1 << 22


def _row_blocks(x: Tensor, means: Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_ELEMENTS // max(1, means.shape[1] * means.shape[2]))
    for start in range(0, x.shape[0], rows):
        yield slice(start, min(start + rows, x.shape[0]))


def _classes(x: Tensor, means: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Class of each row, clamped into range, and whether it was in range."""
    if labels is None:
        labels = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    valid = (labels >= 0) & (labels < means.shape[0])
    return labels.clamp(0, means.shape[0] - 1), valid


def _squared_distance(x: Tensor, means: Tensor, inverse_variances: Tensor | None) -> Tensor:
    """x [n, D], means [n, K, D], inverse_variances [n, K(, D)] or None -> [n, K]."""
    # in one order of summation, whatever the layout: equal means must have equal distances
    deviation = x.contiguous().unsqueeze(1) - means.contiguous()
    if inverse_variances is None:
        return deviation.square().sum(-1)
    inverse = inverse_variances if inverse_variances.dim() == 3 else inverse_variances.unsqueeze(-1)
    return (deviation * inverse * deviation).sum(-1)  # the square alone may overflow


def _nearest(x: Tensor, means: Tensor) -> Tensor:
    """Index ``[n]`` of the nearest of each row's means ``[n, K, D]``."""
    distance = _squared_distance(x, means, None)
    overflows = distance.amin(1) == math.inf
    if distance.is_cpu and not overflows.any():
        return distance.argmin(1)
    # squares of smaller deviations keep the order where all others overflow
    shrink = torch.finfo(x.dtype).max ** -0.6
    return torch.where(overflows[:, None], _squared_distance(x * shrink, means * shrink, None), distance).argmin(1)


def _log_joint(x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, classes: Tensor) -> Tensor:
    """log(w_ck N(x_n; mu_ck, v_ck)) of each row's own class, [n, K]."""
    log_2pi_v = math.log(2 * math.pi) + torch.log(variances)  # 2 pi v alone may overflow
    log_det = log_2pi_v.sum(-1) if variances.dim() == 3 else means.shape[2] * log_2pi_v
    constant = torch.log(weights) - 0.5 * log_det
    return constant[classes] - 0.5 * _squared_distance(x, means[classes], variances[classes].reciprocal())


def mixture_log_prob_fwd(
    x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, labels: Tensor | None, with_responsibilities: bool
) -> tuple[Tensor, Tensor]:
    """``log p(x_n | c = y_n)`` ``[N]`` and the responsibilities ``[N, K]`` (``[N, 0]`` unless requested).

    The backward operators take both outputs and recompute responsibilities that were not kept.
    """
    N, K = x.shape[0], means.shape[1]
    classes, valid = _classes(x, means, labels)
    log_prob = means.new_empty(N)
    responsibilities = means.new_empty(N, K if with_responsibilities else 0)
    for rows in _row_blocks(x, means):
        joint = _log_joint(x[rows].to(means.dtype), means, variances, weights, classes[rows])
        log_prob[rows] = torch.logsumexp(joint, dim=1).where(valid[rows], math.nan)
        if responsibilities.shape[1]:
            responsibilities[rows] = torch.softmax(joint, dim=1).where(valid[rows, None], math.nan)
    return log_prob, responsibilities


def _responsibilities(
    x: Tensor,
    means: Tensor,
    variances: Tensor,
    weights: Tensor,
    classes: Tensor,
    valid: Tensor,
    saved: Tensor,
    rows: slice,
) -> Tensor:
    if saved.shape[1]:
        return saved[rows]
    joint = _log_joint(x, means, variances, weights, classes[rows])
    return torch.softmax(joint, dim=1).where(valid[rows, None], math.nan)


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
    """``dx_nd = g_n sum_k r_nk (mu_kd - x_nd) / v_kd`` in the dtype of x."""
    classes, valid = _classes(x, means, labels)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    for rows in _row_blocks(x, means):
        block = x[rows].to(means.dtype)
        r = _responsibilities(block, means, variances, weights, classes, valid, responsibilities, rows)
        r = (r * grad[rows, None]).unsqueeze(-1)
        precision = variances[classes[rows]].reciprocal()
        precision = precision if variances.dim() == 3 else precision.unsqueeze(-1)
        dx[rows] = (r * precision * (means[classes[rows]] - block.unsqueeze(1))).sum(1).to(x.dtype)
    return dx


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
    """Responsibility-weighted moments about the means, with ``a_nk = row_weights_n r_nk``.

    ``S0 = sum_n a_nk`` ``[C, K]``, ``S1 = sum_n a_nk (x_n - mu_k)`` ``[C, K, D]`` and ``S2 = sum_n a_nk (x_n - mu_k)^2``,
    ``[C, K, D]`` for per-dimension variances, summed over D ``[C, K]`` for spherical ones.
    """
    C, K, D = means.shape
    classes, valid = _classes(x, means, labels)
    s0, s1, s2 = means.new_zeros(C, K), means.new_zeros(C, K, D), torch.zeros_like(variances)
    for rows in _row_blocks(x, means):
        block = x[rows].to(means.dtype)
        r = _responsibilities(block, means, variances, weights, classes, valid, responsibilities, rows)
        r = r * row_weights[rows, None]
        deviation = block.unsqueeze(1) - means[classes[rows]]
        s0.index_add_(0, classes[rows], r)
        s1.index_add_(0, classes[rows], r.unsqueeze(-1) * deviation)
        if variances.dim() == 3:
            s2.index_add_(0, classes[rows], r.unsqueeze(-1) * deviation.square())
        else:
            s2.index_add_(0, classes[rows], r * deviation.square().sum(-1))
    poison = torch.where(valid.all(), 0.0, math.nan).to(means.dtype)
    return s0 + poison, s1 + poison, s2 + poison


def mixture_statistics(
    x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One E-step: ``sum r``, ``sum r (x - mu)`` and ``sum r (x - mu)^2`` in the shapes of weights, means and variances, and
    the log-likelihood ``[C]`` of each class's rows, float64."""
    log_prob, r = mixture_log_prob_fwd(x, means, variances, weights, labels, True)
    moments = mixture_moments(torch.ones_like(log_prob), x, means, variances, weights, labels, log_prob, r)
    classes, valid = _classes(x, means, labels)
    total = torch.zeros(means.shape[0], dtype=torch.float64, device=x.device)
    total = total.index_add_(0, classes, log_prob.double().where(valid, 0.0))
    return *moments, total + torch.where(valid.all(), 0.0, math.nan)


def component_statistics_fwd(
    x: Tensor,
    means: Tensor,
    labels: Tensor | None,
    variances: Tensor | None,
    weights: Tensor | None,
    per_dimension: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts ``[C, K]``, scatter ``[C, K]`` or ``[C, K, D]``, sums ``[C, K, D]`` (``[0]`` unless requested), and the
    assignment ``[N]`` of each row to a component of its class: the nearest mean, or the highest posterior if variances and
    weights are given. A row with a label out of range is assigned -1."""
    C, K, D = means.shape
    classes, valid = _classes(x, means, labels)
    assignment = torch.full((x.shape[0],), -1, dtype=torch.int64, device=x.device)
    counts = means.new_zeros(C * K)
    scatter = means.new_zeros(C * K, D) if per_dimension else means.new_zeros(C * K)
    totals = means.new_zeros(C * K if sums else 0, D)
    for rows in _row_blocks(x, means):
        block = x[rows].to(means.dtype)
        if variances is None or weights is None:
            best = _nearest(block, means[classes[rows]])
        else:
            best = _log_joint(block, means, variances, weights, classes[rows]).argmax(1)
        assignment[rows] = best.where(valid[rows], -1)
        index = classes[rows] * K + best
        deviation = block - means.reshape(C * K, D)[index]
        square = deviation.square()
        counts.index_add_(0, index, valid[rows].to(means.dtype))
        scatter.index_add_(0, index, square if per_dimension else square.sum(-1))
        if sums:
            totals.index_add_(0, index, deviation)
    if sums:
        # sums of deviations: sums of raw values with a common offset would lose the digits of a small spread
        totals += counts.unsqueeze(-1) * means.reshape(C * K, D)
    poison = torch.where(valid.all(), 0.0, math.nan).to(means.dtype)
    return (
        (counts + poison).view(C, K),
        (scatter + poison).view(C, K, D) if per_dimension else (scatter + poison).view(C, K),
        (totals + poison).view(C, K, D) if sums else totals.view(0),
        assignment,
    )


def kmeans(
    x: Tensor, means: Tensor, labels: Tensor | None, max_iter: int, tol: float, per_dimension: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Lloyd's iterations from the given means: means ``[C, K, D]``, counts and scatter about them, and for each class
    the number of iterations ``[C]`` and whether it converged ``[C]`` (0 or 1).

    A class converges when the squared movement of its means is at most ``tol`` times the mean variance of its features. In each
    iteration, one component without rows moves onto the row of its class that is farthest from its mean."""
    C, _, D = means.shape
    start, double = means, torch.float64
    classes, valid = _classes(x, means, labels)
    iterations = torch.zeros(C, dtype=torch.int64, device=x.device)
    rows = torch.zeros(C, dtype=double, device=x.device).index_add_(0, classes, valid.to(double))
    active, limit = rows > 0, torch.zeros_like(rows)
    for iteration in range(max_iter):
        counts, scatter, sums, assignment = component_statistics_fwd(x, means, labels, None, None, False, True)
        n, total, mu = counts.to(double), sums.to(double), means.to(double)
        if iteration == 0:
            center = total.sum(1) / rows.clamp_min(1).unsqueeze(1)
            away, moved = mu - center.unsqueeze(1), total - n.unsqueeze(-1) * mu
            spread = scatter.to(double).sum(1) + (away * (2 * moved + n.unsqueeze(-1) * away)).sum((1, 2))
            limit = tol * spread / (rows.clamp_min(1) * D)
        target = torch.where(n.unsqueeze(-1) > 0, total / n.clamp_min(1).unsqueeze(-1), mu).to(means.dtype)
        target = _reseeded(x, classes, assignment, valid, target, n)
        shift = (target.to(double) - mu).square().sum((1, 2))
        means = torch.where(active[:, None, None], target, means)
        iterations += active
        active = active & (shift > limit)
    counts, scatter, _, _ = component_statistics_fwd(x, means, labels, None, None, per_dimension, False)
    poison = torch.where(valid.all(), 0.0, math.nan).to(means.dtype)
    return (means if max_iter else start.clone()) + poison, counts, scatter, iterations, (~active).long()


def _reseeded(x: Tensor, classes: Tensor, assignment: Tensor, valid: Tensor, means: Tensor, counts: Tensor) -> Tensor:
    """Moves the first component without rows of each class onto the row that is farthest from its mean."""
    C, K, D = means.shape
    if x.shape[0] == 0:
        return means
    index = classes * K + assignment.clamp_min(0)
    distance = torch.cat(
        [
            (x[rows].to(means.dtype) - means.reshape(C * K, D)[index[rows]]).square().sum(-1)
            for rows in _row_blocks(x, means)
        ]
    ).where(valid, 0.0)
    farthest = torch.zeros(C, dtype=means.dtype, device=x.device).scatter_reduce_(0, classes, distance, "amax")
    every = torch.arange(x.shape[0], device=x.device)
    first = torch.where(distance == farthest[classes], every, x.shape[0] - 1)
    row = torch.full((C,), x.shape[0] - 1, device=x.device).scatter_reduce_(0, classes, first, "amin")
    empty = counts == 0
    needed = empty.any(1) & (counts.sum(1) > 1) & (farthest > 0)
    slot = torch.nn.functional.one_hot(empty.int().argmax(1), K).bool() & needed.unsqueeze(1)
    return torch.where(slot.unsqueeze(-1), x[row].to(means.dtype).unsqueeze(1), means)


def expectation_maximization(
    x: Tensor,
    means: Tensor,
    variances: Tensor,
    weights: Tensor,
    labels: Tensor | None,
    max_iter: int,
    tol: float,
    reg_covar: float,
) -> tuple[Tensor, ...]:
    """EM from the given parameters: the new ones, the rows ``[C, K]`` of each component, and for each class the mean
    log-likelihood ``[C]`` of its rows, the number of iterations ``[C]`` and whether it converged ``[C]`` (0 or 1).

    A class converges when an iteration raises the mean log-likelihood by less than ``tol``."""
    C, _, D = means.shape
    classes, valid = _classes(x, means, labels)
    double, diag, tiny = torch.float64, variances.dim() == 3, torch.finfo(means.dtype).tiny
    iterations = torch.zeros(C, dtype=torch.int64, device=x.device)
    rows = torch.zeros(C, dtype=double, device=x.device).index_add_(0, classes, valid.to(double))
    active, bound = rows > 0, torch.full_like(rows, -math.inf)
    counts = torch.zeros(weights.shape, dtype=double, device=x.device)
    for _ in range(max_iter):
        s0, s1, s2, log_likelihood = (t.to(double) for t in mixture_statistics(x, means, variances, weights, labels))
        n, share = s0.sum(1), s0.clamp_min(tiny)
        shift = s1 / share.unsqueeze(-1) * (s0 > 0).unsqueeze(-1)
        if diag:
            spread = (s2 / share.unsqueeze(-1) - shift.square()).clamp_min(0) + reg_covar
        else:
            spread = ((s2 / share - shift.square().sum(-1)) / D).clamp_min(0) + reg_covar
        now = log_likelihood / n.clamp_min(1)
        moving = active[:, None, None]
        means = torch.where(moving, (means.to(double) + shift).to(means.dtype), means)
        variances = torch.where(moving if diag else moving[..., 0], spread.to(means.dtype), variances)
        weights = torch.where(moving[..., 0], (s0 / n.clamp_min(1).unsqueeze(-1)).to(means.dtype), weights)
        counts = torch.where(moving[..., 0], s0, counts)
        iterations += active
        still = active & (now - bound >= tol) & (n > 0)
        bound, active = torch.where(active, now, bound), still
    bound = torch.where(rows > 0, bound, 0.0)
    return means.clone(), variances.clone(), weights.clone(), counts, bound, iterations, (~active).long()


def component_statistics_bwd(
    grad_scatter: Tensor, scale: Tensor | None, x: Tensor, means: Tensor, labels: Tensor | None, assignment: Tensor
) -> Tensor:
    """``dx_nd = 2 scale g_ck(d) (x_nd - mu_ckd)`` in the dtype of x, with (c, k) the component of row n."""
    C, K, D = means.shape
    classes, _ = _classes(x, means, labels)
    valid = assignment >= 0
    index = classes * K + assignment.clamp_min(0)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    factor = 2 * grad_scatter if scale is None else 2 * scale * grad_scatter
    factor = factor.reshape(C * K, -1)
    for rows in _row_blocks(x, means):
        deviation = x[rows].to(means.dtype) - means.reshape(C * K, D)[index[rows]]
        dx[rows] = (factor[index[rows]] * deviation).where(valid[rows, None], math.nan).to(x.dtype)
    return dx


def _bound_of_paper(
    counts: Tensor,
    scatter: Tensor,
    dimension: int,
    variances: Tensor,
    weights: Tensor,
    class_prior: Tensor,
    num_samples: Tensor,
    noise_variance: Tensor,
    boost: float,
    unbiased: bool,
    mean: bool,
) -> tuple[Tensor, Tensor]:
    """Eq. 5-7 in Algorithm 1's order."""
    dtype = variances.dtype
    rows, total = counts.sum().double(), num_samples.double()
    b = torch.minimum(torch.full_like(rows, boost), total / rows.clamp_min(1))
    mass = class_prior.unsqueeze(1) * weights * (total - b * rows).clamp_min(0).to(dtype) + b.to(dtype) * counts
    blend = torch.where(counts > 0, b.to(dtype) * counts / mass.where(counts > 0, 1.0), 0.0)
    pi, n = mass / total.to(dtype), counts.clamp_min(1)
    s2 = noise_variance.to(dtype)
    if variances.dim() == 3:
        blended = torch.lerp(variances, scatter / n.unsqueeze(-1), blend.unsqueeze(-1))
        entropy = 0.5 * torch.log1p(blended / s2).sum(-1)
        precision = (blended + s2).reciprocal()
    else:
        blended = torch.lerp(variances, scatter / (n * dimension), blend)
        entropy = (0.5 * dimension) * torch.log1p(blended.unsqueeze(-1) / s2).mean(-1)
        precision = (blended.unsqueeze(-1) + s2).reciprocal().mean(-1)
    scale = 1 / dimension if mean else 1.0
    value = scale * (pi * entropy - torch.special.xlogy(pi, pi)).sum()
    per_row = 1 / rows.clamp_min(1) if unbiased else b / total
    return value, (0.5 * scale * per_row).to(dtype) * precision


def _hinge_of_released_code(
    counts: Tensor,
    scatter: Tensor,
    dimension: int,
    variances: Tensor,
    weights: Tensor,
    num_samples: Tensor,
    noise_variance: Tensor,
    boost: float,
    threshold: float,
    gamma: float,
) -> tuple[Tensor, Tensor]:
    """Formula of the authors' released code, with the weights of the right class; spherical variances."""
    C = weights.shape[0]
    seen, n = counts > 0, counts.clamp_min(1)
    blend = torch.where(seen, boost * counts / (weights * (num_samples.to(weights.dtype) / C)), 0.0)
    blend = torch.where(blend < 1, blend, 0.99)
    blended = torch.lerp(variances, scatter / (n * dimension), blend)
    floor = torch.log(threshold * noise_variance.double() + gamma).to(weights.dtype)
    hinge = torch.log(blended + gamma) - floor
    present = (counts.sum(1) > 0).sum().clamp_min(1)
    share = torch.where(seen, weights / present, 0.0)
    # a relu that propagates NaN: a batch with NaN must not look like one below the threshold
    value = (share * torch.where(hinge <= 0, 0.0, hinge)).sum()
    slope = torch.where(hinge > 0, share, 0.0) * blend / ((blended + gamma) * (n * dimension))
    return value, slope


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
    """CEM loss of the statistics of one batch, and its derivative with respect to the scatter.

    ``official`` selects the released code's hinge instead of the paper's Eq. 5-7. With ``unbiased`` the derivative has the scale
    of a minibatch gradient of Eq. 7: ``dx = (x - mu) / (N_b (v' + s2))``. ``noise_variance`` is ``[1]`` or ``[D]``.
    """
    if official:
        return _hinge_of_released_code(
            counts,
            scatter,
            dimension,
            variances,
            weights,
            num_samples,
            noise_variance.squeeze(0),
            boost,
            threshold,
            gamma,
        )
    return _bound_of_paper(
        counts,
        scatter,
        dimension,
        variances,
        weights,
        class_prior,
        num_samples,
        noise_variance,
        boost,
        unbiased,
        mean,
    )


def cem_fwd(
    x: Tensor, means: Tensor, labels: Tensor | None, variances: Tensor, *prior_and_options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the CEM loss: statistics of the batch about the nearest means, then :func:`entropy_bound`.

    Returns the value, its derivative to the scatter and the assignment; ``component_statistics_bwd`` is its backward.
    """
    counts, scatter, _, assignment = component_statistics_fwd(
        x, means, labels, None, None, per_dimension=variances.dim() == 3, sums=False
    )
    value, slope = entropy_bound(counts, scatter, means.shape[2], variances, *prior_and_options)
    return value, slope, assignment
