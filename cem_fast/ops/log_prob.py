"""Log-likelihood of rows under the Gaussian mixture of their class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cem_fast.ops import validate
from cem_fast.ops.autograd import FirstOutput, Gradient, call_first, call_gradient
from cem_fast.ops.library import OPERATORS

# Up to this many components, the forward keeps the responsibilities [N, K]; with more, the backward recomputes them.
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
        dx: Tensor = _BACKWARD(grad, x, means, variances, weights, labels, log_prob, responsibilities)
        return dx


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
        s0, s1, s2 = _MOMENTS(row_weights, x, means, variances, weights, labels, log_prob, responsibilities)
        return s0, s1, s2


class _MixtureLogProb(FirstOutput):
    @staticmethod
    def forward(
        x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, labels: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor]:
        log_prob, responsibilities = _FORWARD(x, means, variances, weights, labels, keep)
        return log_prob, responsibilities

    @staticmethod
    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        log_prob, responsibilities = output
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
    """Log-likelihood of each row under the Gaussian mixture of its class.

    ``log p(x_n | c = y_n) = logsumexp_k( log w_ck - 1/2 sum_d [ (x_nd - mu_ckd)^2 / v_ckd + log(2 pi v_ckd) ] )``

    Differentiable once, in x, means, variances and weights. A component of weight 0 contributes nothing, and its gradients are 0.
    A label out of range is a ValueError in eager CPU calls and gives NaN elsewhere, where a check would wait for the device.

    Args:
        x: features ``[N, D]``; float32 or float64 like the means, or float16/bfloat16 with float32 means.
        means: component means ``[C, K, D]``.
        variances: ``[C, K]`` (spherical) or ``[C, K, D]`` (diag), positive, in squared units of x.
        weights: mixture weights ``[C, K]``; rows sum to 1.
        labels: class of each row ``[N]``, integer; None is allowed for C = 1.

    Returns:
        Log-likelihoods ``[N]`` in nats, in the dtype of the means.

    Raises:
        TypeError: an argument is not a tensor or has the wrong dtype.
        ValueError: a shape, device or label does not fit.

    Example:
        >>> import torch
        >>> from cem_fast import functional
        >>> x = torch.tensor([[1.0], [2.0]], requires_grad=True)
        >>> one = torch.ones(1, 1)
        >>> log_prob = functional.mixture_log_prob(x, torch.zeros(1, 1, 1), variances=one, weights=one)
        >>> log_prob.detach(), torch.autograd.grad(log_prob.sum(), x)[0].flatten()
        (tensor([-1.4189, -2.9189]), tensor([-1., -2.]))

    Source: the mixture of Xia et al., "Theoretical Insights in Model Inversion Robustness and Conditional Entropy
    Maximization for Collaborative Inference Systems", CVPR 2025, Theorem 2.
    """
    validate.features(x, means)
    validate.spread_and_weights(means, variances, weights)
    validate.normal(variances)
    labels = validate.labels(labels, x.shape[0], means.shape[0], x.device)
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, means, variances, weights))
    keep = wanted and means.shape[1] <= MAX_KEPT_COMPONENTS
    log_prob: Tensor = call_first(_MixtureLogProb, x, means, variances, weights, labels, keep)
    return log_prob
