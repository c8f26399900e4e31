"""What this installation computes with, why, and whether it computes right."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import cem_fast
from cem_fast import provenance
from cem_fast.ops import reference

if TYPE_CHECKING:
    from rich.console import Console

# Largest difference from the fp64 reference, relative to the largest value of the same output, by the features' dtype.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2}


def examine(console: Console, *, device: torch.device, check: bool) -> int:
    """Prints what is in force; with ``check``, also compares every operation with the reference.

    Args:
        console: where to print.
        device: which device to describe and to check.
        check: whether to compare.

    Returns:
        The exit status: 1 if an operation differs from the reference, otherwise 0.
    """
    facts: dict[str, Any] = {
        **{package: version or "not installed" for package, version in provenance.versions().items()},
        "commit": provenance.commit(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "CUDA devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        **cem_fast.backends(),
    }
    for name, value in _flat(facts):
        console.print(f"{name + ':':<34} {value}", markup=False, highlight=False, soft_wrap=True)
    if not check:
        return 0
    wrong = 0
    for name, dtype, error in compare(device):
        right = error <= TOLERANCE[dtype]
        wrong += not right
        verdict = "ok    " if right else "WRONG "
        kind = str(dtype).removeprefix("torch.")
        console.print(f"{verdict} {name} in {kind} on {device}: off by {error:.1e} (allowed {TOLERANCE[dtype]:.0e})")
    console.print(
        f"{wrong} operations differ from the reference" if wrong else "every operation agrees with the reference"
    )
    return int(wrong > 0)


def compare(device: torch.device) -> Iterator[tuple[str, torch.dtype, float]]:
    """Runs every operation on a device and compares it with the fp64 reference on the CPU.

    Args:
        device: where to run.

    Yields:
        Operation, dtype of the features, and the largest difference over all cases, relative to the largest value of the
        same output; infinite where shapes, NaNs or integers differ.
    """
    for dtype in TOLERANCE:
        worst: dict[str, float] = {}
        for name, arguments in _cases(dtype):
            moved = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
            found = _tuple(getattr(torch.ops.cem_fast, name)(*moved))
            expected = _tuple(getattr(reference, name)(*(_exact(a) for a in arguments)))
            error = max(_difference(a.cpu(), b) for a, b in zip(found, expected, strict=True))
            worst[name] = max(error, worst.get(name, 0.0))
        yield from ((name, dtype, error) for name, error in worst.items())


def _cases(feature_dtype: torch.dtype) -> Iterator[tuple[str, list[Any]]]:
    """Every operation with arguments of odd sizes, spherical and diagonal; half features come with fp32 parameters."""
    dtype = torch.promote_types(feature_dtype, torch.float32)
    N, C, K, D = 259, 7, 3, 67
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(C, (N,), generator=generator)
    means = uniform(C, K, D).to(dtype)
    x = (means[labels, 0].double() + 0.3 * uniform(N, D)).to(feature_dtype)
    weights, prior = (uniform(C, K) + 0.5, uniform(C) + 0.5)
    weights, prior = (weights / weights.sum(1, keepdim=True)).to(dtype), (prior / prior.sum()).to(dtype)
    num_samples, noise_variance = torch.tensor(1000.0, dtype=torch.float64), torch.tensor([0.01], dtype=torch.float64)
    for diagonal in (False, True):
        variances = (0.05 + 0.1 * uniform(C, K, D if diagonal else 1)).to(dtype)
        variances = variances if diagonal else variances[:, :, 0].contiguous()
        mixture = [x, means, variances, weights, labels]
        yield "mixture_log_prob_fwd", [*mixture, True]
        kept = [t.to(dtype) for t in reference.mixture_log_prob_fwd(*(_exact(t) for t in mixture), True)]
        yield "mixture_log_prob_bwd", [uniform(N).to(dtype), *mixture, *kept]
        yield "mixture_moments", [uniform(N).to(dtype), *mixture, *kept]
        yield "mixture_statistics", mixture
        yield "component_statistics_fwd", [x, means, labels, variances, weights, diagonal, True]
        counts, scatter, _, assignment = reference.component_statistics_fwd(
            x, means, labels, None, None, diagonal, False
        )
        yield "kmeans", [x, means, labels, 3, 1e-4, diagonal]
        yield "component_statistics_bwd", [uniform(*scatter.shape).to(dtype), None, x, means, labels, assignment]
        priors = [variances, weights, prior, num_samples, noise_variance]
        for official in (False, True)[: 1 if diagonal else 2]:
            options = [official, 10.0 if official else 1.0, True, True, 0.125, 0.01]
            yield "entropy_bound", [counts.to(dtype), scatter.to(dtype), D, *priors, *options]
            yield "cem_fwd", [x, means, labels, *priors, *options]

    # one class of many components, which GPUs evaluate by matrix products
    K, D = 130, 64
    means, weights = uniform(1, K, D).to(dtype), torch.full((1, K), 1 / K, dtype=dtype)
    x = (means[0, torch.randint(K, (N,), generator=generator)].double() + 0.3 * uniform(N, D)).to(feature_dtype)
    for diagonal in (False, True):
        variances = (0.05 + 0.1 * uniform(1, K, D)).to(dtype)
        mixture = [x, means, variances if diagonal else variances[:, :, 0].contiguous(), weights, None]
        yield "mixture_log_prob_fwd", [*mixture, False]
        log_prob = reference.mixture_log_prob_fwd(*(_exact(t) for t in mixture), False)[0].to(dtype)
        yield "mixture_log_prob_bwd", [uniform(N).to(dtype), *mixture, log_prob, x.new_empty(N, 0, dtype=dtype)]
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


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}, ")
        elif isinstance(value, list | tuple):
            yield prefix + key, ", ".join(map(str, value)) or "none"
        else:
            yield prefix + key, "none" if value is None else str(value)
