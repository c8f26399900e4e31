"""Fits of Gaussian mixtures by k-means and expectation maximization: iterations on sufficient statistics, all classes at once.

Rows come in chunks and, in distributed runs, in shards. Each iteration adds up the statistics of the chunks, sums them over the
ranks, and moves the parameters. Sums are kept in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from cem_fast._support.counts import require_count, require_number
from cem_fast._support.warn import warn
from cem_fast.mixture import covariance
from cem_fast.mixture.density import shape_of_spread
from cem_fast.mixture.rows import LEAST_MASS, Chunk, Rows, class_sizes, class_totals
from cem_fast.mixture.seeding import kmeans_plus_plus, random_rows, squared_distance
from cem_fast.ops import validate
from cem_fast.ops.library import OPERATORS, WHOLE_FITS
from cem_fast.ops.validate import PARAMETER_DTYPES

_STATISTICS = OPERATORS["component_statistics_fwd"]
_KMEANS = OPERATORS["kmeans"]
_EXPECTATION_MAXIMIZATION = OPERATORS["expectation_maximization"]
_MIXTURE_STATISTICS = OPERATORS["mixture_statistics"]
_LOG_PROB = OPERATORS["mixture_log_prob_fwd"]
_MOMENTS = OPERATORS["mixture_moments"]

# sum r [C, K], sum r (x - mu) [C, K, D] and sum r (x - mu)^2 [C, K] or [C, K, D] of every component, float64
Moments = tuple[Tensor, ...]

ALGORITHMS = ("em", "kmeans")
SEEDINGS = {"k-means++": kmeans_plus_plus, "random": random_rows}
COVARIANCE_TYPES = ("diag", "spherical", "tied", "full")

# Maximum size of the responsibilities in one call of the E-step.
RESPONSIBILITY_BYTES = 1 << 28


@dataclass(frozen=True, eq=False)
class Settings:
    """Settings of a fit, documented at ``GaussianMixture``.

    Raises:
        TypeError: a setting has the wrong type.
        ValueError: a setting has a value that is not allowed.
    """

    num_components: int
    num_classes: int
    covariance_type: str
    algorithm: str
    init: str | Tensor
    init_variances: Tensor | None
    init_weights: Tensor | None
    num_init: int
    max_iter: int
    tol: float
    reg_covar: float
    generator: torch.Generator | None
    unit_means: bool = False  # k-means on directions: rows of length 1, means that are scaled to length 1

    def __post_init__(self) -> None:
        for name in ("num_components", "num_classes", "num_init", "max_iter"):
            require_count(name, getattr(self, name))
        for name, allowed in (("covariance_type", COVARIANCE_TYPES), ("algorithm", ALGORITHMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.matrices and self.algorithm == "kmeans":
            raise ValueError(
                f'algorithm="kmeans" estimates spherical or diag covariances, got {self.covariance_type!r}'
            )
        wanted = "init must be 'k-means++', 'random' or a tensor [C, K, D] of means"
        if isinstance(self.init, str) and self.init not in SEEDINGS:
            raise ValueError(f"{wanted}, got {self.init!r}")
        if not isinstance(self.init, (str, Tensor)):
            raise TypeError(f"{wanted}, got {type(self.init).__name__}")
        for name in ("init_variances", "init_weights"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, Tensor)):
                raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
        for name in ("tol", "reg_covar"):
            value = getattr(self, name)
            if not 0 <= require_number(name, value) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}")
        if not (self.generator is None or isinstance(self.generator, torch.Generator)):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(self.generator).__name__}")

    @property
    def matrices(self) -> bool:
        return self.covariance_type in ("tied", "full")

    @property
    def diag(self) -> bool:
        return self.covariance_type == "diag"

    @property
    def tied(self) -> bool:
        return self.covariance_type == "tied"


@dataclass
class Estimate:
    """Parameters ``[C, ...]`` of a fit, and for each class ``[C]`` the score, the iterations and whether it converged.

    ``variances`` are ``[C, K]`` or ``[C, K, D]``, or covariances ``[C, D, D]`` (tied) or ``[C, K, D, D]`` (full)."""

    means: Tensor
    variances: Tensor
    weights: Tensor
    counts: Tensor
    score: Tensor
    n_iter: Tensor
    converged: Tensor

    def select(self, classes: Tensor) -> Estimate:
        """The estimates of the given classes ``[n]``, in this order."""
        return Estimate(*(value[classes] for value in _values(self)))

    def better(self, other: Estimate | None) -> Estimate:
        """The fit with the higher score, class by class."""
        if other is None:
            return self
        choice = self.score > other.score
        return Estimate(
            *(torch.where(choice.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(_values(self), _values(other)))
        )


def _values(estimate: Estimate) -> list[Tensor]:
    return list(vars(estimate).values())


# ---- the recipe of a fit


def fit(
    rows: Rows, settings: Settings, *, sample: Rows | None = None, sizes: Tensor | None = None
) -> tuple[Estimate, Tensor]:
    """Fits a mixture, from its initial means to the best of its restarts.

    Args:
        rows: all rows.
        settings: what to fit, and how.
        sample: rows that initial parameters are computed from; all rows if None.
        sizes: mass of the rows of each class in this shard ``[C]``; counted if None.

    Returns:
        The estimate, and the mass ``[C]`` of the rows of each class on all ranks, float64.

    Raises:
        ValueError: there are no rows, or they are not finite.
    """
    sample = rows if sample is None else sample
    like = _empty_row(sample)
    if rows.group is not None:  # all ranks need the same rules, also one without rows
        weighted = torch.tensor(int(rows.weighted), device=like.device)
        rows.weighted = sample.weighted = bool(rows.reduce(weighted, distributed.ReduceOp.MAX))
    sizes = class_sizes(rows, settings.num_classes, like.device) if sizes is None else sizes.to(like.device)
    per_class = rows.reduce(sizes)
    if not bool(per_class.any()):
        if rows.weighted:
            raise ValueError("sample_weight must be positive for at least one row, got zeros")
        raise ValueError(f"{rows.name} must have at least one row, got (0, {len(like)})")
    best: Estimate | None = None
    for _ in range(settings.num_init):
        best = _fit_once(rows, sample, settings, like).better(best)
    assert best is not None
    return _tidy(best, per_class, settings), per_class


def _empty_row(rows: Rows) -> Tensor:
    """An empty row ``[D]`` of the parameters' dtype, on the rows' device."""
    for x, _, _ in rows:
        return x.new_empty(x.shape[1], dtype=x.dtype if x.dtype in PARAMETER_DTYPES else torch.float32)
    raise ValueError("batches must hold at least one batch, got none")


def _fit_once(rows: Rows, sample: Rows, settings: Settings, like: Tensor) -> Estimate:
    C, K, D, dtype = settings.num_classes, settings.num_components, len(like), like.dtype
    iterations: dict[str, Any] = dict(
        max_iter=settings.max_iter, tol=settings.tol, reg_covar=settings.reg_covar, dtype=dtype
    )
    if isinstance(settings.init, Tensor):
        means = _given("init", settings.init, like, (C, K, D), "[C, K, D]")
    else:
        means = SEEDINGS[settings.init](sample, C, K, like=like, generator=settings.generator)
        if settings.algorithm == "kmeans" and sample is not rows:
            means = lloyd(sample, means, diag=settings.diag, **iterations, unit_means=settings.unit_means).means
    if settings.algorithm == "kmeans":
        return lloyd(rows, means, diag=settings.diag, **iterations, unit_means=settings.unit_means)
    start = _start_of_em(sample, means, settings, iterations)
    if settings.matrices and settings.init_variances is None:
        return expectation_maximization_of_matrices(rows, start, tied=settings.tied, **iterations)
    return expectation_maximization(rows, start, **iterations, matrices=settings.matrices)


def _given(name: str, value: Tensor, like: Tensor, shape: tuple[int, ...], expected: str) -> Tensor:
    validate.dense(name, value)
    validate.same_shape(name, value, shape, expected)
    if value.device.type != "meta" and not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    if value.device.type == "meta":
        raise ValueError(f"{name} must hold values, got a tensor on the device meta")
    value = value.to(like, copy=True)
    if name == "init" and not bool(value.square().sum(-1).isfinite().all()):
        raise ValueError("init must be small enough that squared distances are finite; scale the features down")
    return value


def _start_of_em(rows: Rows, means: Tensor, settings: Settings, iterations: dict[str, Any]) -> Estimate:
    """Initial parameters of EM: the given ones, the others from a k-means fit, or from the rows nearest to given means."""
    given, (C, K, D) = isinstance(settings.init, Tensor), means.shape
    variances, weights = settings.init_variances, settings.init_weights
    if variances is not None:
        shape = shape_of_spread(settings.covariance_type, C, K, D)
        variances = _given("init_variances", variances, means, shape, "as the covariance type says")
        if settings.matrices:
            if bool(torch.linalg.cholesky_ex(variances.double())[1].any()):
                raise ValueError("init_variances must be positive definite, got a matrix that is not")
        elif not bool((variances >= torch.finfo(variances.dtype).tiny).all()):
            wanted = "positive" if bool((variances <= 0).any()) else "positive and normal"
            raise ValueError(f"init_variances must be {wanted}, got {float(variances.min())}")
    if weights is not None:
        weights = _given("init_weights", weights, means, (C, K), "[C, K]")
        if not bool((weights >= 0).all()):
            raise ValueError(f"init_weights must not be negative, got {float(weights.min())}")
        if not bool((weights.sum(1) > 0).all()):
            raise ValueError("init_weights must be positive for a component of each class, got a class of zeros")
    if given and variances is not None and weights is not None:
        return Estimate(means, variances, weights, *(torch.zeros_like(weights) for _ in range(4)))
    start = lloyd(rows, means, diag=settings.diag, **iterations | dict(max_iter=0 if given else settings.max_iter))
    start.variances = start.variances if variances is None else variances
    start.weights = start.weights if weights is None else weights
    return start


def _tidy(fitted: Estimate, per_class: Tensor, settings: Settings) -> Estimate:
    """Moves empty components behind the others, onto the first of them, with weight 0 and the floor variance."""
    empty, missing = fitted.counts <= 0, per_class == 0
    floor = max(settings.reg_covar, float(torch.finfo(fitted.means.dtype).tiny))
    if not settings.matrices:
        fitted.variances = fitted.variances.clamp_min(floor)
    if not bool(empty.any()):
        return fitted
    short = (empty & ~missing.unsqueeze(1)).any(1)
    if bool(short.any()):
        warn(
            f"{int(short.sum())} of {settings.num_classes} classes have fewer distinct rows than num_components="
            f"{settings.num_components}; their spare components have weight 0"
        )
    order = empty.int().argsort(dim=1, stable=True)
    for name in ("means", "weights", "counts") if settings.tied else ("means", "variances", "weights", "counts"):
        value = getattr(fitted, name)
        index = order.view(*order.shape, *[1] * (value.dim() - 2)).expand_as(value)
        setattr(fitted, name, value.gather(1, index))
    empty = empty.gather(1, order)
    first, counts = fitted.means[:, :1], fitted.counts.unsqueeze(-1)
    center = ((counts * fitted.means).sum((0, 1)) / per_class.sum()).to(first.dtype)
    fitted.means = torch.where(empty.unsqueeze(-1), torch.where(missing[:, None, None], center, first), fitted.means)
    if settings.matrices:
        least = floor * torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
        hollow = missing[:, None, None] if settings.tied else empty[..., None, None]
    else:
        least = torch.tensor(floor, dtype=first.dtype, device=first.device)
        hollow = empty.unsqueeze(-1) if fitted.variances.dim() == 3 else empty
    fitted.variances = torch.where(hollow, least, fitted.variances)
    fitted.weights = torch.where(missing.unsqueeze(1), 1 / settings.num_components, fitted.weights)
    return fitted


# ---- k-means


def hard_statistics(rows: Rows, means: Tensor, *, per_dimension: bool, sums: bool) -> list[Tensor]:
    """Counts, scatter and (if asked for) sums of every component, each row assigned to its nearest mean."""
    shapes = means[:, :, 0], means if per_dimension else means[:, :, 0], means if sums else means[:0]

    def of_chunk(x: Tensor, labels: Tensor | None, mass: Tensor | None) -> tuple[Tensor, ...]:
        if mass is not None:
            return _weighted_statistics(x, labels, mass, means, per_dimension, sums)
        found: tuple[Tensor, ...] = _STATISTICS(x, means, labels, None, None, per_dimension, sums)
        return found[:3]

    return rows.add_up((of_chunk(*chunk) for chunk in rows), shapes)


def _weighted_statistics(
    x: Tensor, labels: Tensor | None, mass: Tensor, means: Tensor, per_dimension: bool, sums: bool
) -> tuple[Tensor, ...]:
    """Counts, scatter and sums of rows with sample weights: their moments, with a class for each component."""
    C, K, D = means.shape
    assignment = _STATISTICS(x, means, labels, None, None, False, False)[3]
    component = assignment if labels is None else torch.where(assignment < 0, -1, labels * K + assignment)
    alone, one = means.reshape(C * K, 1, D), means.new_ones(C * K, 1)
    like = torch.ones_like(alone) if per_dimension else one
    known = means.new_zeros(len(x)), means.new_ones(len(x), 1)  # a row belongs to its component
    s0, s1, s2 = (s.double() for s in _MOMENTS(mass, x, alone, like, one, component, *known))
    totals = (s1 + s0.unsqueeze(-1) * alone).view(C, K, D) if sums else s0[:0]
    return s0.view(C, K), s2.view(means.shape if per_dimension else (C, K)), totals


def lloyd(
    rows: Rows,
    means: Tensor,
    *,
    diag: bool,
    max_iter: int,
    tol: float,
    reg_covar: float,
    dtype: torch.dtype,
    unit_means: bool = False,
) -> Estimate:
    """k-means from the given means ``[C, K, D]``. Each class stops when its own means converge."""
    if rows.in_one_piece and not rows.weighted and not unit_means and ("kmeans", means.device.type) in WHOLE_FITS:
        ((x, labels, _),) = rows
        means, counts, scatter, n_iter, rests = _KMEANS(x, means, labels, max_iter, tol, diag)
        counts, scatter, converged = counts.double(), scatter.double(), rests > 0
        require_finite(rows, scatter)
    else:
        means, n_iter, converged = _lloyd_in_pieces(rows, means, max_iter, tol, unit_means)
        counts, scatter, _ = hard_statistics(rows, means, per_dimension=diag, sums=False)
    n, per_class = counts.clamp_min(rows.least_mass), counts.sum(1)
    variances = scatter / n.unsqueeze(-1) if diag else scatter / (n * means.shape[2])
    inertia = scatter.sum((1, 2)) if diag else scatter.sum(1)
    return Estimate(
        means,
        (variances + reg_covar).to(dtype),
        (counts / per_class.clamp_min(rows.least_mass).unsqueeze(1)).to(dtype),
        counts,
        -inertia / per_class.clamp_min(rows.least_mass),
        n_iter,
        converged,
    )


def directions(means: Tensor, otherwise: Tensor) -> Tensor:
    """Means scaled to length 1, and others where their length is 0."""
    length = means.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, means / length.clamp_min(torch.finfo(means.dtype).tiny), otherwise)


def _lloyd_in_pieces(
    rows: Rows, means: Tensor, max_iter: int, tol: float, unit_means: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Iterations over chunks and shards: means, and the number of iterations ``[C]`` and convergence ``[C]`` of every class."""
    active = torch.ones(len(means), dtype=torch.bool, device=means.device)
    n_iter = torch.zeros(len(means), dtype=torch.int64, device=means.device)
    limit, moving = None, rows
    for _ in range(max_iter):
        counts, scatter, sums = hard_statistics(moving, means, per_dimension=False, sums=True)
        if limit is None:
            require_finite(rows, scatter)
            limit = tol * _mean_variance(means, counts, scatter, sums, rows.least_mass)
            active = counts.sum(1) > 0
        filled = counts.unsqueeze(-1) > 0
        share = counts.clamp_min(rows.least_mass).unsqueeze(-1)
        target = torch.where(filled, sums / share, means.double())
        target = (directions(target, means.double()) if unit_means else target).to(means.dtype)
        target = _reseed_empty(moving, means, target, counts)
        shift = (target.double() - means.double()).square().sum((1, 2))
        means = torch.where(active[:, None, None], target, means)
        n_iter += active
        still = active & (shift > limit)
        if bool((still != active).any()):
            moving = moving.of(still)
        active = still
        if not bool(active.any()):
            break
    return means, n_iter, ~active


