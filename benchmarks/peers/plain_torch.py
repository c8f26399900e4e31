"""The operations in plain torch: eager, compiled, as matrix products, by ``torch.distributions``, and the released loop."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from cem_fast.benchmarks import released
from cem_fast.benchmarks.cases import NOISE_STD, Problem
from cem_fast.benchmarks.peers.adapters import Built, Differentiable, Function, Skipped, by_class
from torch import Tensor

LARGEST_BYTES = 1 << 30  # of an N x K x D intermediate
PADDING = 16  # matrix products run on multiples of this many components


def eager(problem: Problem) -> Built:
    """Gather and reductions with an ``N x K x D`` intermediate."""
    _require_memory(problem.case.N, problem)
    return Differentiable(problem, _eager(problem))


def compiled(problem: Problem) -> Built:
    """The eager code under ``torch.compile``."""
    torch._dynamo.reset()
    return Differentiable(problem, torch.compile(_eager(problem), dynamic=False))


def _eager(problem: Problem) -> Function:
    if problem.case.op == "mixture_log_prob":
        mixture = (problem.means, problem.variances, problem.weights)
        return lambda x, labels: log_prob(x, labels, *mixture)
    return vectorized(problem, lambda x, y: nearest(x, y, problem.means))


def _require_memory(rows: int, problem: Problem) -> None:
    size = 4 * rows * problem.case.K * problem.case.D
    if size > LARGEST_BYTES:
        raise Skipped(f"needs intermediates of {size / 2**30:.1f} GiB")


def class_of_rows(labels: Tensor | None, x: Tensor) -> Tensor:
    """Class of each row ``[N]``; 0 everywhere without labels."""
    return torch.zeros(len(x), dtype=torch.int64, device=x.device) if labels is None else labels


def log_prob(x: Tensor, labels: Tensor | None, means: Tensor, variances: Tensor, weights: Tensor) -> Tensor:
    """Log-density of each row in the mixture of its class ``[N]``."""
    y = class_of_rows(labels, x)
    v = variances if variances.dim() == 3 else variances.unsqueeze(-1).expand_as(means)
    exponent = ((x.to(means.dtype)[:, None] - means[y]).square() / v[y]).sum(-1)
    constant = weights.log() - 0.5 * torch.log(2 * math.pi * v).sum(-1)
    return torch.logsumexp(constant[y] - 0.5 * exponent, 1)


def nearest(x: Tensor, labels: Tensor, means: Tensor) -> Tensor:
    """Index of the nearest mean of each row's class ``[N]``."""
    return (x[:, None] - means[labels]).square().sum(-1).argmin(1)


def batch_statistics(
    x: Tensor, labels: Tensor | None, means: Tensor, nearest: Callable[[Tensor, Tensor], Tensor], diag: bool
) -> tuple[Tensor, Tensor]:
    """Counts ``[C, K]`` and scatter ``[C, K]`` or ``[C, K, D]`` about the nearest means, by gather and ``index_add``."""
    C, K, D = means.shape
    x, y = x.to(means.dtype), class_of_rows(labels, x)
    index = y * K + nearest(x.detach(), y)
    square = (x - means.reshape(C * K, D)[index]).square()
    square = square if diag else square.sum(1)
    scatter = square.new_zeros(C * K, *square.shape[1:]).index_add(0, index, square)
    counts = square.new_zeros(C * K).index_add(0, index, square.new_ones(len(x)))
    return counts.view(C, K), scatter.view(C, K, *square.shape[1:])


def paper_bound(counts: Tensor, scatter: Tensor, rows: int, D: int, problem: Problem) -> Tensor:
    """Eq. 5-7 of the paper per feature, with the gradient of a minibatch of Eq. 7."""
    total, s2 = problem.num_samples.to(counts.dtype), problem.noise_variance.to(counts.dtype)
    scatter = scatter.detach() + (total / rows) * (scatter - scatter.detach())
    mass = problem.class_prior[:, None] * problem.weights * (total - rows) + counts
    blend, pi, n = counts / mass, mass / total, counts.clamp_min(1)
    if scatter.dim() == 2:
        v = (1 - blend) * problem.variances + blend * scatter / (n * D)
        entropy = 0.5 * D * torch.log((v + s2) / s2)
    else:
        v = (1 - blend)[..., None] * problem.variances + blend[..., None] * scatter / n[..., None]
        entropy = 0.5 * torch.log((v + s2) / s2).sum(-1)
    return (pi * (entropy - pi.log())).sum() / D


