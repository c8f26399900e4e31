"""Comparison of operators with the reference, which runs in float64 on the CPU, on small problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from cem_fast.ops import reference

# Largest allowed difference from the float64 reference, relative to the output's largest value, by the features' dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}

# Rows, dimensions and size of the training set. GPU kernels have other versions for aligned sizes, for dimensions that fit one tile
# and for many rows, and other ways to find the rows of a class.
SIZES = [(259, 67, 1000.0), (259, 64, 1000.0), (600, 512, 168.0), (8300, 16, 50_000.0)]
CLASSES, COMPONENTS = 7, 3


def names() -> list[str]:
    """Names of the operators that can be compared.

    Example:
        >>> from cem_fast.ops import agreement
        >>> agreement.names()[:2]
        ['mixture_log_prob_fwd', 'mixture_log_prob_bwd']
    """
    generator = torch.Generator().manual_seed(0)
    return list(dict.fromkeys(name for name, _ in _labeled(torch.float32, 1, 1, 1.0, generator)))


def error(name: str, operator: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> float:
    """Largest difference of an operator's outputs from the reference, relative to the largest value of the same output.

    Args:
        name: name of the operator.
        operator: implementation to compare.
        dtype: dtype of the features; half types come with float32 parameters.
        device: device to run the implementation on.

    Returns:
        The difference; infinite if shapes, NaNs or integers differ.

    Example:
        >>> import torch
        >>> from cem_fast.ops import agreement, reference
        >>> agreement.error("kmeans", reference.kmeans, torch.float64, torch.device("cpu"))
        0.0
    """
    worst = 0.0
    for of_case, arguments in _cases(dtype):
        if of_case != name:
            continue
        found = _tuple(operator(*(a.to(device) if isinstance(a, Tensor) else a for a in arguments)))
        expected = _tuple(getattr(reference, name)(*(_exact(a) for a in arguments)))
        worst = max(worst, *(_difference(a.cpu(), b) for a, b in zip(found, expected, strict=True)))
    return worst


@lru_cache(maxsize=1)  # all operators are usually compared with one dtype before the next
def _cases(feature_dtype: torch.dtype) -> list[tuple[str, list[Any]]]:
    """Operators with arguments, spherical and diagonal; half features come with float32 parameters."""
    generator = torch.Generator().manual_seed(0)
    labeled = [case for N, D, samples in SIZES for case in _labeled(feature_dtype, N, D, samples, generator)]
    return [*labeled, *_one_class(feature_dtype, 259, 64, generator), *_one_class(feature_dtype, 40, 67, generator)]


def _labeled(
    feature_dtype: torch.dtype, N: int, D: int, samples: float, generator: torch.Generator
) -> Iterator[tuple[str, list[Any]]]:
    """Rows of several classes, of which one has none."""
    dtype = torch.promote_types(feature_dtype, torch.float32)
    C, K = CLASSES, COMPONENTS

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(C - 1, (N,), generator=generator)
    means = uniform(C, K, D).to(dtype)
    x = (means[labels, 0].double() + 0.3 * uniform(N, D)).to(feature_dtype)
    weights, prior = (uniform(C, K) + 0.5, uniform(C) + 0.5)
    weights, prior = (weights / weights.sum(1, keepdim=True)).to(dtype), (prior / prior.sum()).to(dtype)
    num_samples, noise_variance = torch.tensor(samples, dtype=torch.float64), torch.tensor([0.01], dtype=torch.float64)
    for diagonal in (False, True):
        variances = (0.05 + 0.1 * uniform(C, K, D if diagonal else 1)).to(dtype)
        variances = variances if diagonal else variances[:, :, 0].contiguous()
        mixture: list[Any] = [x, means, variances, weights, labels]
        yield "mixture_log_prob_fwd", [*mixture, True]
        log_prob, responsibilities = reference.mixture_log_prob_fwd(*map(_exact, [*mixture, True]))
        kept = [log_prob.to(dtype), responsibilities.to(dtype)]
        yield "mixture_log_prob_bwd", [uniform(N).to(dtype), *mixture, *kept]
        yield "mixture_moments", [uniform(N).to(dtype), *mixture, *kept]
        yield "mixture_statistics", mixture
        yield "component_statistics_fwd", [x, means, labels, variances, weights, diagonal, True]
        counts, scatter, _, assignment = reference.component_statistics_fwd(
            x, means, labels, None, None, diagonal, False
        )
        yield "kmeans", [x, means, labels, 3, 1e-4, diagonal]
        wide = variances.clone()  # posteriors that underflow would differ by type
        wide[:-1] += D**0.5  # but of the class without rows, which keeps them: they would hide errors of smaller ones
        yield "expectation_maximization", [x, means, wide, weights, labels, 2, 1e-4, 1e-3]
        yield "component_statistics_bwd", [uniform(*scatter.shape).to(dtype), None, x, means, labels, assignment]
        priors = [variances, weights, prior, num_samples, noise_variance]
        for official in (False, True)[: 1 if diagonal else 2]:
            options = [official, 10.0 if official else 1.0, True, True, 0.125, 0.01]
            yield "entropy_bound", [counts.to(dtype), scatter.to(dtype), D, *priors, *options]
            yield "cem_fwd", [x, means, labels, *priors, *options]


def _one_class(
    feature_dtype: torch.dtype, N: int, D: int, generator: torch.Generator
) -> Iterator[tuple[str, list[Any]]]:
    """One class with many components, which have kernels of their own on GPUs."""
    dtype, K = torch.promote_types(feature_dtype, torch.float32), 130

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    means, weights = uniform(1, K, D).to(dtype), torch.full((1, K), 1 / K, dtype=dtype)
    x = (means[0, torch.randint(K, (N,), generator=generator)].double() + 0.3 * uniform(N, D)).to(feature_dtype)
    for diagonal in (False, True):
        variances = (0.05 + 0.1 * uniform(1, K, D)).to(dtype)
        variances = variances if diagonal else variances[:, :, 0].contiguous()
        mixture = [x, means, variances, weights, None]
        yield "mixture_log_prob_fwd", [*mixture, False]
        log_prob, _ = reference.mixture_log_prob_fwd(*map(_exact, [*mixture, False]))
        log_prob = log_prob.to(dtype)
        yield "mixture_log_prob_bwd", [uniform(N).to(dtype), *mixture, log_prob, x.new_empty(N, 0, dtype=dtype)]
        if D % 16 == 0:  # others have no kernel of their own for it
            yield "mixture_moments", [uniform(N).to(dtype), *mixture, log_prob, x.new_empty(N, 0, dtype=dtype)]


def _exact(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    if not expected.is_floating_point():
        return 0.0 if torch.equal(found, expected) else float("inf")
    if expected.numel() == 0:
        return 0.0
    error = float((found.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return error if error == error else float("inf")