def _mean_variance(means: Tensor, counts: Tensor, scatter: Tensor, sums: Tensor, least_mass: float) -> Tensor:
    """Mean variance of the features of each class ``[C]``, from the statistics of its components."""
    mu, n = means.double(), counts.sum(1).clamp_min(least_mass)
    center = sums.sum(1) / n.unsqueeze(1)
    away = mu - center.unsqueeze(1)
    moved = sums - counts.unsqueeze(-1) * mu
    total = scatter.sum(1) + (2 * moved * away + counts.unsqueeze(-1) * away.square()).sum((1, 2))
    return total.clamp_min(0) / (n * means.shape[2])


def require_finite(rows: Rows, statistic: Tensor) -> None:
    """Requires finite rows; reads them only if their statistic is not finite.

    Raises:
        ValueError: some rows have NaN or infinity, or finite rows are too large to square.
    """
    if bool(statistic.isfinite().all()):
        return
    bad = sum(int((~torch.isfinite(x)).any(1).sum()) for x, _, _ in rows)
    bad = int(rows.reduce(torch.tensor(bad, device=statistic.device)))
    if bad:
        raise ValueError(f"{rows.name} must be finite, got {bad} rows with NaN or infinity")
    raise ValueError(f"{rows.name} must be small enough that squared distances are finite; scale the features down")


