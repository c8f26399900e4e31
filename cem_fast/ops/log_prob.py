"""Log-likelihood of rows under the Gaussian mixture of their own class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cem_fast.ops import validate
from cem_fast.ops.autograd import FirstOutput, Gradient, call_first, call_gradient
from cem_fast.ops.library import OPERATORS

# Up to this many components the forward keeps the responsibilities [N, K]; beyond, the backward recomputes them.
MAX_KEPT_COMPONENTS = 64

_FORWARD = OPERATORS["mixture_log_prob_fwd"]
_BACKWARD = OPERATORS["mixture_log_prob_bwd"]
_MOMENTS = OPERATORS["mixture_moments"]


class _FeatureGradient(Gradient):
    @staticmethod
    def forward(
        grad: Tensor,
        x: Tensor,
        means: Tensor,
        variances: Tensor,
        weights: Tensor,
        labels: Tensor | None,
        log_prob: Tensor,
        responsibilities: Tensor,
    ) -> Tensor:
        return _BACKWARD(grad, x, means, variances, weights, labels, log_prob, responsibilities)


class _Moments(Gradient):
    @staticmethod
    def forward(
        row_weights: Tensor,
        x: Tensor,
        means: Tensor,
        variances: Tensor,
        weights: Tensor,
        labels: Tensor | None,
        log_prob: Tensor,
        responsibilities: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _MOMENTS(row_weights, x, means, variances, weights, labels, log_prob, responsibilities)


class _MixtureLogProb(FirstOutput):
    @staticmethod
    def forward(
        x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, labels: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        return _FORWARD(x, means, variances, weights, labels, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        log_prob, responsibilities = output
        ctx.mark_non_differentiable(responsibilities)
        ctx.save_for_backward(*inputs[:5], log_prob, responsibilities)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        dx = dmeans = dvariances = dweights = None
        if ctx.needs_input_grad[0]:
            dx = call_gradient(_FeatureGradient, grad, *saved)
        if any(ctx.needs_input_grad[1:4]):
            _, means, variances, weights = saved[:4]
            s0, s1, s2 = call_gradient(_Moments, grad, *saved)
            if variances.dim() == 3:
                dmeans = s1 / variances
                dvariances = 0.5 * (s2 / variances - s0.unsqueeze(-1)) / variances
            else:
                dmeans = s1 / variances.unsqueeze(-1)
                dvariances = 0.5 * (s2 / variances - means.shape[2] * s0) / variances
            dweights = torch.where(weights > 0, s0 / weights, 0.0)
        return dx, dmeans, dvariances, dweights, None, None


def mixture_log_prob(
    x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, labels: Tensor | None = None
) -> Tensor:
    """Log-likelihood of each row under the Gaussian mixture of its own class.

    ``log p(x_n | c = y_n) = logsumexp_k( log w_ck - 1/2 sum_d [ (x_nd - mu_ckd)^2 / v_ckd + log(2 pi v_ckd) ] )``

    Differentiable once, in x, means, variances and weights; a component of weight 0 takes no part, its gradients are 0.
    A label out of range is a ValueError in eager CPU calls and gives NaN elsewhere (checking would wait for the device).

    Args:
        x: features ``[N, D]``; float32 or float64 like the means, or float16/bfloat16 with float32 means.
        means: component means ``[C, K, D]``.
        variances: ``[C, K]`` (spherical) or ``[C, K, D]`` (diag), positive, in squared units of x.
        weights: mixture weights ``[C, K]``; rows sum to 1.
        labels: class of each row ``[N]``, integer; None is allowed for C = 1.

    Returns:
        Log-likelihoods ``[N]`` in nats, in the dtype of the means.

    Raises:
        TypeError: an argument is no tensor or has the wrong dtype.
        ValueError: a shape, device or label does not fit.

    Source: the mixture of Xia et al., "Theoretical Insights in Model Inversion Robustness and Conditional Entropy
    Maximization for Collaborative Inference Systems", CVPR 2025, Theorem 2.
    """
    validate.features(x, means)
    validate.spread_and_weights(means, variances, weights)
    labels = validate.labels(labels, x.shape[0], means.shape[0], x.device)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, means, variances, weights))
    keep = wanted and means.shape[1] <= MAX_KEPT_COMPONENTS
    return call_first(_MixtureLogProb, x, means, variances, weights, labels, keep)
