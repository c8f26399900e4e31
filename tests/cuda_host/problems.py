"""Problems for the CUDA kernels on the host, and what the float64 reference makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from support.definitions import draw
from support.tolerances import RELATIVE
from torch import Tensor

from cem_fast.ops import library, reference

# N, D, C, K: one of each; a second tile; long segments; a chunk and a bit; shares of the dimensions; more classes than rows;
# many components; rows of 16 bytes and their multiples, short and long; more classes than
# fit shared memory; none
SHAPES = [
    (1, 1, 1, 1),
    (37, 3, 4, 5),
    (70, 65, 2, 9),
    (40, 641, 2, 3),
    (5, 70, 11, 2),
    (7, 31, 1, 34),
    (600, 5, 1, 2),
    (75, 64, 3, 5),
    (34, 648, 2, 3),
    (90, 6, 12, 2),
    (0, 5, 2, 3),
]

# One class without labels: tiles of rows, components and dimensions, with rows of 16 bytes or not; few of them
GLOBAL_SHAPES = [(150, 37, 1, 70), (9, 64, 1, 33), (7, 31, 1, 34)]


FITS = library.FITS["cuda"]


class Problem(NamedTuple):
    name: str
    arguments: list[Any]


def exact(arguments: list[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def expected(problem: Problem) -> tuple[Tensor, ...]:
    results = getattr(reference, problem.name)(*exact(problem.arguments))
    return (results,) if isinstance(results, Tensor) else results


def allowed(problem: Problem, result: Tensor) -> float:
    """Allowed error of a result; a fit computes in the type of its parameters, and reports some of it in float64."""
    dtypes = [a.dtype for a in problem.arguments if isinstance(a, Tensor) and a.is_floating_point()]
    dtypes = [torch.promote_types(dtype, torch.float32) for dtype in dtypes[:1]] if problem.name in FITS else []
    return max(RELATIVE[dtype] for dtype in [result.dtype, *dtypes])


def problems(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    diag: bool,
    *,
    labeled: bool = True,
    bad_labels: bool = False,
    device: str = "cpu",
) -> Iterator[Problem]:
    """Every operator, with every option that changes what a kernel does; half features come with float32 parameters."""
    N, D, C, K = shape
    x, labels, mixture = draw(*shape, diag=diag)
    x, labels, mixture = x.to(device), labels.to(device), type(mixture)(*(t.to(device) for t in mixture))

    def rand(*size: int) -> Tensor:
        """The same numbers on every device."""
        return torch.rand(size, dtype=parameter).to(device)

    gap = 8 if D % 8 == 0 else 3
    x = torch.cat([x, x.new_full((N, gap), torch.nan)], 1)[:, :D].to(dtype)  # rows with NaN between them
    parameter = torch.promote_types(dtype, torch.float32)
    means, variances, weights = mixture.to(parameter)
    if bad_labels:
        labels[N // 2], labels[N - 1] = -1, C
    labels = labels if labeled else None
    arguments = [x, means, variances, weights, labels]
    grad, scale = rand(N) - 0.3, rand()
    yield Problem("mixture_log_prob_fwd", [*arguments, True])
    log_prob, responsibilities = (t.to(parameter) for t in reference.mixture_log_prob_fwd(*exact(arguments), True))
    for kept in (responsibilities, responsibilities[:, :0]):
        yield Problem("mixture_log_prob_bwd", [grad, *arguments, log_prob, kept])
        yield Problem("mixture_moments", [grad, *arguments, log_prob, kept])
    yield Problem("mixture_log_prob_fwd", [*arguments, False])

    for posterior, per_dimension, sums in itertools.product((False, True), repeat=3):
        spread = [variances, weights] if posterior else [None, None]
        yield Problem("component_statistics_fwd", [x, means, labels, *spread, per_dimension, sums])
    counts, scatter, _, assignment = reference.component_statistics_fwd(
        *exact([x, means, labels]), None, None, diag, False
    )
    for factor in (None, scale):
        yield Problem(
            "component_statistics_bwd",
            [rand(*scatter.shape) - 0.5, factor, x, means, labels, assignment],
        )

    # components that end with one row have a scatter of rounding errors
    iterations = 2 if 2 * C * K <= N else 0
    yield Problem("kmeans", [x, means, labels, iterations, 1e-2, diag])
    # posteriors that underflow differ by type
    wide = [x, means, torch.full_like(variances, D), weights, labels]
    yield Problem("expectation_maximization", [*wide, 1 if D > 500 else 2, 1e-4, 1e-1])

    prior = rand(C) + 0.1
    noise = torch.rand(D, dtype=torch.float64).to(device) * 0.01 + 0.001
    for samples, *options in (
        [40.0 * N + 1, noise[:1], False, 1.0, True, True, 0.125, 0.01],
        [40.0 * N + 1, noise, False, 3.0, False, False, 0.125, 0.01],
        # fewer than there are rows: components without any have no weight left
        [0.28 * N + 0.01, noise[:1], False, 1.0, True, True, 0.125, 0.01],
        [40.0 * N + 1, noise[:1], True, 10.0, True, True, 0.125, 0.01],
    ):
        if options[1] and diag:
            continue
        priors = [variances, weights, prior / prior.sum(), torch.tensor(samples, dtype=torch.float64, device=device)]
        yield Problem("cem_fwd", [x, means, labels, *priors, *options])
        yield Problem("entropy_bound", [counts.to(parameter), scatter.to(parameter), D, *priors, *options])
