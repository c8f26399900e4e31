"""Fits of Gaussian mixtures by k-means and expectation maximization: iterations on sufficient statistics, all classes at once.

Rows come in chunks and, in distributed runs, in shards. Each iteration adds up the statistics of the chunks, sums them over the
ranks, and moves the parameters. Sums are kept in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor, distributed

from cem_fast._support.warn import warn
from cem_fast.mixture import covariance
from cem_fast.mixture.density import shape_of_spread
from cem_fast.ops import validate
from cem_fast.ops.library import OPERATORS, WHOLE_FITS
from cem_fast.ops.validate import PARAMETER_DTYPES

_STATISTICS = OPERATORS["component_statistics_fwd"]
_KMEANS = OPERATORS["kmeans"]
_EXPECTATION_MAXIMIZATION = OPERATORS["expectation_maximization"]
_MIXTURE_STATISTICS = OPERATORS["mixture_statistics"]
_LOG_PROB = OPERATORS["mixture_log_prob_fwd"]
_MOMENTS = OPERATORS["mixture_moments"]

Chunk = tuple[Tensor, Tensor | None]

# sum r [C, K], sum r (x - mu) [C, K, D] and sum r (x - mu)^2 [C, K] or [C, K, D] of every component, float64
Moments = tuple[Tensor, ...]

ALGORITHMS = ("em", "kmeans")
COVARIANCE_TYPES = ("diag", "spherical", "tied", "full")

# Maximum size of the responsibilities in one call of the E-step.
RESPONSIBILITY_BYTES = 1 << 28

# Rows of classes that have not converged are copied together once they are at most this share of all rows.
ACTIVE_SHARE = 0.25


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

    def __post_init__(self) -> None:
        for name in ("num_components", "num_classes", "num_init", "max_iter"):
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        for name, allowed in (("covariance_type", COVARIANCE_TYPES), ("algorithm", ALGORITHMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.matrices and self.algorithm == "kmeans":
            raise ValueError(
                f'algorithm="kmeans" estimates spherical or diag covariances, got {self.covariance_type!r}'
            )
        if isinstance(self.init, str) and self.init != "k-means++":
            raise ValueError(f"init must be 'k-means++' or a tensor [C, K, D] of means, got {self.init!r}")
        if not isinstance(self.init, (str, Tensor)):
            raise TypeError(f"init must be 'k-means++' or a tensor [C, K, D] of means, got {type(self.init).__name__}")
        for name in ("init_variances", "init_weights"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, Tensor)):
                raise TypeError(f"{name} must be a tensor or None, got {type(value).__name__}")
        for name in ("tol", "reg_covar"):
            value = getattr(self, name)
            if not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not 0 <= float(value) < math.inf:
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


class Rows:
    """Chunks of ``(x [n, D], labels [n])`` that can be iterated any number of times: this rank's shard of all rows.

    Args:
        chunks: re-iterable; labels are int64 in range, or None for one class.
        group: torch.distributed group of the ranks that hold the shards; None for a single process.
        name: their name in errors.
    """

    def __init__(self, chunks: Iterable[Chunk], group: distributed.ProcessGroup | None = None, name: str = "x"):
        self.chunks, self.group, self.name = chunks, group, name

    def __iter__(self) -> Iterator[Chunk]:
        return iter(self.chunks)

    @property
    def in_one_piece(self) -> bool:
        return self.group is None and isinstance(self.chunks, list) and len(self.chunks) == 1

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else distributed.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else distributed.get_rank(self.group)

    def reduce(self, value: Tensor, operation: distributed.ReduceOp.RedOpType = distributed.ReduceOp.SUM) -> Tensor:
        """Sum (or another reduction) over the ranks' values; all ranks get the same bits.

        Raises:
            RuntimeError: a rank has ended or does not answer before the timeout.
        """
        if self.group is not None:
            value = value.contiguous()
            try:
                distributed.all_reduce(value, operation, group=self.group)
            except RuntimeError as error:
                raise RuntimeError(
                    f"rank {self.rank} of {self.ranks} cannot sum its statistics with the others: a rank has ended, "
                    f"or did not answer within the process group's timeout ({error})"
                ) from error
        return value

    def add_up(self, values: Iterable[tuple[Tensor, ...]], like: tuple[Tensor, ...]) -> list[Tensor]:
        """Sums of statistics over chunks and ranks, in double precision; ``like`` gives their shapes."""
        total = torch.zeros(sum(t.numel() for t in like), dtype=torch.float64, device=like[0].device)
        for parts in values:
            total += torch.cat([part.double().flatten() for part in parts])
        sums = torch.split(self.reduce(total), [t.numel() for t in like])
        return [part.view(t.shape) for part, t in zip(sums, like)]

    def renumbered(self, classes: Tensor, num_classes: int) -> Rows:
        """Copies of the rows of the given classes ``[n]``, which become the classes 0, 1, ..."""
        place = torch.full((num_classes,), -1, device=classes.device)
        place[classes] = torch.arange(len(classes), device=classes.device)
        chunks: list[Chunk] = []
        for x, labels in self.chunks:
            if labels is not None:
                new = place[labels]
                x, labels = x[new >= 0], new[new >= 0]
            chunks.append((x, labels))
        return Rows(chunks, self.group, self.name)

    def of(self, classes: Tensor) -> Rows:
        """Copies of the rows of the given classes ``[C]`` (bool) if they are few; otherwise all rows."""
        if not isinstance(self.chunks, list):
            return self
        kept = []
        for x, labels in self.chunks:
            if labels is None:
                return self
            rows = classes[labels].nonzero().squeeze(1)
            if len(rows) > ACTIVE_SHARE * len(x):
                return self
            kept.append((x[rows], labels[rows]))
        return Rows(kept, self.group, self.name)


class Stream:
    """Chunks that are read again in every pass; ``on_pass(number, rows)`` is called after each."""

    def __init__(self, read: Callable[[], Iterator[Chunk]], on_pass: Callable[[int, int], None] | None = None):
        self.read, self.on_pass, self.passes = read, on_pass, 0

    def __iter__(self) -> Iterator[Chunk]:
        self.passes += 1
        count = 0
        for chunk in self.read():
            count += len(chunk[0])
            yield chunk
        if self.on_pass is not None:
            self.on_pass(self.passes, count)


def draw_sample(
    stream: Stream, num_classes: int, memory_budget: int, generator: torch.Generator | None
) -> tuple[list[Chunk], Tensor, bool]:
    """Rows of one pass: all of them if they fit in half the memory budget, otherwise a uniform sample of each class.

    Returns:
        The rows as chunks, the number ``[C]`` of rows of each class in the pass, and whether all were kept.
    """
    held: list[tuple[Tensor, ...]] = []
    sizes, complete, size = torch.zeros(num_classes, dtype=torch.float64), True, 0
    device = "cpu" if generator is None else generator.device

    def bytes_of(chunk: tuple[Tensor, ...]) -> int:
        return sum(part.numel() * part.element_size() for part in chunk)

    def shrink() -> None:
        labels, keys = (torch.cat([kept[part] for kept in held]) for part in (1, 2))
        order = keys.argsort()
        order = order[labels[order].argsort(stable=True)]
        counts = torch.bincount(labels, minlength=num_classes)
        place = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
        stays = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
        stays[order[place < max(1, memory_budget * len(labels) // (4 * num_classes * size))]] = True
        # chunk by chunk, so that memory never holds all rows twice
        for i, of_chunk in enumerate(torch.split(stays, [len(kept[0]) for kept in held])):
            rows = of_chunk.nonzero().squeeze(1)
            held[i] = tuple(part[rows] for part in held[i])
        held[:] = [tuple(torch.cat(parts) for parts in zip(*held))]

    for x, labels in stream:
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if labels is None else labels
        held.append((x, labels, torch.rand(len(x), generator=generator, device=device).to(x.device)))
        sizes = sizes.to(x.device) + class_totals(torch.ones_like(labels, dtype=torch.float64), labels, num_classes)
        size += bytes_of(held[-1])
        if size > memory_budget // 2:
            shrink()
            complete, size = False, bytes_of(held[0])
    sizes = sizes.cpu()
    if bool(sizes.isnan().any()):
        raise ValueError(f"labels must lie in [0, {num_classes}), got others in a batch")
    if not complete:
        shrink()  # later rows must not be more likely to stay than earlier ones
    return [(x, labels) for x, labels, _ in held], sizes, complete


def squared_distance(x: Tensor, means: Tensor, labels: Tensor | None) -> Tensor:
    """Squared distance ``[N]`` of each row to the one mean ``[C, D]`` of its class.

    A Gaussian of variance ``1 / (2 pi)`` has no normalizing constant, so its log-likelihood is ``-pi |x - mu|^2``.
    """
    C = means.shape[0]
    variances = means.new_full((C, 1), 1 / (2 * math.pi))
    log_prob, _ = _LOG_PROB(x, means.unsqueeze(1), variances, means.new_ones(C, 1), labels, False)
    distance: Tensor = (log_prob / -math.pi).clamp_min(0)
    return distance


def class_totals(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Sums of float64 values ``[N]`` by class ``[C]``, the same bits in every run."""
    if values.is_cpu:
        return values.new_zeros(num_classes).index_add_(0, labels, values)
    return ordered_totals(values, labels, num_classes)


