"""Gaussian mixtures of all classes at once, fitted by k-means or expectation maximization."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cem_fast.functional import component_statistics, mixture_log_prob
from cem_fast.mixture import covariance, interchange
from cem_fast.mixture.buffers import FullPrecisionBuffers
from cem_fast.mixture.fitting import (
    Chunk,
    Rows,
    Settings,
    Stream,
    class_sizes,
    draw_sample,
    fit,
    hard_statistics,
    require_finite,
    shape_of_spread,
    soft_statistics,
)
from cem_fast.ops import validate

DECLARED = ("num_components", "num_classes", "covariance_type", "algorithm", "reg_covar")


class GaussianMixture(FullPrecisionBuffers):
    """One Gaussian mixture for each class, fitted together; ``num_classes=1`` is an ordinary mixture.

    ``p(x | c) = sum_k w_ck N(x; mu_ck, v_ck)`` and ``p(x) = sum_c prior_c p(x | c)``

    Where a method takes ``labels=None`` although there are several classes, it speaks of ``p(x)``, a mixture of all ``C K``
    components; component ``k`` of class ``c`` then has the index ``c K + k``.

    Args:
        num_components: components K of each class.
        num_classes: classes C.
        covariance_type: ``diag`` (``variances [C, K, D]``), ``spherical`` (``variances [C, K]``), ``full``
            (``covariances [C, K, D, D]``) or ``tied`` (one for each class, ``covariances [C, D, D]``); the last two need EM
            and are kept in float64.
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
        process_group: torch.distributed group over which fits sum their statistics; every rank then gives its own rows.

    Attributes:
        means: buffer ``[C, K, D]``.
        variances: buffer ``[C, K]`` or ``[C, K, D]``; ``covariances`` in its place for ``tied`` and ``full``.
        weights: buffer ``[C, K]``.
        class_prior: buffer ``[C]``.
        counts: buffer ``[C, K]``.
        num_rows_: rows that were fitted, on all ranks.
        n_iter_: iterations of the last fit.
        converged_: whether the last fit converged.
        lower_bound_: mean log-likelihood (EM), or negative mean squared distance to the nearest mean (k-means), of the last fit.

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
        process_group: Any = None,
    ):
        super().__init__()
        self.num_components, self.num_classes = num_components, num_classes
        self.covariance_type, self.algorithm = covariance_type, algorithm
        self.init, self.init_variances, self.init_weights = init, init_variances, init_weights
        self.num_init, self.max_iter, self.tol, self.reg_covar = num_init, max_iter, tol, reg_covar
        self.generator, self.process_group = generator, process_group
        self.matrices = self._settings().matrices
        self._gathered: list[Tensor] | None = None
        self.num_rows_, self.n_iter_, self.converged_, self.lower_bound_ = 0, 0, False, -math.inf
        C, K = num_classes, num_components
        self.register_buffer("means", torch.zeros(C, K, 0))
        spread = {
            "spherical": torch.zeros(C, K),
            "diag": torch.zeros(C, K, 0),
            "tied": torch.zeros(C, 0, 0),
            "full": torch.zeros(C, K, 0, 0),
        }
        self._spread = "covariances" if self.matrices else "variances"
        self.register_buffer(self._spread, spread[covariance_type])
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

        The mixture takes the device of the rows and their dtype (float32 for half types,
        float64 for covariance matrices). Classes without rows get prior 0;
        components beyond a class's distinct rows get weight 0, with one warning. With a process group, the rows are this
        rank's shard, possibly empty, and all ranks end with the same bits. What was fitted stays if the fit does not end.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
            RuntimeError: a rank of the process group has ended or does not answer.
        """
        return self._fit(Rows([self._rows(x, labels)], self.process_group))

    @torch.no_grad()
    def fit_stream(
        self,
        batches: Iterable[tuple[Tensor, Tensor | None]],
        *,
        memory_budget: int = 1 << 30,
        on_pass: Callable[[int, int], None] | None = None,
    ) -> GaussianMixture:
        """Fits the mixture to batches of rows that need not fit in memory, replacing what was fitted.

        One pass draws a sample of each class, uniformly, and starts from a fit to it; then every iteration is one more pass
        over all batches. If all rows fit in the budget, they are kept and there is no second pass.

        Args:
            batches: ``(x [n, D], labels [n] or None)``; must give the same rows every time it is iterated, in any order.
            memory_budget: bytes of rows, labels included, that may be kept; one batch, its work space and the parameters come on
                top.
            on_pass: called after each pass with its number, from 1, and the rows it saw.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        if iter(batches) is batches:
            raise TypeError("batches must be iterable more than once (a list or a loader), got an iterator")
        stream = Stream(self._checked(batches), on_pass)
        sample, sizes, complete = draw_sample(stream, self.num_classes, memory_budget, self.generator)
        kept = Rows(sample, self.process_group)
        return self._fit(kept if complete else Rows(stream, self.process_group), sample=kept, sizes=sizes)

    def _checked(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> Callable[[], Iterator[Chunk]]:
        return lambda: (self._rows(x, labels) for x, labels in batches)

    def _settings(self) -> Settings:
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    def _fit(self, rows: Rows, sample: Rows | None = None, sizes: Tensor | None = None) -> GaussianMixture:
        best, per_class = fit(rows, self._settings(), sample=sample, sizes=sizes)
        dtype, total, present = best.means.dtype, float(per_class.sum()), per_class > 0
        self.to(device=best.means.device, dtype=dtype)
        self.num_rows_ = int(total)
        self.n_iter_, self.converged_ = int(best.n_iter.max()), bool(best.converged[present].all())
        self.lower_bound_ = float((best.score[present] * per_class[present]).sum() / total)
        self.set_parameters(
            means=best.means,
            variances=best.variances,
            weights=best.weights,
            class_prior=(per_class / total).to(dtype),
            counts=best.counts.to(dtype),
        )
        return self

    @torch.no_grad()
    def partial_fit(self, x: Tensor, labels: Tensor | None = None) -> GaussianMixture:
        """Adds rows ``[n, D]`` to what the mixture was fitted to, without seeing the earlier ones again.

        ``n' = n + sum r,  mu' = mu + sum r (x - mu) / n',  v' = (n v + sum r (x - mu)^2) / n' - (mu' - mu)^2``

        Responsibilities are those of the parameters before the call (k-means: the nearest mean). Classes that appear for the
        first time are fitted to this batch. Memory does not grow with the number of calls.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.

        Source: the pairwise update of Chan, Golub and LeVeque, 1983, applied to each component.
        """
        self._require_variances("partial_fit")
        rows = Rows([self._rows(x, labels)], self.process_group)
        if not self.is_fitted:
            return self._fit(rows)
        validate.features(rows.chunks[0][0], self.means)
        seen = self.counts.double()
        per_class = rows.reduce(class_sizes(rows, self.num_classes, self.means.device))
        new = (seen.sum(1) == 0) & (per_class > 0)
        if bool(new.any()):
            self._adopt(rows, new, per_class)
        n, s1, s2 = self._statistics(rows)
        require_finite(rows, s2)
        n = torch.where(new.unsqueeze(1), 0.0, n)  # in the mixture since they were adopted
        seen = self.counts.double()
        moved = self._moved(seen, n, s1, s2)
        total = (seen + n).sum(1)
        self.set_parameters(**moved, class_prior=total / total.sum(), counts=seen + n)
        self.num_rows_ += int(per_class.sum())
        return self

    @torch.no_grad()
    def gather(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Adds rows ``[n, D]`` to the statistics about the present parameters that the next ``step`` uses.

        Raises:
            RuntimeError: the mixture is not fitted, so there are no parameters to gather about.
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        self._require_variances("gather")
        self._components(labels)
        x, labels = self._rows(x, labels)
        validate.features(x, self.means)
        added = self._statistics(Rows([(x, labels)]))
        self._gathered = added if self._gathered is None else [a + b for a, b in zip(self._gathered, added)]

    @torch.no_grad()
    def step(self) -> GaussianMixture:
        """One iteration of k-means or EM on what was gathered, by all ranks of the process group, since the last step.

        Components that no row was near keep their means and variances and get weight 0.

        Raises:
            RuntimeError: nothing was gathered.
            ValueError: what was gathered is not finite.
        """
        self._require_variances("step")
        self._components(None)
        rows, nothing = Rows([], self.process_group), [self.means[:, :, 0], self.means, self.variances]
        gathered = (
            [torch.zeros_like(t, dtype=torch.float64) for t in nothing] if self._gathered is None else self._gathered
        )
        n, s1, s2 = (rows.reduce(part) for part in gathered)  # a rank without rows takes part, or the others would wait
        self._gathered = None
        if not bool(n.any()):
            raise RuntimeError("nothing to step on: call gather(x, labels) first")
        if not bool(s2.isfinite().all()):
            raise ValueError("gathered rows must be finite, got NaN or infinity")
        moved = self._moved(torch.zeros_like(n), n, s1, s2)
        per_class = n.sum(1)
        self.set_parameters(**moved, class_prior=per_class / per_class.sum(), counts=n)
        self.num_rows_ = round(float(n.sum()))
        return self

    def _require_variances(self, method: str) -> None:
        if self.matrices:
            raise ValueError(f"{method} needs spherical or diag covariances, got {self.covariance_type!r}")

    def _statistics(self, rows: Rows) -> list[Tensor]:
        """``sum r``, ``sum r (x - mu)`` and ``sum r (x - mu)^2`` about the present parameters."""
        if self.algorithm == "em":
            return soft_statistics(rows, self.means, self.variances, self.weights)[:3]
        diag = self.covariance_type == "diag"
        n, s2, sums = hard_statistics(rows, self.means, per_dimension=diag, sums=True)
        return [n, sums - n.unsqueeze(-1) * self.means.double(), s2]

    def _moved(self, seen: Tensor, n: Tensor, s1: Tensor, s2: Tensor) -> dict[str, Tensor]:
        """Means, variances and weights of ``seen [C, K]`` rows with these moments and ``n`` more with theirs about the means."""
        mu, v = self.means.double(), self.variances.double()
        diag = v.dim() == 3
        if not diag:
            s2 = s2 / mu.shape[2]
        count, wide = seen + n, (lambda t: t.unsqueeze(-1)) if diag else (lambda t: t)
        safe = count.clamp_min(torch.finfo(torch.float64).tiny)
        shift = s1 / safe.unsqueeze(-1)
        spread = (wide(seen) * (v - self.reg_covar) + s2) / wide(safe)
        spread = spread - (shift.square() if diag else shift.square().mean(-1))
        moves, total = n > 0, count.sum(1, keepdim=True)
        return {
            "means": torch.where(moves.unsqueeze(-1), mu + shift, mu),
            "variances": torch.where(wide(moves), spread.clamp_min(0) + self.reg_covar, v),
            "weights": torch.where(total > 0, count / total.clamp_min(1), self.weights.double()),
        }

    def _adopt(self, rows: Rows, classes: Tensor, per_class: Tensor) -> None:
        """Fits classes that had no rows before, leaving the others as they are."""
        fresh = GaussianMixture(
            num_components=self.num_components,
            num_classes=self.num_classes,
            covariance_type=self.covariance_type,
            algorithm=self.algorithm,
            max_iter=self.max_iter,
            tol=self.tol,
            reg_covar=self.reg_covar,
            generator=self.generator,
            process_group=self.process_group,
        )
        fresh._fit(rows)
        for name in ("means", "variances", "weights", "counts"):
            mine, theirs = getattr(self, name), getattr(fresh, name)
            mine.copy_(torch.where(classes.view(-1, *[1] * (mine.dim() - 1)), theirs, mine))

    def set_parameters(
        self, *, means: Tensor, variances: Tensor, weights: Tensor, class_prior: Tensor, counts: Tensor | None = None
    ) -> None:
        """Replaces the parameters, in place where the shapes allow, so that captured graphs see the change."""
        validate.tensor("means", means, "[C, K, D]", 3)
        C, K = self.num_classes, self.num_components
        validate.same_shape("means", means, (C, K, means.shape[2]), "[C, K, D]")
        dims = shape_of_spread(self.covariance_type, C, K, means.shape[2])
        given = {
            "means": (means, tuple(means.shape)),
            self._spread: (variances, dims),
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

    def _rows(self, x: Tensor, labels: Tensor | None) -> Chunk:
        validate.tensor("x", x, "[N, D]", 2)
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating-point tensor, got {x.dtype}")
        labels = validate.integer_labels(labels, len(x), self.num_classes, x.device)
        if labels is not None:
            validate.label_range(labels, self.num_classes)
        # rounded to single precision, a thin covariance matrix would be indefinite
        return x.detach().double() if self.matrices else x.detach(), labels

    # ---- what a fitted mixture says

    def _components(self, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Means, variances and weights per class, or flattened into one class of C K components when there are no labels."""
        if not self.is_fitted:
            raise RuntimeError("this GaussianMixture is not fitted: call fit(x, labels) first")
        spread = getattr(self, self._spread)
        if labels is not None or self.num_classes == 1:
            return self.means, spread, self.weights
        joint = (self.class_prior.unsqueeze(1) * self.weights).reshape(1, -1)
        if self.matrices:
            spread = covariance.per_component(spread, self.num_components)
        return self.means.flatten(0, 1).unsqueeze(0), spread.flatten(0, 1).unsqueeze(0), joint

    def _log_joint(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """``log w_k N(x; mu_k, Sigma_k)`` ``[N, K]`` where covariances are matrices."""
        means, spread, weights = self._components(labels)
        validate.tensor("x", x, "[N, D]", 2)
        x = x.to(means.dtype)
        validate.features(x, means)
        labels = validate.labels(labels, len(x), means.shape[0], x.device)
        return covariance.log_joint(x, labels, means, spread, weights)

    def score_samples(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-likelihood ``[N]`` in nats: ``log p(x_n | y_n)``, or ``log p(x_n)`` without labels; differentiable in x."""
        if self.matrices:
            return self._log_joint(x, labels).logsumexp(1).to(self.means.dtype)
        return mixture_log_prob(x, *self._components(labels), labels)

    @torch.no_grad()
    def predict(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Component ``[N]`` of each row: its nearest mean after k-means, its highest posterior after EM."""
        if self.matrices:
            return self._log_joint(x, labels).argmax(1)
        means, variances, weights = self._components(labels)
        if self.algorithm == "em":
            rule = "posterior"
        else:
            rule = "nearest"
            # components without rows lie somewhere, too
            means = means.masked_fill((weights == 0).unsqueeze(-1), math.inf)
        return component_statistics(x, means, labels, variances=variances, weights=weights, assignment=rule).assignment

    @torch.no_grad()
    def predict_proba(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Responsibilities ``[N, K]`` within each row's class, or ``[N, C K]`` without labels."""
        if self.matrices:
            return self._log_joint(x, labels).softmax(1).to(self.means.dtype)
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
        mean = self.means.flatten(0, 1)[component]
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device, generator=generator)
        if self.matrices:
            matrices = covariance.per_component(self.covariances, self.num_components).flatten(0, 1)
            roots = torch.linalg.cholesky(matrices.double()).to(mean.dtype)
            for k in range(len(roots)):
                noise[component == k] = noise[component == k] @ roots[k].T
            return mean + noise, component
        std = self.variances.flatten(0, 1).sqrt()[component]
        return mean + (std if std.dim() == 2 else std.unsqueeze(-1)) * noise, component

    def _num_parameters(self, labels: Tensor | None) -> int:
        C, K, D = self.means.shape
        weights = C * K - 1 if labels is None else C * (K - 1)
        spread = getattr(self, self._spread).numel()
        if self.matrices:  # symmetric
            spread = spread // D * (D + 1) // 2
        return self.means.numel() + spread + weights

    def aic(self, x: Tensor, labels: Tensor | None = None) -> float:
        """Akaike information criterion of the rows: ``2 p - 2 log L``; lower is better."""
        return 2 * self._num_parameters(labels) - 2 * float(self.score_samples(x, labels).double().sum())

    def bic(self, x: Tensor, labels: Tensor | None = None) -> float:
        """Bayesian information criterion of the rows: ``p log N - 2 log L``; lower is better."""
        return self._num_parameters(labels) * math.log(len(x)) - 2 * float(self.score_samples(x, labels).double().sum())

    # ---- files, and scikit-learn

    def save(self, path: str | Path) -> None:
        """Writes the mixture to a safetensors file; ``GaussianMixture.load(path)`` brings it back."""
        interchange.write(path, self.state_dict(), {name: getattr(self, name) for name in DECLARED})

    @classmethod
    def load(cls, path: str | Path) -> GaussianMixture:
        """Reads a mixture that ``save`` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is no such mixture.
        """
        state, settings = interchange.read(path)
        try:
            mixture = cls(**{name: settings[name] for name in DECLARED}).to(state["means"].dtype)
            mixture.load_state_dict(state)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"path must be a file that GaussianMixture.save wrote, got {path}: {error}") from error
        return mixture

    def to_sklearn(self, class_index: int = 0) -> Any:
        """One class's mixture as a fitted ``sklearn.mixture.GaussianMixture``; needs scikit-learn.

        Raises:
            RuntimeError: the mixture is not fitted.
            ValueError: there is no such class.
        """
        self._components(None)
        if not 0 <= class_index < self.num_classes:
            raise ValueError(f"class_index must lie in [0, {self.num_classes}), got {class_index}")
        parameters = self.means, getattr(self, self._spread), self.weights
        model = interchange.to_sklearn(
            *(value[class_index] for value in parameters),
            covariance_type=self.covariance_type,
            reg_covar=self.reg_covar,
        )
        model.converged_, model.n_iter_, model.lower_bound_ = self.converged_, self.n_iter_, self.lower_bound_
        return model

    @classmethod
    def from_sklearn(cls, model: Any) -> GaussianMixture:
        """A mixture of one class from a fitted ``sklearn.mixture.GaussianMixture``, in double precision.

        Raises:
            ValueError: the model is not fitted.
        """
        means, spread, weights = interchange.from_sklearn(model)
        mixture = cls(
            num_components=model.n_components, covariance_type=model.covariance_type, reg_covar=model.reg_covar
        ).double()
        mixture.set_parameters(means=means, variances=spread, weights=weights, class_prior=means.new_ones(1))
        mixture.n_iter_, mixture.converged_ = model.n_iter_, model.converged_
        mixture.lower_bound_ = float(model.lower_bound_)
        return mixture

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # D is not known before a fit, so buffers take the shape of what is loaded, if all of it fits
        if self.accepts(state_dict, prefix):
            for name, buffer in self._buffers.items():
                saved = state_dict[prefix + name]
                assert buffer is not None
                self._buffers[name] = buffer if buffer.shape == saved.shape else buffer.new_zeros(saved.shape)
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            before = {name: buffer.clone() for name, buffer in self._buffers.items() if buffer is not None}
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._buffers.update(before)

    def accepts(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Whether a state dict holds a mixture of this many classes and components and this covariance type."""
        for name, buffer in self._buffers.items():
            saved = state_dict.get(prefix + name)
            if saved is None or buffer is None or saved.dim() != buffer.dim():
                return False
            declared = 1 if name == "covariances" and self.covariance_type == "tied" else 2
            if saved.shape[:declared] != buffer.shape[:declared]:
                return False
        return True
