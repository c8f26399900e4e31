"""Parameters of Gaussian mixtures of all classes at once, and the densities that they define."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cem_fast._support.counts import require_count
from cem_fast.functional import component_statistics, mixture_log_prob
from cem_fast.mixture import covariance
from cem_fast.mixture.arrays import numpy_too
from cem_fast.mixture.fitted import FittedModule
from cem_fast.mixture.rows import class_totals
from cem_fast.ops import validate
from cem_fast.ops.library import OPERATORS

_LOG_PROB = OPERATORS["mixture_log_prob_fwd"]


def shape_of_spread(covariance_type: str, classes: int, components: int, dimension: int) -> tuple[int, ...]:
    """Shape of the variances or covariances."""
    C, K, D = classes, components, dimension
    return {"spherical": (C, K), "diag": (C, K, D), "tied": (C, D, D), "full": (C, K, D, D)}[covariance_type]


def _require_values(name: str, value: Tensor) -> None:
    """Requires finite values, and positive variances whose inverse is finite; no other value is negative but means."""
    if not value.numel():
        return
    smallest, largest = (float(extreme) for extreme in value.aminmax())  # NaN if there is one
    if not (math.isfinite(smallest) and math.isfinite(largest)):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    least = {"means": -math.inf, "covariances": -math.inf, "variances": torch.finfo(value.dtype).tiny}.get(name, 0.0)
    if not smallest >= least:
        wanted = "at least 0" if name != "variances" else "positive" if smallest <= 0 else "positive and normal"
        raise ValueError(f"{name} must be {wanted}, got {smallest}")


class MixtureDensity(FittedModule):
    """The part of a ``GaussianMixture`` that needs no fit: its parameters, densities, components and samples."""

    means: Tensor
    variances: Tensor
    covariances: Tensor
    weights: Tensor
    class_prior: Tensor
    counts: Tensor

    def __init__(self, num_components: int, num_classes: int, covariance_type: str, algorithm: str):
        super().__init__()
        self.num_components, self.num_classes = num_components, num_classes
        self.covariance_type, self.algorithm = covariance_type, algorithm
        self.matrices = covariance_type in ("tied", "full")
        C, K = num_classes, num_components
        self._spread = "covariances" if self.matrices else "variances"
        shapes = {
            "means": (C, K, 0),
            self._spread: shape_of_spread(covariance_type, C, K, 0),
            "weights": (C, K),
            "class_prior": (C,),
            "counts": (C, K),
        }
        if self.matrices:  # in single precision, a thin covariance matrix would be indefinite
            self.always_double = frozenset(shapes)
        dtype = torch.float64 if self.matrices else None
        self.declare_fitted(**{name: torch.zeros(shape, dtype=dtype) for name, shape in shapes.items()})

    @property
    def is_fitted(self) -> bool:  # type: ignore[override]
        """Whether there are parameters, fitted, loaded or set."""
        return self.means.shape[2] > 0

    @property
    def spread(self) -> Tensor:
        """The variances, or the covariances of a full or tied mixture."""
        return self.covariances if self.matrices else self.variances

    def extra_repr(self) -> str:
        return (
            f"num_components={self.num_components}, num_classes={self.num_classes}, "
            f"covariance_type={self.covariance_type!r}, algorithm={self.algorithm!r}"
        )

    def set_parameters(
        self, *, means: Tensor, variances: Tensor, weights: Tensor, class_prior: Tensor, counts: Tensor | None = None
    ) -> None:
        """Replaces the parameters, in place where the shapes allow it, so that captured CUDA graphs read the new values.

        Args:
            means: ``[C, K, D]``.
            variances: ``[C, K]`` or ``[C, K, D]``, positive; covariances ``[C, D, D]`` (tied) or ``[C, K, D, D]`` (full).
            weights: ``[C, K]``; rows sum to 1.
            class_prior: ``[C]``; sums to 1.
            counts: rows of each component ``[C, K]``; zeros if None.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: a shape or value does not fit.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> mixture = GaussianMixture(num_components=1, covariance_type="spherical")
            >>> one = torch.ones(1, 1)
            >>> mixture.set_parameters(means=torch.zeros(1, 1, 2), variances=one, weights=one, class_prior=one[0])
            >>> mixture.score_samples(torch.zeros(1, 2))
            tensor([-1.8379])
        """
        validate.tensor("means", means, "[C, K, D]", 3)
        C, K, D = self.num_classes, self.num_components, means.shape[2]
        validate.same_shape("means", means, (C, K, D), "[C, K, D]")
        given = {
            "means": (means, (C, K, D)),
            self._spread: (variances, shape_of_spread(self.covariance_type, C, K, D)),
            "weights": (weights, (C, K)),
            "class_prior": (class_prior, (C,)),
            "counts": (weights.new_zeros(C, K) if counts is None else counts, (C, K)),
        }
        for name, (value, shape) in given.items():
            validate.tensor(name, value, str(list(shape)), len(shape))
            validate.same_shape(name, value, shape, "as the mixture was declared")
            _require_values(name, value)
        for name, (value, _) in given.items():
            own = getattr(self, name)
            if own.shape == value.shape:
                own.copy_(value)
            else:
                with torch.inference_mode(False):  # a tensor made in inference mode could never be used in training
                    own = torch.empty(value.shape, device=own.device, dtype=own.dtype)
                setattr(self, name, own.copy_(value.detach()))
        self.mark_fitted()

    def _components(self, labels: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Means, spread and weights per class; those of one class of C K components if there are no labels."""
        if not self.is_fitted:
            raise RuntimeError("this GaussianMixture is not fitted: call fit(x, labels) first")
        spread = self.spread
        if labels is not None or self.num_classes == 1:
            return self.means, spread, self.weights
        joint = (self.class_prior.unsqueeze(1) * self.weights).reshape(1, -1)
        if self.matrices:
            spread = covariance.per_component(spread, self.num_components)
        return self.means.flatten(0, 1).unsqueeze(0), spread.flatten(0, 1).unsqueeze(0), joint

    def _log_joint(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """``log w_k N(x; mu_k, Sigma_k)`` ``[N, K]`` with covariance matrices."""
        means, spread, weights = self._components(labels)
        validate.tensor("x", x, "[N, D]", 2)
        x = x.to(means.dtype)
        validate.features(x, means)
        labels = validate.labels(labels, x.shape[0], means.shape[0], x.device)
        return covariance.log_joint(x, labels, means, spread, weights)

    @numpy_too
    def score_samples(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-likelihood of each row, ``log p(x_n | y_n)``, or ``log p(x_n)`` without labels; differentiable in x.

        Args:
            x: rows ``[N, D]``.
            labels: class of each row ``[N]``, integer, or None.

        Returns:
            Log-likelihoods ``[N]`` in nats.

        Raises:
            RuntimeError: the mixture is not fitted.
            TypeError: an argument has the wrong dtype.
            ValueError: a shape, device or label does not fit.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> mixture = GaussianMixture(num_components=1, reg_covar=0.0).fit(torch.tensor([[-1.0], [1.0]]))
            >>> mixture.score_samples(torch.tensor([[0.0], [2.0]]))
            tensor([-0.9189, -2.9189])
        """
        if self.matrices:
            return self._log_joint(x, labels).logsumexp(1).to(self.means.dtype)
        return mixture_log_prob(x, *self._components(labels), labels=labels)

    def _log_likelihood(self, x: Tensor, labels: Tensor | None, sample_weight: Tensor | None) -> tuple[float, float]:
        """The log-likelihood of all rows, and their number; with sample weights, weighted sums."""
        values = self.score_samples(x, labels).detach().double()
        mass = torch.ones_like(values)
        if sample_weight is not None:
            mass = validate.sample_weight(sample_weight, len(x), x.device).double()
            values = torch.where(mass > 0, values * mass, 0.0)
        everything = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return float(class_totals(values, everything, 1)), float(class_totals(mass, everything, 1))

    @numpy_too
    def score(self, x: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None) -> float:
        """Mean log-likelihood of rows in nats; arguments as ``score_samples``, and sample weights ``[N]``.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> mixture = GaussianMixture(num_components=1, reg_covar=0.0).fit(torch.tensor([[-1.0], [1.0]]))
            >>> round(mixture.score(torch.tensor([[0.0], [2.0]])), 4)
            -1.9189
        """
        total, number = self._log_likelihood(x, labels, sample_weight)
        return total / number

    @numpy_too
    @torch.no_grad()
    def predict(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Component of each row: the nearest mean after k-means, the highest posterior after EM.

        Args:
            x: rows ``[N, D]``.
            labels: class of each row ``[N]``, integer, or None.

        Returns:
            Components ``[N]``, int64: ``k`` within the row's class, or ``c K + k`` without labels.

        Raises:
            RuntimeError: the mixture is not fitted.
            TypeError: an argument has the wrong dtype.
            ValueError: a shape, device or label does not fit, or rows are not finite.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> start = torch.tensor([[[0.0], [10.0]]])
            >>> mixture = GaussianMixture(num_components=2, init=start).fit(torch.tensor([[0.0], [1.0], [10.0], [11.0]]))
            >>> mixture.predict(torch.tensor([[2.0], [9.0]]))
            tensor([0, 1])
        """
        if self.matrices:
            joint = self._log_joint(x, labels)
            validate.finite("x", x)
            return joint.argmax(1)
        means, variances, weights = self._components(labels)
        validate.features(x, means)
        validate.finite("x", x)
        if self.algorithm == "em":
            rule = "posterior"
        else:
            rule = "nearest"
            # components without rows have means, too
            means = means.masked_fill((weights == 0).unsqueeze(-1), math.inf)
        return component_statistics(x, means, labels, variances=variances, weights=weights, assignment=rule).assignment

    @numpy_too
    @torch.no_grad()
    def predict_proba(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Responsibilities ``[N, K]`` within each row's class, or ``[N, C K]`` without labels; arguments as ``score_samples``.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> start = torch.tensor([[[0.0], [10.0]]])
            >>> mixture = GaussianMixture(num_components=2, init=start).fit(torch.tensor([[0.0], [1.0], [10.0], [11.0]]))
            >>> mixture.predict_proba(torch.tensor([[5.5]]))
            tensor([[0.5000, 0.5000]])
        """
        if self.matrices:
            return self._log_joint(x, labels).softmax(1).to(self.means.dtype)
        means, variances, weights = self._components(labels)
        validate.features(x, means)
        labels = validate.labels(labels, x.shape[0], means.shape[0], x.device)
        responsibilities: Tensor = _LOG_PROB(x, means, variances, weights, labels, True)[1]
        return responsibilities

    @torch.no_grad()
    def sample(self, num_samples: int, *, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws rows from ``p(x)``.

        Args:
            num_samples: number n of rows.
            generator: source of randomness.

        Returns:
            Rows ``[n, D]`` and the component ``c K + k`` of each, ``[n]``.

        Raises:
            RuntimeError: the mixture is not fitted.
            TypeError: num_samples is no integer, or the generator is of another kind.
            ValueError: num_samples is below 1.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> mixture = GaussianMixture(num_components=1).fit(torch.tensor([[5.0, 0.0], [5.0, 2.0]]))
            >>> rows, component = mixture.sample(3, generator=torch.Generator().manual_seed(0))
            >>> rows.shape, component
            (torch.Size([3, 2]), tensor([0, 0, 0]))
        """
        require_count("num_samples", num_samples)
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
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
        spread = self.spread.numel()
        if self.matrices:  # symmetric
            spread = spread // D * (D + 1) // 2
        return self.means.numel() + spread + weights

    @numpy_too
    def aic(self, x: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None) -> float:
        """Akaike information criterion of rows, ``2 p - 2 log L``; lower is better; arguments as ``score``.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> x = torch.tensor([[-1.0], [1.0]])
            >>> round(GaussianMixture(num_components=1, reg_covar=0.0).fit(x).aic(x), 4)
            9.6758
        """
        total, _ = self._log_likelihood(x, labels, sample_weight)
        return 2 * self._num_parameters(labels) - 2 * total

    @numpy_too
    def bic(self, x: Tensor, labels: Tensor | None = None, sample_weight: Tensor | None = None) -> float:
        """Bayesian information criterion of rows, ``p log N - 2 log L``; lower is better; arguments as ``score``.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> x = torch.tensor([[-1.0], [1.0]])
            >>> round(GaussianMixture(num_components=1, reg_covar=0.0).fit(x).bic(x), 4)
            7.062
        """
        total, number = self._log_likelihood(x, labels, sample_weight)
        return self._num_parameters(labels) * math.log(number) - 2 * total

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # D is unknown before a fit, so tensors take the shapes of the loaded values if all of them fit
        own = {name: getattr(self, name) for name in self.fitted_tensors}
        if self.accepts(state_dict, prefix):
            for name, value in own.items():
                saved = state_dict[prefix + name]
                setattr(self, name, value if value.shape == saved.shape else value.new_zeros(saved.shape))
            super()._load_from_state_dict(state_dict, prefix, *args)
            if self.is_fitted:
                self.mark_fitted()
        else:
            before = {name: value.clone() for name, value in own.items()}
            super()._load_from_state_dict(state_dict, prefix, *args)
            self.__dict__.update(before)

    def accepts(self, state_dict: dict[str, Any], prefix: str = "") -> bool:
        """Whether a state dict holds a mixture of this many classes and components and of this covariance type."""
        for name in self.fitted_tensors:
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is None or saved.dim() != own.dim():
                return False
            declared = 1 if name == "covariances" and self.covariance_type == "tied" else 2
            if saved.shape[:declared] != own.shape[:declared]:
                return False
        return True
