"""Differentiable estimate of the conditional entropy bound, for one training step."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cem_fast._support.counts import require_number
from cem_fast.ops import validate
from cem_fast.ops.autograd import FirstOutput, call_first, call_gradient, is_transformed
from cem_fast.ops.component_statistics import ScatterGradient
from cem_fast.ops.library import OPERATORS

VARIANTS = ("paper", "official")
GRADIENTS = ("unbiased", "literal")
REDUCTIONS = ("mean", "sum")
COVARIANCES = ("spherical", "diag")

# The released code blends ten times the batch's share into the fitted variances; the paper's Eq. 6 blends once.
DEFAULT_BOOST = {"paper": 1.0, "official": 10.0}


_FORWARD = OPERATORS["cem_fwd"]
_STATISTICS = OPERATORS["component_statistics_fwd"]
_BOUND = OPERATORS["entropy_bound"]
_BACKWARD = OPERATORS["component_statistics_bwd"]


class BoundOptions(NamedTuple):
    """Options of the bound, in the form and order that the operators take.

    Example:
        >>> from cem_fast.ops.entropy_bound import bound_options
        >>> bound_options("paper", "unbiased", "mean", None, 0.125, 0.01, False, False)
        BoundOptions(official=False, boost=1.0, unbiased=True, mean=True, threshold=0.125, gamma=0.01)
    """

    official: bool = False
    boost: float = 1.0
    unbiased: bool = True
    mean: bool = True
    threshold: float = 0.125
    gamma: float = 0.01

    def arguments(self) -> tuple[Any, ...]:
        """Returns the options up to the last one that differs from the operators' default.

        Example:
            >>> from cem_fast.ops.entropy_bound import BoundOptions
            >>> BoundOptions().arguments(), BoundOptions(boost=2.0).arguments()
            ((), (False, 2.0))
        """
        given = len(self)
        while given > 0 and self[given - 1] == _DEFAULTS[given - 1]:
            given -= 1
        return self[:given]


_DEFAULTS = BoundOptions()


class _EntropyBound(FirstOutput):
    """One operator forward, one backward; with a process group, the statistics are summed over its ranks.

    ``priors`` are variances, weights, class_prior, num_samples and noise_variance; they and the means are detached.
    """

    @staticmethod
    def forward(
        x: Tensor,
        labels: Tensor | None,
        means: Tensor,
        priors: tuple[Tensor, ...],
        options: tuple[Any, ...],
        group: torch.distributed.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if group is None:
            value, slope, assignment = _FORWARD(x, means, labels, *priors, *options)
            return value, slope, assignment
        counts, scatter, _, assignment = _STATISTICS(x, means, labels, None, None, priors[0].dim() == 3, False)
        statistics = torch.cat([counts.flatten(), scatter.flatten()])
        torch.distributed.all_reduce(statistics, group=group)
        counts, scatter = (
            part.view_as(like)
            for part, like in zip(torch.split(statistics, [counts.numel(), scatter.numel()]), (counts, scatter))
        )
        value, slope = _BOUND(counts, scatter, means.shape[2], *priors, *options)
        # data-parallel training averages gradients over ranks; every rank already holds its share of the sum
        return value, slope * torch.distributed.get_world_size(group), assignment

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, slope, assignment = output
        x, labels, means = inputs[:3]
        ctx.save_for_backward(slope, x, means, labels, assignment)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        slope, *rows = ctx.saved_tensors
        return call_gradient(ScatterGradient, slope, grad, *rows), None, None, None, None, None


class _Step(torch.autograd.Function):
    """``_EntropyBound`` of one process in eager mode, with few calls: a GPU waits for the host here.

    ``rest`` are the other arguments of the operator; torch looks at each argument of a function, but not into a tuple.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rest: tuple[Any, ...]) -> Tensor:
        value: Tensor
        value, slope, assignment = _FORWARD(x, *rest)
        ctx.save_for_backward(slope, x, rest[0], rest[1], assignment)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _EntropyBound.backward(ctx, grad)[:2]
        slope, x, means, labels, assignment = ctx.saved_tensors
        return _BACKWARD(slope, grad, x, means, labels, assignment), None


def evaluate(
    x: Tensor,
    labels: Tensor | None,
    means: Tensor,
    priors: tuple[Tensor, ...],
    options: tuple[Any, ...],
    group: torch.distributed.ProcessGroup | None,
) -> Tensor:
    """Bound of validated arguments; only the range of the labels is checked here.

    A label out of range makes the bound NaN, which is an error if it can be read without waiting for the device.
    ``conditional_entropy_bound`` has an example.
    """
    if group is None and not is_transformed():
        return evaluate_step(x, labels, means, priors, options)
    return _of_labels_in_range(call_first(_EntropyBound, x, labels, means, priors, options, group), labels, means)


def evaluate_step(
    x: Tensor, labels: Tensor | None, means: Tensor, priors: tuple[Tensor, ...], options: tuple[Any, ...]
) -> Tensor:
    """``evaluate`` of one process where torch does not transform the code."""
    value: Tensor = _Step.apply(x, (means, labels, *priors, *options))
    return _of_labels_in_range(value, labels, means)


def _of_labels_in_range(value: Tensor, labels: Tensor | None, means: Tensor) -> Tensor:
    if labels is not None and validate.is_readable(value) and math.isnan(value.item()):
        validate.label_range(labels, means.shape[0])
    return value


