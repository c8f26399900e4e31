"""Gaussian mixtures of all classes at once, fitted by k-means or expectation maximization."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from cem_fast.functional import component_statistics, mixture_log_prob
from cem_fast.ops import validate
from cem_fast.precision import FullPrecisionBuffers

ALGORITHMS = ("em", "kmeans")
COVARIANCE_TYPES = ("diag", "spherical", "tied", "full")


class GaussianMixture(FullPrecisionBuffers):
    """One Gaussian mixture for each class, fitted together; ``num_classes=1`` is an ordinary mixture.

    ``p(x | c) = sum_k w_ck N(x; mu_ck, v_ck)`` and ``p(x) = sum_c prior_c p(x | c)``

    Where a method takes ``labels=None`` although there are several classes, it speaks of ``p(x)``, a mixture of all ``C K``
    components; component ``k`` of class ``c`` then has the index ``c K + k``.

    Args:
        num_components: components K of each class.
        num_classes: classes C.
        covariance_type: ``diag`` (``variances [C, K, D]``) or ``spherical`` (``variances [C, K]``).
        algorithm: ``em`` or ``kmeans`` (Lloyd; every row belongs to its nearest mean).
        init: ``k-means++`` (EM then starts from a k-means fit) or initial means ``[C, K, D]``.
        init_variances: initial variances for EM; estimated from the initial means if None.
        init_weights: initial weights ``[C, K]`` for EM; estimated from the initial means if None.
        num_init: restarts; the best one is kept for each class.
        max_iter: iterations of one restart at the most.
        tol: EM stops when the mean log-likelihood gains less (nats); k-means when the means move, squared and summed over
            dimensions, less than ``tol`` times the mean variance of the features.
        reg_covar: added to every variance, in squared units of x.
        generator: source of randomness of k-means++.

    Attributes:
        means ``[C, K, D]``, variances, weights ``[C, K]``, class_prior ``[C]``, counts ``[C, K]``: buffers.
        n_iter_, converged_, lower_bound_: of the last fit; the lower bound is the mean log-likelihood (EM) or the
            negative mean squared distance to the nearest mean (k-means).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source: the GMM step of Algorithm 1 of Xia et al., CVPR 2025; k-means++ by Arthur and Vassilvitskii, SODA 2007, in the
    greedy form; meanings of methods as in scikit-learn's GaussianMixture.
    """

    means: Tensor
    variances: Tensor
    weights: Tensor
    class_prior: Tensor
    counts: Tensor

    def __init__(
        self,
        *,
        num_components: int,
        num_classes: int = 1,
        covariance_type: str = "diag",
        algorithm: str = "em",
        init: str | Tensor = "k-means++",
        init_variances: Tensor | None = None,
        init_weights: Tensor | None = None,
        num_init: int = 1,
        max_iter: int = 100,
        tol: float = 1e-3,
        reg_covar: float = 1e-6,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        for name, value in (
            ("num_components", num_components),
            ("num_classes", num_classes),
            ("num_init", num_init),
            ("max_iter", max_iter),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if covariance_type not in COVARIANCE_TYPES:
            raise ValueError(f"covariance_type must be one of {', '.join(COVARIANCE_TYPES)}, got {covariance_type!r}")
        if covariance_type in ("tied", "full"):
            raise NotImplementedError(
                f"covariance_type={covariance_type!r} cannot be fitted yet; use diag or spherical"
            )
        if algorithm not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}")
        if isinstance(init, str) and init != "k-means++":
            raise ValueError(f"init must be 'k-means++' or a tensor [C, K, D] of means, got {init!r}")
        if not (tol >= 0 and reg_covar >= 0):
            raise ValueError(f"tol and reg_covar must not be negative, got {tol} and {reg_covar}")
        self.num_components, self.num_classes = num_components, num_classes
        self.covariance_type, self.algorithm = covariance_type, algorithm
        self.init, self.init_variances, self.init_weights = init, init_variances, init_weights
        self.num_init, self.max_iter, self.tol, self.reg_covar = num_init, max_iter, tol, reg_covar
        self.generator = generator
        self.n_iter_, self.converged_, self.lower_bound_ = 0, False, -math.inf
        C, K = num_classes, num_components
        self.register_buffer("means", torch.zeros(C, K, 0))
        self.register_buffer("variances", torch.zeros(C, K, 0) if covariance_type == "diag" else torch.zeros(C, K))
        self.register_buffer("weights", torch.zeros(C, K))
        self.register_buffer("class_prior", torch.zeros(C))
        self.register_buffer("counts", torch.zeros(C, K))

    @property
    def is_fitted(self) -> bool:
        return self.means.shape[2] > 0

    def extra_repr(self) -> str:
        return (
            f"num_components={self.num_components}, num_classes={self.num_classes}, "
            f"covariance_type={self.covariance_type!r}, algorithm={self.algorithm!r}"
        )

    # ---- fitting

    @torch.no_grad()
    def fit(self, x: Tensor, labels: Tensor | None = None) -> GaussianMixture:
        """Fits the mixture to rows ``[N, D]`` with classes ``[N]`` (None for one class), replacing what was fitted.

        The mixture takes the device of the rows and their dtype (float32 for half types).
        Classes without rows get prior 0; components beyond a class's distinct rows get weight 0, with one warning.
        """
        x, labels = self._rows(x, labels)
        if len(x) == 0:
            raise ValueError(f"x must have at least one row, got {tuple(x.shape)}")
        if not bool(torch.isfinite(x).all()):
            raise ValueError(
                f"x must be finite, got {int((~torch.isfinite(x)).any(1).sum())} rows with NaN or infinity"
            )
        labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if labels is None else labels
        validate.label_range(labels, self.num_classes)
        self.to(device=x.device, dtype=x.dtype)
        # a common offset would drown a small spread in the sums, so the fit runs on centered rows
        offset = x.mean(0)
        x = x - offset
        best: dict[str, Tensor] | None = None
        for _ in range(self.num_init):
            means = self._initial_means(x, labels, offset)
            fitted = self._lloyd(x, labels, means) if self.algorithm == "kmeans" else self._em(x, labels, means)
            best = fitted if best is None else _better_of(best, fitted)
        assert best is not None
        per_class = torch.zeros(self.num_classes, dtype=x.dtype, device=x.device)
        per_class.index_add_(0, labels, torch.ones_like(labels, dtype=x.dtype))
        self.n_iter_, self.converged_ = int(best["n_iter"].max()), bool(best["converged"].all())
        self.lower_bound_ = float((best["score"] * per_class).sum() / len(x))
        best["means"] += offset
        self._tidy(best, per_class, offset)
        self.set_parameters(
            means=best["means"],
            variances=best["variances"],
            weights=best["weights"],
            class_prior=per_class / len(x),
            counts=best["counts"],
        )
        return self

    def set_parameters(
        self, *, means: Tensor, variances: Tensor, weights: Tensor, class_prior: Tensor, counts: Tensor | None = None
    ) -> None:
        """Replaces the parameters, in place where the shapes allow, so that captured graphs see the change."""
        validate.tensor("means", means, "[C, K, D]", 3)
        C, K = self.num_classes, self.num_components
        validate.same_shape("means", means, (C, K, means.shape[2]), "[C, K, D]")
        dims = (C, K, means.shape[2]) if self.covariance_type == "diag" else (C, K)
        given = {
            "means": (means, tuple(means.shape)),
            "variances": (variances, dims),
            "weights": (weights, (C, K)),
            "class_prior": (class_prior, (C,)),
            "counts": (weights.new_zeros(C, K) if counts is None else counts, (C, K)),
        }
        for name, (value, shape) in given.items():
            validate.tensor(name, value, str(list(shape)), len(shape))
            validate.same_shape(name, value, shape, "as the mixture was declared")
        for name, (value, _) in given.items():
            buffer = self._buffers[name]
            assert buffer is not None
            if buffer.shape == value.shape:
                buffer.copy_(value)
            else:
                self._buffers[name] = value.detach().to(device=buffer.device, dtype=buffer.dtype, copy=True)

    def _rows(self, x: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        validate.tensor("x", x, "[N, D]", 2)
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
        x = x.detach()
        x = x if x.dtype in validate.PARAMETER_DTYPES else x.float()
        return x, validate.labels(labels, len(x), self.num_classes, x.device)

    def _initial_means(self, x: Tensor, labels: Tensor, offset: Tensor) -> Tensor:
        if isinstance(self.init, Tensor):
            shape = (self.num_classes, self.num_components, x.shape[1])
            validate.same_shape("init", self.init, shape, "[C, K, D]")
            return self.init.to(x) - offset
        seeds = kmeans_plus_plus(x, labels, self.num_classes, self.num_components, generator=self.generator)
        return self._lloyd(x, labels, seeds)["means"] if self.algorithm == "em" else seeds

    def _lloyd(self, x: Tensor, labels: Tensor, means: Tensor) -> dict[str, Tensor]:
        means, limit = means.clone(), self.tol * float(x.var(0, correction=0).mean())
        iteration, shift = 0, math.inf
        while iteration < self.max_iter and shift > limit:
            iteration += 1
            statistics = component_statistics(x, means, labels, sums=True)
            assert statistics.sums is not None
            moved = statistics.sums / statistics.counts.clamp_min(1).unsqueeze(-1)
            new = torch.where(statistics.counts.unsqueeze(-1) > 0, moved, means)
            new = _reseed_empty(x, labels, new, statistics.counts, statistics.assignment)
            shift = float((new - means).square().sum((1, 2)).max())
            means = new
        fitted = self._hard_estimates(x, labels, means)
        per_class = fitted["counts"].sum(1).clamp_min(1)
        fitted["score"] = -fitted.pop("inertia") / per_class
        fitted["n_iter"] = torch.full_like(per_class, iteration)
        fitted["converged"] = torch.full_like(per_class, shift <= limit)
        return fitted

    def _hard_estimates(self, x: Tensor, labels: Tensor, means: Tensor) -> dict[str, Tensor]:
        """Weights and variances about the given means, from each row's nearest one."""
        diag = self.covariance_type == "diag"
        counts, scatter, _, _ = component_statistics(x, means, labels, per_dimension=diag)
        n = counts.clamp_min(1)
        variances = scatter / n.unsqueeze(-1) if diag else scatter / (n * x.shape[1])
        return {
            "means": means,
            "variances": variances + self.reg_covar,
            "weights": counts / counts.sum(1, keepdim=True).clamp_min(1),
            "counts": counts,
            "inertia": scatter.sum((1, 2)) if diag else scatter.sum(1),
        }

    def _em(self, x: Tensor, labels: Tensor, means: Tensor) -> dict[str, Tensor]:
        start = self._hard_estimates(x, labels, means)
        variances, weights = start["variances"], start["weights"]
        if self.init_variances is not None:
            validate.same_shape(
                "init_variances", self.init_variances, tuple(variances.shape), "as the covariance type says"
            )
            variances = self.init_variances.to(x)
        if self.init_weights is not None:
            validate.same_shape("init_weights", self.init_weights, tuple(weights.shape), "[C, K]")
            weights = self.init_weights.to(x)
        D, n = x.shape[1], start["counts"].sum(1)
        ones, tiny = torch.ones_like(x[:, 0]), torch.finfo(x.dtype).tiny
        bound = torch.full_like(n, -math.inf)
        counts, iteration, converged = start["counts"], 0, False
        while iteration < self.max_iter and not converged:
            iteration += 1
            log_prob, r = torch.ops.cem_fast.mixture_log_prob_fwd(x, means, variances, weights, labels, True)
            counts, s1, s2 = torch.ops.cem_fast.mixture_moments(ones, x, means, variances, weights, labels, log_prob, r)
            share = counts.clamp_min(tiny)
            shift = s1 / share.unsqueeze(-1)
            alive = counts > 0
            means = means + shift * alive.unsqueeze(-1)
            if variances.dim() == 3:
                variances = (s2 / share.unsqueeze(-1) - shift.square()).clamp_min(0) + self.reg_covar
            else:
                variances = (s2 / share - shift.square().sum(-1)).clamp_min(0) / D + self.reg_covar
            weights = counts / n.clamp_min(1).unsqueeze(-1)
            previous, bound = bound, torch.zeros_like(n).index_add_(0, labels, log_prob) / n.clamp_min(1)
            converged = float(((bound - previous) * n).sum() / len(x)) < self.tol
        return {
            "means": means,
            "variances": variances,
            "weights": weights,
            "counts": counts,
            "score": bound,
            "n_iter": torch.full_like(n, iteration),
            "converged": torch.full_like(n, converged),
        }

    def _tidy(self, fitted: dict[str, Tensor], per_class: Tensor, offset: Tensor) -> None:
        """Moves empty components behind the others, onto the first of them, with weight 0 and the floor variance."""
        empty = fitted["counts"] <= 0
        missing = per_class == 0
        if bool((empty & ~missing.unsqueeze(1)).any()):
            classes = int((empty & ~missing.unsqueeze(1)).any(1).sum())
            warnings.warn(
                f"{classes} of {self.num_classes} classes have fewer distinct rows than num_components="
                f"{self.num_components}; their spare components have weight 0",
                stacklevel=3,
            )
        order = empty.int().argsort(dim=1, stable=True)
        for name in ("means", "variances", "weights", "counts"):
            value = fitted[name]
            index = order if value.dim() == 2 else order.unsqueeze(-1).expand_as(value)
            fitted[name] = value.gather(1, index)
        empty = empty.gather(1, order)
        first = torch.where(missing[:, None, None], offset, fitted["means"][:, :1])
        fitted["means"] = torch.where(empty.unsqueeze(-1), first, fitted["means"])
        floor = max(self.reg_covar, float(torch.finfo(offset.dtype).tiny))
        expand = empty.unsqueeze(-1) if fitted["variances"].dim() == 3 else empty
        fitted["variances"] = torch.where(expand, floor, fitted["variances"]).clamp_min(floor)
        even = 1 / self.num_components
        fitted["weights"] = torch.where(missing.unsqueeze(1), even, fitted["weights"])

    # ---- what a fitted mixture says

    def _components(self, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Means, variances and weights per class, or flattened into one class of C K components when there are no labels."""
        if not self.is_fitted:
            raise RuntimeError("this GaussianMixture is not fitted: call fit(x, labels) first")
        if labels is not None or self.num_classes == 1:
            return self.means, self.variances, self.weights
        joint = (self.class_prior.unsqueeze(1) * self.weights).reshape(1, -1)
        return self.means.flatten(0, 1).unsqueeze(0), self.variances.flatten(0, 1).unsqueeze(0), joint

    def score_samples(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-likelihood ``[N]`` in nats: ``log p(x_n | y_n)``, or ``log p(x_n)`` without labels; differentiable in x."""
        return mixture_log_prob(x, *self._components(labels), labels)

    @torch.no_grad()
    def predict(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Component ``[N]`` of each row: its nearest mean after k-means, its highest posterior after EM."""
        means, variances, weights = self._components(labels)
        rule = "nearest" if self.algorithm == "kmeans" else "posterior"
        return component_statistics(x, means, labels, variances=variances, weights=weights, assignment=rule).assignment

    @torch.no_grad()
    def predict_proba(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Responsibilities ``[N, K]`` within each row's class, or ``[N, C K]`` without labels."""
        means, variances, weights = self._components(labels)
        validate.features(x, means)
        labels = validate.labels(labels, len(x), means.shape[0], x.device)
        return torch.ops.cem_fast.mixture_log_prob_fwd(x, means, variances, weights, labels, True)[1]

    @torch.no_grad()
    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws from ``p(x)``: rows ``[n, D]`` and the component ``c K + k`` ``[n]`` of each."""
        self._components(None)
        joint = (self.class_prior.unsqueeze(1) * self.weights).flatten()
        component = torch.multinomial(joint, num_samples, replacement=True, generator=generator)
        std = self.variances.flatten(0, 1).sqrt()[component]
        std = std if std.dim() == 2 else std.unsqueeze(-1)
        mean = self.means.flatten(0, 1)[component]
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        return mean + std * noise, component

    def _num_parameters(self) -> int:
        C, K, _ = self.means.shape
        return self.means.numel() + self.variances.numel() + C * (K - 1)

    def aic(self, x: Tensor, labels: Tensor | None = None) -> float:
        """Akaike information criterion of the rows: ``2 p - 2 log L``; lower is better."""
        return 2 * self._num_parameters() - 2 * float(self.score_samples(x, labels).double().sum())

    def bic(self, x: Tensor, labels: Tensor | None = None) -> float:
        """Bayesian information criterion of the rows: ``p log N - 2 log L``; lower is better."""
        return self._num_parameters() * math.log(len(x)) - 2 * float(self.score_samples(x, labels).double().sum())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # D is not known before a fit, so buffers take the shape of what is loaded
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is not None and buffer is not None and saved.dim() == buffer.dim() == 3:
                shape = (*buffer.shape[:2], saved.shape[2])
                self._buffers[name] = buffer if buffer.shape == shape else buffer.new_zeros(shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def squared_distance(x: Tensor, means: Tensor, labels: Tensor) -> Tensor:
    """Squared distance ``[N]`` of each row to the one mean ``[C, D]`` of its class.

    A Gaussian of variance ``1 / (2 pi)`` has no normalizing constant, so its log-likelihood is ``-pi |x - mu|^2``.
    """
    C = means.shape[0]
    variances = means.new_full((C, 1), 1 / (2 * math.pi))
    log_prob = mixture_log_prob(x, means.unsqueeze(1), variances, means.new_ones(C, 1), labels)
    return (log_prob / -math.pi).clamp_min(0)


@torch.no_grad()
def kmeans_plus_plus(
    x: Tensor, labels: Tensor, num_classes: int, num_components: int, *, generator: torch.Generator | None = None
) -> Tensor:
    """Initial means ``[C, K, D]`` of all classes at once, by greedy k-means++ on squared distances.

    Each new mean is the best of ``2 + log K`` rows drawn with probability proportional to the squared distance to the
    nearest mean so far. A class with fewer distinct rows than components repeats a row; one without rows gets zeros.

    Source: Arthur and Vassilvitskii, "k-means++: The advantages of careful seeding", SODA 2007, section 4.
    """
    C, N = num_classes, x.shape[0]
    order = labels.argsort(stable=True)
    sizes = torch.zeros(C, dtype=torch.int64, device=x.device).index_add_(0, labels, torch.ones_like(labels))
    ends = sizes.cumsum(0)
    starts = ends - sizes
    means = x.new_zeros(C, num_components, x.shape[1])
    nearest = x.new_full((N,), math.inf)

    def draw(mass: Tensor) -> Tensor:
        """One row of each class with probability proportional to its mass; uniform where a class has none left."""
        total = torch.zeros(C, dtype=torch.float64, device=x.device).index_add_(0, labels, mass)
        mass = torch.where(total[labels] > 0, mass, 1.0)[order]
        cumulative = mass.cumsum(0)
        before = torch.where(starts > 0, cumulative[(starts - 1).clamp_min(0)], 0.0)
        after = torch.where(ends > 0, cumulative[(ends - 1).clamp_min(0)], 0.0)
        u = torch.rand(C, dtype=torch.float64, device=x.device, generator=generator)
        position = torch.searchsorted(cumulative, before + u * (after - before), right=True)
        return order[torch.minimum(torch.maximum(position, starts), ends - 1).clamp(0, N - 1)]

    trials = 2 + int(math.log(num_components))
    for k in range(num_components):
        best_potential = torch.full((C,), math.inf, dtype=torch.float64, device=x.device)
        best_row = torch.zeros(C, dtype=torch.int64, device=x.device)
        best_distance = nearest
        mass = torch.ones(N, dtype=torch.float64, device=x.device) if k == 0 else nearest.double()
        for _ in range(1 if k == 0 else trials):
            row = draw(mass)
            distance = torch.minimum(nearest, squared_distance(x, x[row], labels))
            potential = torch.zeros_like(best_potential).index_add_(0, labels, distance.double())
            better = potential < best_potential
            best_potential = torch.where(better, potential, best_potential)
            best_row = torch.where(better, row, best_row)
            best_distance = torch.where(better[labels], distance, best_distance)
        means[:, k] = x[best_row] * (sizes > 0).unsqueeze(-1)
        nearest = best_distance
    return means


def _reseed_empty(x: Tensor, labels: Tensor, means: Tensor, counts: Tensor, assignment: Tensor) -> Tensor:
    """Moves the first empty component of each class onto the class's row that is farthest from its own mean."""
    empty = (counts == 0) & (counts.sum(1, keepdim=True) > 1)
    needy = empty.any(1)
    if not bool(needy.any()):
        return means
    distance = (x - means[labels, assignment]).square().sum(1)
    farthest = torch.zeros(len(means), dtype=x.dtype, device=x.device).scatter_reduce_(0, labels, distance, "amax")
    is_farthest = (distance == farthest[labels]) & (distance > 0)
    rows = torch.where(is_farthest, torch.arange(len(x), device=x.device), len(x))
    row = torch.full((len(means),), len(x), device=x.device).scatter_reduce_(0, labels, rows, "amin")
    filled = needy & (row < len(x))
    slot = empty.int().argmax(1)
    classes = filled.nonzero().squeeze(1)
    means = means.clone()
    means[classes, slot[classes]] = x[row[classes]]
    return means


def _better_of(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Keeps, for each class, the fit with the higher score."""
    better = second["score"] > first["score"]
    return {
        name: torch.where(better.view(-1, *[1] * (value.dim() - 1)), second[name], value)
        for name, value in first.items()
    }
