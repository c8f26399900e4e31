"""Operators of the ``cem_fast`` namespace: schema, reference kernel and shape rule of each.

Compiled backends override the reference per device through the dispatcher; no other Python code chooses a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cem_fast.ops import reference

LIBRARY = torch.library.Library("cem_fast", "DEF")  # type: ignore[no-untyped-call]

# every argument that a call gives costs the host time, scalars most: those of most losses are left out
_CEM_OPTIONS = (
    "bool official=False, float boost=1.0, bool unbiased=True, bool mean=True, float threshold=0.125, float gamma=0.01"
)
_MIXTURE = "Tensor means, Tensor variances, Tensor weights, Tensor? labels"
_PRIORS = "Tensor variances, Tensor weights, Tensor class_prior, Tensor num_samples, Tensor noise_variance"

SCHEMAS = {
    "mixture_log_prob_fwd": f"(Tensor x, {_MIXTURE}, bool with_responsibilities)"
    " -> (Tensor log_prob, Tensor responsibilities)",
    "mixture_log_prob_bwd": f"(Tensor grad, Tensor x, {_MIXTURE}, Tensor log_prob, Tensor responsibilities) -> Tensor",
    "mixture_moments": f"(Tensor row_weights, Tensor x, {_MIXTURE}, Tensor log_prob, Tensor responsibilities)"
    " -> (Tensor s0, Tensor s1, Tensor s2)",
    "mixture_statistics": f"(Tensor x, {_MIXTURE}) -> (Tensor s0, Tensor s1, Tensor s2, Tensor log_likelihood)",
    "component_statistics_fwd": "(Tensor x, Tensor means, Tensor? labels, Tensor? variances, Tensor? weights,"
    " bool per_dimension, bool sums) -> (Tensor counts, Tensor scatter, Tensor sums, Tensor assignment)",
    "component_statistics_bwd": "(Tensor grad_scatter, Tensor? scale, Tensor x, Tensor means, Tensor? labels,"
    " Tensor assignment) -> Tensor",
    "kmeans": "(Tensor x, Tensor means, Tensor? labels, int max_iter, float tol, bool per_dimension)"
    " -> (Tensor means_out, Tensor counts, Tensor scatter, Tensor iterations, Tensor converged)",
    "expectation_maximization": f"(Tensor x, {_MIXTURE}, int max_iter, float tol, float reg_covar)"
    " -> (Tensor means_out, Tensor variances_out, Tensor weights_out, Tensor counts, Tensor bound, Tensor iterations,"
    " Tensor converged)",
    "entropy_bound": f"(Tensor counts, Tensor scatter, int dimension, {_PRIORS}, {_CEM_OPTIONS})"
    " -> (Tensor value, Tensor grad_scatter)",
    "cem_fwd": f"(Tensor x, Tensor means, Tensor? labels, {_PRIORS}, {_CEM_OPTIONS})"
    " -> (Tensor value, Tensor grad_scatter, Tensor assignment)",
}


def _fake_log_prob_fwd(
    x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, labels: Tensor | None, with_responsibilities: bool
) -> tuple[Tensor, Tensor]:
    N, K = x.shape[0], means.shape[1]
    return means.new_empty(N), means.new_empty(N, K if with_responsibilities else 0)


def _fake_log_prob_bwd(grad: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_moments(row_weights: Tensor, x: Tensor, means: Tensor, variances: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return means.new_empty(means.shape[:2]), means.new_empty(means.shape), variances.new_empty(variances.shape)


def _fake_mixture_statistics(x: Tensor, means: Tensor, variances: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return *_fake_moments(x, x, means, variances), means.new_empty(means.shape[0], dtype=torch.float64)


def _fake_statistics_fwd(
    x: Tensor,
    means: Tensor,
    labels: Tensor | None,
    variances: Tensor | None,
    weights: Tensor | None,
    per_dimension: bool,
    sums: bool,
) -> tuple[Tensor, ...]:
    return (
        means.new_empty(means.shape[:2]),
        means.new_empty(means.shape if per_dimension else means.shape[:2]),
        means.new_empty(means.shape if sums else (0,)),
        x.new_empty(x.shape[0], dtype=torch.int64),
    )


def _fake_statistics_bwd(grad_scatter: Tensor, scale: Tensor | None, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_kmeans(
    x: Tensor, means: Tensor, labels: Tensor | None, max_iter: int, tol: float, per_dimension: bool
) -> tuple[Tensor, ...]:
    return (
        means.new_empty(means.shape),
        means.new_empty(means.shape[:2]),
        means.new_empty(means.shape if per_dimension else means.shape[:2]),
        means.new_empty(means.shape[0], dtype=torch.int64),
        means.new_empty(means.shape[0], dtype=torch.int64),
    )


def _fake_expectation_maximization(
    x: Tensor, means: Tensor, variances: Tensor, weights: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    C, K = weights.shape
    return (
        means.new_empty(means.shape),
        variances.new_empty(variances.shape),
        weights.new_empty(weights.shape),
        means.new_empty((C, K), dtype=torch.float64),
        means.new_empty(C, dtype=torch.float64),
        means.new_empty(C, dtype=torch.int64),
        means.new_empty(C, dtype=torch.int64),
    )


def _fake_entropy_bound(
    counts: Tensor, scatter: Tensor, dimension: int, variances: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return variances.new_empty(()), variances.new_empty(variances.shape)


def _fake_cem_fwd(
    x: Tensor, means: Tensor, labels: Tensor | None, variances: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return variances.new_empty(()), variances.new_empty(variances.shape), x.new_empty(x.shape[0], dtype=torch.int64)


FAKES: dict[str, Callable[..., Any]] = {
    "mixture_log_prob_fwd": _fake_log_prob_fwd,
    "mixture_log_prob_bwd": _fake_log_prob_bwd,
    "mixture_moments": _fake_moments,
    "mixture_statistics": _fake_mixture_statistics,
    "component_statistics_fwd": _fake_statistics_fwd,
    "component_statistics_bwd": _fake_statistics_bwd,
    "kmeans": _fake_kmeans,
    "expectation_maximization": _fake_expectation_maximization,
    "entropy_bound": _fake_entropy_bound,
    "cem_fwd": _fake_cem_fwd,
}

# Operators of fits: the compiled kernels run a whole iteration, or all of them, in one call.
FITS = {"cpu": ("kmeans", "mixture_statistics"), "cuda": ("kmeans", "expectation_maximization")}

# Operators with kernels for every device.
EVERYWHERE = [name for name in SCHEMAS if not any(name in names for names in FITS.values())]
ON_CUDA = [*EVERYWHERE, *FITS["cuda"]]

# Operators that run all iterations of a fit, and the types of devices where fits call them; ``ops/backend.py`` adds to it.
WHOLE_FITS = {("kmeans", "cpu")}

OPERATORS: dict[str, torch._ops.OpOverload] = {}


def define(library: torch.library.Library, name: str) -> None:
    """Defines an operator, with its shape rule, in a library.

    Example:
        >>> import torch
        >>> from cem_fast.ops import library
        >>> scratch = torch.library.Library("cem_fast_example", "DEF")
        >>> library.define(scratch, "mixture_moments")
        >>> torch.ops.cem_fast_example.mixture_moments.default
        <OpOverload(op='cem_fast_example.mixture_moments', overload='default')>
    """
    library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{library.ns}::{name}", FAKES[name], lib=library)


def register(name: str, kernel: Callable[..., Any], dispatch_key: str) -> None:
    """Registers a kernel of an operator for a kind of tensors.

    Example:
        >>> from cem_fast.ops import library, reference
        >>> library.register("mixture_moments", reference.mixture_moments, "MTIA")
    """
    LIBRARY.impl(name, kernel, dispatch_key)  # type: ignore[no-untyped-call]


for _name in SCHEMAS:
    define(LIBRARY, _name)
    register(_name, getattr(reference, _name), "CompositeExplicitAutograd")
    # the overload itself: resolving it at every call costs as much as a small batch
    OPERATORS[_name] = getattr(torch.ops.cem_fast, _name).default