def released_bound(counts: Tensor, scatter: Tensor, D: int, problem: Problem) -> Tensor:
    """The hinge of the released code, vectorized."""
    C, n = len(counts), counts.clamp_min(1)
    blend = released.BOOST * counts / (problem.weights * (problem.num_samples / C).to(counts.dtype))
    blend = torch.where(blend < 1, blend, 0.99)
    v = (1 - blend) * problem.variances + blend * scatter / (n * D)
    floor = math.log(released.THRESHOLD * NOISE_STD**2 + released.GAMMA)
    hinge = torch.relu(torch.log(v + released.GAMMA) - floor) * problem.weights * (counts > 0)
    return hinge.sum() / (counts.sum(1) > 0).sum()


def vectorized(problem: Problem, nearest: Callable[[Tensor, Tensor], Tensor]) -> Function:
    """Component statistics or a bound from them, given the search for the nearest means."""
    case, means = problem.case, problem.means

    def function(x: Tensor, labels: Tensor | None) -> Tensor:
        counts, scatter = batch_statistics(x, labels, means, nearest, case.diag)
        if case.op == "component_statistics":
            return scatter
        if case.op == "cem_paper":
            return paper_bound(counts, scatter, case.N, case.D, problem)
        return released_bound(counts, scatter, case.D, problem)

    return function


def padded(components: Tensor, value: float = 0.0) -> Tensor:
    """Rows ``[K, ...]`` padded to a multiple of ``PADDING``."""
    extra = -len(components) % PADDING
    return torch.cat([components, components.new_full((extra, *components.shape[1:]), value)])


def segmented_gemm(problem: Problem) -> Built:
    """``(x - mu)^2 / v`` as a product of ``[x^2, x]`` with ``[1 / v, -2 mu / v]`` per class, about the mean of the means."""
    means = problem.means
    center = means.mean((0, 1))

    def nearest_of(mu: Tensor) -> Callable[[Tensor], Tensor]:
        product, constant = padded(mu - center).T.contiguous(), padded(0.5 * (mu - center).square().sum(1), math.inf)
        return lambda rows: (constant - (rows - center) @ product).argmin(1)

    def log_prob_of(mu: Tensor, v: Tensor, w: Tensor) -> Callable[[Tensor], Tensor]:
        v, mu = v if v.dim() == 2 else v[:, None].expand_as(mu), mu - center
        constant = padded(w.log() - 0.5 * (mu.square() / v + torch.log(2 * math.pi * v)).sum(1), -math.inf)
        squares, products = padded(-0.5 / v).T.contiguous(), padded(mu / v).T.contiguous()

        def log_prob(rows: Tensor) -> Tensor:
            rows = rows.to(mu.dtype) - center
            return torch.logsumexp(rows.square() @ squares + rows @ products + constant, 1)

        return log_prob

    if problem.case.op == "mixture_log_prob":
        function = by_class([log_prob_of(*one) for one in zip(means, problem.variances, problem.weights)])
    else:
        function = vectorized(problem, by_class([nearest_of(mu) for mu in means]))
    return Differentiable(problem, function)


def mixture_same_family(problem: Problem) -> Built:
    """``torch.distributions.MixtureSameFamily``, one per class."""
    from torch import distributions as d

    _require_memory(problem.case.N // problem.case.C, problem)
    v = problem.variances if problem.case.diag else problem.variances.unsqueeze(-1).expand_as(problem.means)
    families = [
        d.MixtureSameFamily(
            d.Categorical(weights, validate_args=False),
            d.Independent(d.Normal(means, scales, validate_args=False), 1, validate_args=False),
            validate_args=False,
        )
        for means, scales, weights in zip(problem.means, v.sqrt(), problem.weights)
    ]
    return Differentiable(problem, by_class([family.log_prob for family in families]))


def released_loop(problem: Problem) -> Built:
    """The loss of the released script, loop by loop."""
    mixture = (problem.means, problem.variances, problem.weights, float(problem.num_samples), NOISE_STD)
    return Differentiable(problem, lambda x, labels: released.loss(x, class_of_rows(labels, x), *mixture))
