"""Sufficient statistics of rows about the component means of their own class."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from cem_fast.ops import validate
from cem_fast.ops.autograd import Function, Gradient, call, call_gradient
from cem_fast.ops.library import OPERATORS

ASSIGNMENTS = ("nearest", "posterior")

_FORWARD = OPERATORS["component_statistics_fwd"]
_BACKWARD = OPERATORS["component_statistics_bwd"]


class ComponentStatistics(NamedTuple):
    """Counts ``[C, K]``, scatter ``[C, K]`` or ``[C, K, D]``, assignment ``[N]``, and sums ``[C, K, D]`` if requested.

    Example:
        >>> import torch
        >>> from cem_fast import functional
        >>> counts, scatter, assignment, sums = functional.component_statistics(torch.ones(3, 2), torch.zeros(1, 1, 2))
        >>> counts, scatter, assignment, sums
        (tensor([[3.]]), tensor([[6.]]), tensor([0, 0, 0]), None)
    """

    counts: Tensor
    scatter: Tensor
    assignment: Tensor
    sums: Tensor | None = None


class ScatterGradient(Gradient):
    """``dx_nd = 2 scale g_ck(d) (x_nd - mu_ckd)``; the example of ``component_statistics`` uses it."""

    @staticmethod
    def forward(
        grad_scatter: Tensor,
        scale: Tensor | None,
        x: Tensor,
        means: Tensor,
        labels: Tensor | None,
        assignment: Tensor,
    ) -> Tensor:
        dx: Tensor = _BACKWARD(grad_scatter, scale, x, means, labels, assignment)
        return dx


class _ComponentStatistics(Function):
    @staticmethod
    def forward(
        x: Tensor,
        means: Tensor,
        labels: Tensor | None,
        variances: Tensor | None,
        weights: Tensor | None,
        per_dimension: bool,
        sums: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        counts, scatter, totals, assignment = _FORWARD(x, means, labels, variances, weights, per_dimension, sums)
        return counts, scatter, totals, assignment

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        counts, _, totals, assignment = output
        ctx.mark_non_differentiable(counts, totals, assignment)
        ctx.save_for_backward(*inputs[:3], assignment)

    @staticmethod
    def backward(ctx: Any, _: Tensor, grad_scatter: Tensor, *__: Any) -> tuple[Tensor | None, ...]:
        return (
            call_gradient(ScatterGradient, grad_scatter, None, *ctx.saved_tensors),
            None,
            None,
            None,
            None,
            None,
            None,
        )


def component_statistics(
    x: Tensor,
    means: Tensor,
    labels: Tensor | None = None,
    *,
    variances: Tensor | None = None,
    weights: Tensor | None = None,
    assignment: str = "nearest",
    per_dimension: bool = False,
    sums: bool = False,
) -> ComponentStatistics:
    """Assigns each row to one component of its own class and computes counts and scatter in one pass.

    ``scatter_ck = sum_{n in ck} |x_n - mu_ck|^2``, or the vector of squares per dimension

    Differentiable once, in x through ``scatter``: ``dx_nd = 2 g_ck(d) (x_nd - mu_ckd)``; the assignment is a constant, and
    means, variances and weights get no gradient.

    Args:
        x: features ``[N, D]``; float32 or float64 like the means, or float16/bfloat16 with float32 means.
        means: component means ``[C, K, D]``.
        labels: class of each row ``[N]``, integer; None is allowed for C = 1.
        variances: ``[C, K]`` or ``[C, K, D]``; used by ``assignment="posterior"`` only.
        weights: ``[C, K]``; used by ``assignment="posterior"`` only.
        assignment: ``nearest`` mean (ties go to the lowest index) or highest ``posterior``.
        per_dimension: whether the scatter keeps its dimensions.
        sums: whether to also return ``sum_{n in ck} x_n``, from the same pass.

    Returns:
        ComponentStatistics in the dtype of the means; the assignment is int64.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: a shape, device, label or option does not fit.

    Example:
        >>> import torch
        >>> from cem_fast import functional
        >>> x = torch.tensor([[0.0], [1.0], [9.0]], requires_grad=True)
        >>> found = functional.component_statistics(x, torch.tensor([[[0.0], [10.0]]]))
        >>> found.counts, found.assignment
        (tensor([[2., 1.]]), tensor([0, 0, 1]))
        >>> torch.autograd.grad(found.scatter.sum(), x)[0].flatten()
        tensor([ 0.,  2., -2.])

    Source: Algorithm 1 of Xia et al., CVPR 2025.
    """
    validate.features(x, means)
    labels = validate.labels(labels, x.shape[0], means.shape[0], x.device)
    if assignment not in ASSIGNMENTS:
        raise ValueError(f"assignment must be one of {', '.join(ASSIGNMENTS)}, got {assignment!r}")
    if assignment == "posterior":
        if variances is None or weights is None:
            raise ValueError('assignment="posterior" needs variances and weights, got None')
        validate.spread_and_weights(means, variances, weights)
        validate.normal(variances)
    else:
        variances = weights = None
    fixed = [None if t is None else t.detach() for t in (variances, weights)]
    counts, scatter, totals, assigned = call(
        _ComponentStatistics, x, means.detach(), labels, *fixed, per_dimension, sums
    )
    return ComponentStatistics(counts, scatter, assigned, totals if sums else None)