def conditional_entropy_bound(
    x: Tensor,
    means: Tensor,
    variances: Tensor,
    weights: Tensor,
    class_prior: Tensor,
    labels: Tensor | None = None,
    *,
    num_samples: Tensor,
    noise_variance: Tensor,
    variant: str = "paper",
    gradient: str = "unbiased",
    reduction: str = "mean",
    boost: float | None = None,
    threshold: float = 0.125,
    gamma: float = 0.01,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Estimate of the paper's upper bound on the information in released features, from one batch.

    ``L_C = sum_ck pi_ck ( -log pi_ck + 1/2 sum_d log((v_ckd + s2) / s2) )`` with the batch blended into pi and v

    Differentiable once, in x only. ``gradient="unbiased"`` gives ``dx = (x - mu) / (N_b (v' + s2))``, the minibatch gradient
    of Eq. 7; ``"literal"`` differentiates Eq. 5-7 as printed, which is ``N_b / N`` times that.

    Args:
        x: clean features ``[N_b, D]``; float32 or float64 like the means, or float16/bfloat16 with float32 means.
        means: fitted means ``[C, K, D]``.
        variances: fitted variances ``[C, K]`` or ``[C, K, D]``.
        weights: fitted mixture weights ``[C, K]``.
        class_prior: class frequencies ``[C]``.
        labels: class of each row ``[N_b]``, integer; None is allowed for C = 1.
        num_samples: size N of the training set, a 0-dim tensor.
        noise_variance: variance s2 of the noise added to the features, ``[1]`` or ``[D]``, float64.
        variant: ``paper`` (Eq. 5-7) or ``official`` (the authors' released code, spherical variances and scalar noise only).
        gradient: ``unbiased`` or ``literal``; the official variant always has its plain gradient.
        reduction: ``mean`` divides by D (nats per feature), ``sum`` is Eq. 7 in nats.
        boost: factor on the batch's share in the blend; None is 1 for ``paper`` and 10 for ``official``.
        threshold: share of the noise variance below which the official variant stops shrinking a variance.
        gamma: offset inside the official variant's logarithms.
        process_group: torch.distributed group over which the batch statistics are summed.

    Returns:
        The bound, a scalar in the dtype of the means.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: a shape, device, label or option does not fit.

    Example:
        >>> import torch
        >>> from cem_fast import functional
        >>> x = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], requires_grad=True)
        >>> bound = functional.conditional_entropy_bound(
        ...     x,
        ...     means=torch.zeros(1, 1, 2),
        ...     variances=torch.ones(1, 1),
        ...     weights=torch.ones(1, 1),
        ...     class_prior=torch.ones(1),
        ...     num_samples=torch.tensor(2.0),
        ...     noise_variance=torch.ones(1, dtype=torch.float64),
        ... )
        >>> bound.item(), torch.autograd.grad(bound, x)[0].tolist()  # 1/2 log 2; x / (2 rows * (1 + 1)) / 2 features
        (0.3465735912322998, [[-0.125, 0.125], [0.125, -0.125]])

    Source: Eq. 5-7 and Algorithm 1 of Xia et al., CVPR 2025.
    """
    validate.features(x, means)
    validate.spread_and_weights(means, variances, weights)
    labels = validate.integer_labels(labels, x.shape[0], means.shape[0], x.device)
    validate.tensor("class_prior", class_prior, "[C]", 1)
    validate.same_shape("class_prior", class_prior, tuple(means.shape[:1]), "[C]")
    if class_prior.dtype != means.dtype:
        raise TypeError(f"class_prior must be {means.dtype} like the means, got {class_prior.dtype}")
    validate.tensor("num_samples", num_samples, "[]", 0)
    if num_samples.dtype not in (*validate.PARAMETER_DTYPES, torch.int64):
        raise TypeError(f"num_samples must be float32, float64 or int64, got {num_samples.dtype}")
    validate.noise_variance(noise_variance, means.shape[2])
    for name, value in (("class_prior", class_prior), ("num_samples", num_samples), ("noise_variance", noise_variance)):
        validate.same_device(name, value, x.device)
    per_dimension = variances.dim() == 3, noise_variance.shape[0] > 1
    options = bound_options(variant, gradient, reduction, boost, threshold, gamma, *per_dimension)
    priors = tuple(t.detach() for t in (variances, weights, class_prior, num_samples, noise_variance))
    return evaluate(x, labels, means.detach(), priors, options, process_group)


def bound_options(
    variant: str,
    gradient: str,
    reduction: str,
    boost: float | None,
    threshold: float,
    gamma: float,
    per_dimension: bool,
    noise_per_dimension: bool,
) -> BoundOptions:
    """Checks options and puts them into the form that the operators take; ``BoundOptions`` has an example.

    Raises:
        ValueError: an option has an unknown value, or two options exclude each other.
    """
    for name, choice, allowed in (
        ("variant", variant, VARIANTS),
        ("gradient", gradient, GRADIENTS),
        ("reduction", reduction, REDUCTIONS),
    ):
        if choice not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {choice!r}")
    boost = DEFAULT_BOOST[variant] if boost is None else boost
    for name, value in (("boost", boost), ("threshold", threshold), ("gamma", gamma)):
        if not 0 < require_number(name, value) < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if variant == "official":
        if per_dimension:
            raise ValueError('variant="official" is defined for spherical variances only, got per-dimension ones')
        if noise_per_dimension:
            raise ValueError('variant="official" is defined for one noise_std only, got one per dimension')
        if reduction != "mean":
            raise ValueError(
                f'variant="official" is per feature by definition: reduction must be mean, got {reduction!r}'
            )
    return BoundOptions(
        variant == "official", float(boost), gradient == "unbiased", reduction == "mean", float(threshold), float(gamma)
    )