def ordered_totals(values: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Class totals on a GPU, where ``index_add_`` would add in any order; NaN if a label is out of range."""
    zeros = values.new_zeros(num_classes, 1, 1)
    sums: Tensor = _STATISTICS(values.unsqueeze(1), zeros, labels, None, None, False, True)[2]
    return sums.flatten()


def running_sum(values: Tensor) -> Tensor:
    """Cumulative sum of float64 values ``[N]``, the same bits in every run."""
    return values.cumsum(0) if values.is_cpu else blocked_running_sum(values)


def blocked_running_sum(values: Tensor) -> Tensor:
    """Cumulative sum on a GPU: torch scans a vector in an order that depends on timing, but each row of a matrix in one block."""
    rows = torch.nn.functional.pad(values, (0, -len(values) % 1024)).view(-1, 1024).cumsum(1)
    before = torch.nn.functional.pad(rows[:-1, -1], (1, 0)).expand(2, -1).cumsum(1)[0]
    return (rows + before.unsqueeze(1)).flatten()[: len(values)]


def class_sizes(rows: Rows, num_classes: int, device: torch.device) -> Tensor:
    """Rows of each class in this shard ``[C]``, float64."""
    sizes = torch.zeros(num_classes, dtype=torch.float64, device=device)
    for x, labels in rows:
        if labels is None:
            sizes += len(x)
        else:
            sizes += class_totals(torch.ones_like(labels, dtype=torch.float64), labels, num_classes)
    return sizes


# ---- the recipe of a fit


def fit(
    rows: Rows, settings: Settings, *, sample: Rows | None = None, sizes: Tensor | None = None
) -> tuple[Estimate, Tensor]:
    """Fits a mixture, from its initial means to the best of its restarts.

    Args:
        rows: all rows.
        settings: what to fit, and how.
        sample: rows that initial parameters are computed from; all rows if None.
        sizes: rows of each class in this shard ``[C]``; counted if None.

    Returns:
        The estimate, and the rows ``[C]`` of each class on all ranks, float64.

    Raises:
        ValueError: there are no rows, or they are not finite.
    """
    sample = rows if sample is None else sample
    like = _empty_row(sample)
    sizes = class_sizes(rows, settings.num_classes, like.device) if sizes is None else sizes.to(like.device)
    per_class = rows.reduce(sizes)
    if not bool(per_class.any()):
        raise ValueError(f"{rows.name} must have at least one row, got (0, {len(like)})")
    best: Estimate | None = None
    for _ in range(settings.num_init):
        best = _fit_once(rows, sample, settings, like).better(best)
    assert best is not None
    return _tidy(best, per_class, settings), per_class


def _empty_row(rows: Rows) -> Tensor:
    """An empty row ``[D]`` of the parameters' dtype, on the rows' device."""
    for x, _ in rows:
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
        means = kmeans_plus_plus(sample, C, K, like=like, generator=settings.generator)
        if settings.algorithm == "kmeans" and sample is not rows:
            means = lloyd(sample, means, diag=settings.diag, **iterations).means
    if settings.algorithm == "kmeans":
        return lloyd(rows, means, diag=settings.diag, **iterations)
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
    chunks = (_STATISTICS(x, means, labels, None, None, per_dimension, sums)[:3] for x, labels in rows)
    return rows.add_up(chunks, shapes)


def lloyd(
    rows: Rows, means: Tensor, *, diag: bool, max_iter: int, tol: float, reg_covar: float, dtype: torch.dtype
) -> Estimate:
    """k-means from the given means ``[C, K, D]``. Each class stops when its own means converge."""
    if rows.in_one_piece and ("kmeans", means.device.type) in WHOLE_FITS:
        ((x, labels),) = rows
        means, counts, scatter, n_iter, rests = _KMEANS(x, means, labels, max_iter, tol, diag)
        counts, scatter, converged = counts.double(), scatter.double(), rests > 0
        require_finite(rows, scatter)
    else:
        means, n_iter, converged = _lloyd_in_pieces(rows, means, max_iter, tol)
        counts, scatter, _ = hard_statistics(rows, means, per_dimension=diag, sums=False)
    n, per_class = counts.clamp_min(1), counts.sum(1)
    variances = scatter / n.unsqueeze(-1) if diag else scatter / (n * means.shape[2])
    inertia = scatter.sum((1, 2)) if diag else scatter.sum(1)
    return Estimate(
        means,
        (variances + reg_covar).to(dtype),
        (counts / per_class.clamp_min(1).unsqueeze(1)).to(dtype),
        counts,
        -inertia / per_class.clamp_min(1),
        n_iter,
        converged,
    )


def _lloyd_in_pieces(rows: Rows, means: Tensor, max_iter: int, tol: float) -> tuple[Tensor, Tensor, Tensor]:
    """Iterations over chunks and shards: means, and the number of iterations ``[C]`` and convergence ``[C]`` of every class."""
    active = torch.ones(len(means), dtype=torch.bool, device=means.device)
    n_iter = torch.zeros(len(means), dtype=torch.int64, device=means.device)
    limit, moving = None, rows
    for _ in range(max_iter):
        counts, scatter, sums = hard_statistics(moving, means, per_dimension=False, sums=True)
        if limit is None:
            require_finite(rows, scatter)
            limit = tol * _mean_variance(means, counts, scatter, sums)
            active = counts.sum(1) > 0
        filled = counts.unsqueeze(-1) > 0
        target = torch.where(filled, sums / counts.clamp_min(1).unsqueeze(-1), means.double()).to(means.dtype)
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


def _mean_variance(means: Tensor, counts: Tensor, scatter: Tensor, sums: Tensor) -> Tensor:
    """Mean variance of the features of each class ``[C]``, from the statistics of its components."""
    mu, n = means.double(), counts.sum(1).clamp_min(1)
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
    bad = sum(int((~torch.isfinite(x)).any(1).sum()) for x, _ in rows)
    bad = int(rows.reduce(torch.tensor(bad, device=statistic.device)))
    if bad:
        raise ValueError(f"{rows.name} must be finite, got {bad} rows with NaN or infinity")
    raise ValueError(f"{rows.name} must be small enough that squared distances are finite; scale the features down")


def _reseed_empty(rows: Rows, means: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """Moves the first empty component of each class onto the row of the class that is farthest from its mean."""
    empty = (counts == 0) & (counts.sum(1, keepdim=True) > 1)
    needy = empty.any(1)
    if not bool(needy.any()):
        return target
    C, K, D = means.shape
    best = torch.zeros(C, dtype=torch.float64, device=means.device)
    found = torch.zeros(C, D, dtype=torch.float64, device=means.device)
    for x, labels in rows:
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


# ---- k-means++


@torch.no_grad()
def kmeans_plus_plus(
    rows: Rows, num_classes: int, num_components: int, *, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Initial means ``[C, K, D]`` of all classes at once, by greedy k-means++ on squared distances.

    Each new mean is the best of ``2 + log K`` rows drawn with probability proportional to the squared distance to the
    nearest mean so far. A class with fewer distinct rows than components repeats a row; one without rows gets zeros.

    Args:
        rows: chunks of all ranks; draws do not depend on how the rows are divided.
        num_classes: classes C.
        num_components: components K of each class.
        like: a tensor of the means' dtype and device, ``[D]``.
        generator: source of randomness; the numbers of rank 0 are used.

    Source: Arthur and Vassilvitskii, "k-means++: The advantages of careful seeding", SODA 2007, section 4.
    """
    C, D, device = num_classes, like.shape[0], like.device
    labels_of = [torch.zeros(len(x), dtype=torch.int64, device=device) if y is None else y for x, y in rows]
    chunks = [(x, labels) for (x, _), labels in zip(rows, labels_of)]
    labels = torch.cat([like.new_empty(0, dtype=torch.int64), *labels_of])
    order = labels.argsort(stable=True)
    ends = torch.searchsorted(labels[order], torch.arange(C, device=device), right=True)
    sizes = ends.diff(prepend=ends.new_zeros(1))
    starts = ends - sizes
    chunk_ends = [0]
    for x, _ in chunks:
        chunk_ends.append(chunk_ends[-1] + len(x))

    def total_of(mass: Tensor) -> Tensor:
        return class_totals(mass, labels, C) if mass.is_cpu or C > 1 else mass.sum().view(1)

    def distances(means: Tensor) -> Tensor:
        return torch.cat([like.new_empty(0), *(squared_distance(x, means, y) for x, y in chunks)])

    def pick(index: Tensor, mine: Tensor) -> Tensor:
        """Rows at ``index [C]``, sent by the rank that holds each (``mine``)."""
        values = torch.zeros(C, D, dtype=torch.float64, device=device)
        for (x, _), begin, end in zip(chunks, chunk_ends, chunk_ends[1:]):
            if begin < end:
                here = mine & (index >= begin) & (index < end)
                values = torch.where(here.unsqueeze(1), x[(index - begin).clamp(0, len(x) - 1)].double(), values)
        return rows.reduce(values).to(like.dtype)

    def draw(mass: Tensor) -> Tensor:
        """One row of each class with probability proportional to its mass; uniform where a class has none left."""
        everywhere = rows.reduce(total_of(mass))
        mass = torch.where(everywhere[labels] > 0, mass, 1.0)
        table = torch.zeros(rows.ranks, C, dtype=torch.float64, device=device)
        table[rows.rank] = total_of(mass)
        table = rows.reduce(table).cumsum(0)  # the ranks' shares of each class, end to end
        after, everywhere = table[rows.rank], table[-1]
        before = table[rows.rank - 1] if rows.rank else torch.zeros_like(after)
        source = device if generator is None else generator.device
        u = torch.rand(C, dtype=torch.float64, device=source, generator=generator).to(device)
        if rows.group is not None:
            u = rows.reduce(u if rows.rank == 0 else torch.zeros_like(u))
        target = u * everywhere
        mine = (sizes > 0) & (target >= before) & (target < after)
        if not len(labels):
            return pick(starts, mine)
        cumulative = running_sum(mass[order])
        start = torch.where(starts > 0, cumulative[(starts - 1).clamp_min(0)], 0.0)
        position = torch.searchsorted(cumulative, start + (target - before), right=True)
        position = torch.minimum(torch.maximum(position, starts), ends - 1).clamp(0, len(labels) - 1)
        return pick(order[position], mine)

    means = like.new_zeros(C, num_components, D)
    nearest = torch.full((len(labels),), math.inf, dtype=like.dtype, device=device)
    for k in range(num_components):
        best_potential = torch.full((C,), math.inf, dtype=torch.float64, device=device)
        best, best_distance = means[:, k], nearest
        mass = torch.ones(len(labels), dtype=torch.float64, device=device) if k == 0 else nearest.double()
        for _ in range(1 if k == 0 else 2 + int(math.log(num_components))):
            candidate = draw(mass)
            distance = torch.minimum(nearest, distances(candidate))
            potential = rows.reduce(total_of(distance.double()))
            better = potential < best_potential
            best_potential = torch.where(better, potential, best_potential)
            best = torch.where(better.unsqueeze(1), candidate, best)
            best_distance = torch.where(better[labels], distance, best_distance)
        means[:, k] = best
        nearest = best_distance
    return means


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
        for x, labels in rows:
            if not matrices and means.device.type == "cpu":
                yield _MIXTURE_STATISTICS(x, means, variances, weights, labels)
                continue
            for begin in range(0, len(x), size):
                part = x[begin : begin + size]
                y = None if labels is None else labels[begin : begin + size]
                if matrices:
                    joint = covariance.log_joint(part, y, means, variances, weights)
                    log_prob = joint.logsumexp(1)
                    r = (joint - log_prob.unsqueeze(1)).exp()
                    s = covariance.moments(part, y, means, r, tied=variances.dim() == 3)
                else:
                    log_prob, r = _LOG_PROB(part, means, variances, weights, y, True)
                    s = _MOMENTS(means.new_ones(len(part)), part, means, variances, weights, y, log_prob, r)
                yield (
                    *s,
                    log_prob.double().sum().expand(C) if y is None else class_totals(log_prob.double(), y, C),
                )

    return rows.add_up(moments(), (means[:, :, 0], means, variances, means[:, 0, 0]))


def hard_covariances(rows: Rows, means: Tensor, *, tied: bool, reg_covar: float) -> Tensor:
    """Covariances ``[C, K, D, D]`` (tied: ``[C, D, D]``) of the rows nearest to each mean, about that mean; float64."""
    C, K, D = means.shape

    def moments() -> Iterator[tuple[Tensor, ...]]:
        for x, labels in rows:
            assignment = _STATISTICS(x, means, labels, None, None, False, False)[3]
            r = torch.nn.functional.one_hot(assignment, K).double()
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
        sizes = class_sizes(rows, C, device)
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
    ((x, _),) = rows.renumbered(one, len(start.means))
    x, first = x.double(), start.select(one)
    means = first.means[0].double()
    span = covariance.Span(torch.cat([x, means]), reg_covar)
    first.means = span.coordinates(means).unsqueeze(0)
    fitted = expectation_maximization_of_matrices(
        Rows([(span.coordinates(x), None)]), first, tied=tied, reg_covar=reg_covar, dtype=torch.float64, **settings
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
    if rows.in_one_piece and not matrices and ("expectation_maximization", start.means.device.type) in WHOLE_FITS:
        return _maximized_in_one_call(rows, start, max_iter, tol, reg_covar)
    means, variances, weights, counts = start.means, start.variances, start.weights, start.counts.double()
    active = torch.ones(len(means), dtype=torch.bool, device=means.device)
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
        gain = log_likelihood / n.clamp_min(1) - bound

        def moved(new: Tensor, old: Tensor, classes: Tensor = active) -> Tensor:
            return torch.where(classes.view(-1, *[1] * (old.dim() - 1)), new.to(old.dtype), old)

        means = moved(means.double() + shift, means)
        variances = moved(spread, variances)
        weights = moved(s0 / n.clamp_min(1).unsqueeze(-1), weights)
        counts, bound = moved(s0, counts), moved(log_likelihood / n.clamp_min(1), bound)
        n_iter += active
        still = active & (gain >= tol) & (n > 0)
        if not bool(still.any()):
            active = still
            break
        if bool((still != active).any()):
            moving = moving.of(still)
        active = still
    return Estimate(means, variances, weights, counts, bound, n_iter, ~active)


def _maximized_in_one_call(rows: Rows, start: Estimate, max_iter: int, tol: float, reg_covar: float) -> Estimate:
    ((x, labels),) = rows
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
        "weights": torch.where(total > 0, count / total.clamp_min(1), weights.double()),
    }