def _reseed_empty(rows: Rows, means: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Moves the first empty component of each class onto the row of the class that is farthest from its mean."""
    empty = (counts == 0) & (counts.sum(1, keepdim=True) > (0 if rows.weighted else 1))
    needy = empty.any(1)
    if not bool(needy.any()):
        return target
    C, K, D = means.shape
    best = torch.zeros(C, dtype=torch.float64, device=means.device)
    found = torch.zeros(C, D, dtype=torch.float64, device=means.device)
    for x, labels, _ in rows:
        if not len(x):
            continue
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if labels is None else labels
        assignment = _STATISTICS(x, means, labels, None, None, False, False)[3]
        distance = squared_distance(x, target.flatten(0, 1), labels * K + assignment).double()
        farthest = torch.zeros_like(best).scatter_reduce_(0, labels, distance, "amax")
        index = torch.where(distance == farthest[labels], torch.arange(len(x), device=x.device), len(x))
        row = torch.full((C,), len(x), device=x.device).scatter_reduce_(0, labels, index, "amin")
        improved = (farthest > best) & (row < len(x))
        best = torch.where(improved, farthest, best)
        found = torch.where(improved.unsqueeze(1), x[row.clamp_max(len(x) - 1)].double(), found)
    most = rows.reduce(best.clone(), distributed.ReduceOp.MAX)
    found = _from_one_rank(rows, found, best == most)
    filled = needy & (most > 0)
    slot = torch.nn.functional.one_hot(empty.int().argmax(1), K).bool() & filled.unsqueeze(1)
    return torch.where(slot.unsqueeze(-1), found.unsqueeze(1).to(target.dtype), target)


def _from_one_rank(rows: Rows, values: Tensor, claimed: Tensor) -> Tensor:
    """Entries ``[C, D]`` of the lowest rank that claims them ``[C]``, on all ranks."""
    if rows.group is None:
        return values
    owner = torch.where(claimed, rows.rank, rows.ranks)
    owner = rows.reduce(owner, distributed.ReduceOp.MIN)
    return rows.reduce(torch.where((owner == rows.rank).unsqueeze(1), values, 0.0))


# ---- expectation maximization


def soft_statistics(
    rows: Rows, means: Tensor, variances: Tensor, weights: Tensor, *, matrices: bool = False
) -> list[Tensor]:
    """``sum r``, ``sum r (x - mu)``, ``sum r (x - mu)^2`` of every component, and the log-likelihood of each class.

    With ``matrices``, ``variances`` are covariances, and the squares are outer products of the same shape.
    """
    C, K, _ = means.shape
    size = max(1, RESPONSIBILITY_BYTES // (K * means.element_size()))

    def moments() -> Iterator[tuple[Tensor, ...]]:
        for x, labels, mass in rows:
            if not matrices and mass is None and means.device.type == "cpu":
                yield _MIXTURE_STATISTICS(x, means, variances, weights, labels)
                continue
            for begin in range(0, len(x), size):
                part = x[begin : begin + size]
                y = None if labels is None else labels[begin : begin + size]
                w = None if mass is None else mass[begin : begin + size]
                if matrices:
                    joint = covariance.log_joint(part, y, means, variances, weights)
                    log_prob = joint.logsumexp(1)
                    r = (joint - log_prob.unsqueeze(1)).exp()
                    r = r if w is None else r * w.unsqueeze(1)
                    s = covariance.moments(part, y, means, r, tied=variances.dim() == 3)
                else:
                    log_prob, r = _LOG_PROB(part, means, variances, weights, y, True)
                    row_weights = means.new_ones(len(part)) if w is None else w
                    s = _MOMENTS(row_weights, part, means, variances, weights, y, log_prob, r)
                total = log_prob.double() if w is None else log_prob.double() * w
                if y is None and not total.is_cpu:
                    yield *s, total.sum().expand(C)
                    continue
                y = torch.zeros(len(part), dtype=torch.int64, device=part.device) if y is None else y
                yield *s, class_totals(total, y, C)

    return rows.add_up(moments(), (means[:, :, 0], means, variances, means[:, 0, 0]))


def hard_covariances(rows: Rows, means: Tensor, *, tied: bool, reg_covar: float) -> Tensor:
    """Covariances ``[C, K, D, D]`` (tied: ``[C, D, D]``) of the rows nearest to each mean, about that mean; float64."""
    C, K, D = means.shape

    def moments() -> Iterator[tuple[Tensor, ...]]:
        for x, labels, mass in rows:
            assignment = _STATISTICS(x, means, labels, None, None, False, False)[3]
            r = torch.nn.functional.one_hot(assignment, K).double()
            r = r if mass is None else r * mass.unsqueeze(1)
            yield covariance.moments(x, labels, means, r, tied=tied)

    s0, s1, s2 = rows.add_up(moments(), (means[:, :, 0], means, means.new_empty((C, D, D) if tied else (C, K, D, D))))
    return covariance.estimate(s0, torch.zeros_like(s1), s2, reg_covar=reg_covar)


def expectation_maximization_of_matrices(
    rows: Rows, start: Estimate, *, tied: bool, reg_covar: float, dtype: torch.dtype, **settings: Any
) -> Estimate:
    """EM with covariance matrices, initially those of the rows nearest to each mean.

    A class with fewer rows than dimensions is fitted in the space spanned by its rows and initial means.
    """
    C, K, D = start.means.shape
    device = start.means.device
    few = torch.zeros(C, dtype=torch.bool, device=device)
    if rows.in_one_piece and reg_covar > 0:
        sizes = class_sizes(Rows([chunk[:2] for chunk in rows]), C, device)  # rows, whatever their sample weights
        few = (sizes > 0) & (sizes + K < D)
    own, others = few.nonzero().flatten(), (~few).nonzero().flatten()
    parts = [_in_span(rows, start, c, tied=tied, reg_covar=reg_covar, dtype=dtype, **settings) for c in own.unbind()]
    if len(others):
        rest, first = (rows.renumbered(others, C), start.select(others)) if parts else (rows, start)
        first.variances = hard_covariances(rest, first.means, tied=tied, reg_covar=reg_covar).to(dtype)
        parts.append(expectation_maximization(rest, first, reg_covar=reg_covar, dtype=dtype, matrices=True, **settings))
    joined = Estimate(*(torch.cat(values) for values in zip(*map(_values, parts))))
    return joined.select(torch.cat([own, others]).argsort())


def _in_span(
    rows: Rows, start: Estimate, c: Tensor, *, tied: bool, reg_covar: float, dtype: torch.dtype, **settings: Any
) -> Estimate:
    """Fits class ``c``, a scalar tensor, in the space spanned by its rows and initial means."""
    one = c.unsqueeze(0)
    ((x, _, mass),) = rows.renumbered(one, len(start.means))
    x, first = x.double(), start.select(one)
    means = first.means[0].double()
    span = covariance.Span(torch.cat([x, means]), reg_covar)
    first.means = span.coordinates(means).unsqueeze(0)
    fitted = expectation_maximization_of_matrices(
        rows.like([Chunk(span.coordinates(x), None, mass)]),
        first,
        tied=tied,
        reg_covar=reg_covar,
        dtype=torch.float64,
        **settings,
    )
    fitted.means, fitted.variances = span.points(fitted.means).to(dtype), span.covariances(fitted.variances).to(dtype)
    fitted.weights, fitted.score = fitted.weights.to(dtype), fitted.score + span.log_density_outside
    return fitted


def expectation_maximization(
    rows: Rows,
    start: Estimate,
    *,
    max_iter: int,
    tol: float,
    reg_covar: float,
    dtype: torch.dtype,
    matrices: bool = False,
) -> Estimate:
    """EM from the given parameters. Each class stops when its own likelihood converges."""
    whole = rows.in_one_piece and not rows.weighted and not matrices
    if whole and ("expectation_maximization", start.means.device.type) in WHOLE_FITS:
        return _maximized_in_one_call(rows, start, max_iter, tol, reg_covar)
    means, variances, weights, counts = start.means, start.variances, start.weights, start.counts.double()
    active = torch.ones(len(means), dtype=torch.bool, device=means.device)
    num_active = len(means)
    n_iter = torch.zeros(len(means), dtype=torch.int64, device=means.device)
    bound = torch.full((len(means),), -math.inf, dtype=torch.float64, device=means.device)
    tiny, moving = torch.finfo(dtype).tiny, rows
    for iteration in range(max_iter):
        s0, s1, s2, log_likelihood = soft_statistics(moving, means, variances, weights, matrices=matrices)
        if iteration == 0:
            require_finite(rows, log_likelihood)
        n = s0.sum(1)
        share = s0.clamp_min(tiny)
        shift = s1 / share.unsqueeze(-1) * (s0 > 0).unsqueeze(-1)
        if matrices:
            spread = covariance.estimate(s0, shift, s2, reg_covar=reg_covar)
        elif variances.dim() == 3:
            spread = (s2 / share.unsqueeze(-1) - shift.square()).clamp_min(0) + reg_covar
        else:
            spread = ((s2 / share - shift.square().sum(-1)) / means.shape[2]).clamp_min(0) + reg_covar
        mass = n.clamp_min(rows.least_mass)
        score = log_likelihood / mass
        gain = score - bound

        changing = active if num_active < len(active) else None

        def moved(new: Tensor, old: Tensor, classes: Tensor | None = changing) -> Tensor:
            new = new.to(old.dtype)
            return new if classes is None else torch.where(classes.view(-1, *[1] * (old.dim() - 1)), new, old)

        means = moved(means.double() + shift, means)
        variances = moved(spread, variances)
        weights = moved(s0 / mass.unsqueeze(-1), weights)
        counts, bound = moved(s0, counts), moved(score, bound)
        n_iter += active
        before, active = num_active, active & (gain >= tol) & (n > 0)
        num_active = int(active.sum())
        if num_active == 0:
            break
        if num_active < before:
            moving = moving.of(active)
    return Estimate(means, variances, weights, counts, bound, n_iter, ~active)


def _maximized_in_one_call(rows: Rows, start: Estimate, max_iter: int, tol: float, reg_covar: float) -> Estimate:
    ((x, labels, _),) = rows
    means, variances, weights, counts, bound, n_iter, rests = _EXPECTATION_MAXIMIZATION(
        x, start.means, start.variances, start.weights, labels, max_iter, tol, reg_covar
    )
    # rows that are not finite end the first iteration of their class
    require_finite(rows, torch.where(n_iter > 1, 0.0, bound))
    return Estimate(means, variances, weights, counts, bound, n_iter, rests > 0)


# ---- more rows


def moved(
    means: Tensor, variances: Tensor, weights: Tensor, seen: Tensor, moments: Moments, reg_covar: float
) -> dict[str, Tensor]:
    """Means, variances and weights of ``seen [C, K]`` rows that had the given ones, and of more rows with these moments."""
    (n, s1, s2), mu, v = moments, means.double(), variances.double()
    diag = v.dim() == 3
    if not diag:
        s2 = s2 / mu.shape[2]
    count = seen + n

    def wide(value: Tensor) -> Tensor:
        return value.unsqueeze(-1) if diag else value

    safe = count.clamp_min(torch.finfo(torch.float64).tiny)
    shift = s1 / safe.unsqueeze(-1)
    spread = (wide(seen) * (v - reg_covar) + s2) / wide(safe)
    spread = spread - (shift.square() if diag else shift.square().mean(-1))
    moves, total = n > 0, count.sum(1, keepdim=True)
    return {
        "means": torch.where(moves.unsqueeze(-1), mu + shift, mu),
        "variances": torch.where(wide(moves), spread.clamp_min(0) + reg_covar, v),
        "weights": torch.where(total > 0, count / total.clamp_min(LEAST_MASS), weights.double()),
    }
