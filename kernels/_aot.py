"""What can be launched, spelled out: the product of each kernel's versions, dtypes and constants."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cem_fast.kernels import _configs
from cem_fast.kernels._distance import distance_kernel
from cem_fast.kernels._grouping import count_kernel, pairwise_sort_kernel, place_kernel
from cem_fast.kernels._launch import Kernel, options
from cem_fast.kernels._reduce import reduce_kernel
from cem_fast.kernels.component_statistics import (
    component_statistics_bwd_kernel,
    component_statistics_fwd_kernel,
    resident_statistics_kernel,
    scatter_kernel,
)
from cem_fast.kernels.entropy_bound import entropy_bound_kernel, entropy_bound_spherical_kernel, sum_kernel
from cem_fast.kernels.global_mixture import (
    component_terms_kernel,
    global_gradient_kernel,
    global_log_prob_kernel,
    global_moments_kernel,
    global_responsibilities_kernel,
)
from cem_fast.kernels.mixture_log_prob import (
    mixture_log_prob_bwd_kernel,
    mixture_log_prob_fwd_kernel,
    mixture_moments_kernel,
)
from triton.runtime.jit import JITFunction

# (features, parameters)
DTYPES = (("fp32", "fp32"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp64", "fp64"))
ITEMSIZE = {"fp32": 4, "fp64": 8}

FEATURES = {"x_ptr", "dx_ptr"}
INT64_POINTERS = {"index_ptr", "offsets_ptr", "sizes_ptr", "assignment_ptr", "labels_ptr", "order_ptr"}
DOUBLE_POINTERS = {"num_samples_ptr", "noise_ptr"}
INT64 = {"boost", "threshold", "gamma"}


@dataclass(frozen=True)
class Case:
    name: str
    fn: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]
    vectorized: bool
    precision: str | None  # of its matrix products, if it has any
    features: str
    parameters: str


def _type(name: str, features: str, parameters: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in FEATURES:
        return f"*{features}"
    if name in INT64_POINTERS:
        return "*i64"
    if name in DOUBLE_POINTERS:
        return "*fp64"
    if name.endswith("_ptr"):
        return f"*{parameters}"
    return "i64" if name in INT64 else "i32"


def case(
    kernel: Kernel, aligned: bool, config: _configs.Config, constants: dict[str, Any], features: str, parameters: str
) -> Case:
    """One version of a kernel for one choice of dtypes and constants."""
    fn = kernel.aligned if aligned else kernel.general
    signature = {name: _type(name, features, parameters, constants) for name in fn.arg_names}
    attrs = {(place,): [["tt.divisibility", 16]] for place in kernel.places if aligned}
    # one variance a component leaves the bound nothing to read by dimension
    streams = aligned and not (kernel is entropy_bound_kernel and not constants["DIAG"])
    precision = constants.get("PRECISION")
    return Case(kernel.name, fn, signature, constants, attrs, options(config), streams, precision, features, parameters)


def _flags(*names: str) -> Iterator[dict[str, bool]]:
    for values in itertools.product((False, True), repeat=len(names)):
        yield dict(zip(names, values))


def _streaming() -> Iterator[tuple[str, Kernel, dict[str, Any]]]:
    """Configuration, kernel and constants of what reads x."""
    yield "resident_narrow", resident_statistics_kernel, {}
    yield "resident_wide", resident_statistics_kernel, {}
    yield "distance", scatter_kernel, {}
    for diag in _flags("DIAG"):
        tiles = diag | dict(BLOCK_K=_configs.BLOCK_K)
        yield "distance", distance_kernel, tiles
        yield "distance", mixture_log_prob_fwd_kernel, tiles
        yield "distance", component_statistics_fwd_kernel, tiles
        yield "gradient", mixture_log_prob_bwd_kernel, diag
        yield "moments", mixture_moments_kernel, diag
    for gather in _flags("GATHER"):
        yield "gradient", component_statistics_bwd_kernel, gather


def _of_statistics() -> Iterator[tuple[str, Kernel, tuple[bool, ...], dict[str, Any]]]:
    """Configuration, kernel, versions and constants of what only sees parameters and statistics."""
    # partial results always lie where this kernel wants them
    yield "reduce", reduce_kernel, (True,), {}
    yield "entropy", entropy_bound_spherical_kernel, (False,), {}
    yield "entropy", sum_kernel, (False,), {}
    yield "entropy", entropy_bound_kernel, (True, False), dict(DIAG=False, FROM_PARTIALS=False)
    for from_partials in _flags("FROM_PARTIALS"):
        yield "entropy", entropy_bound_kernel, (True, False), dict(DIAG=True) | from_partials


def _products() -> Iterator[tuple[str, Kernel, dict[str, Any]]]:
    """Configuration, kernel and constants of what multiplies matrices, which is float32 alone."""
    for diag, precision in itertools.product(_flags("DIAG"), _configs.PRODUCT_PRECISIONS):
        constants = diag | dict(PRECISION=precision)
        yield "product", global_log_prob_kernel, constants
        yield "product", global_responsibilities_kernel, constants
        yield "product_gradient", global_gradient_kernel, constants
        yield "product_moments", global_moments_kernel, constants


def cases() -> list[Case]:
    """See :func:`cem_fast.kernels.aot_cases`."""
    found = []
    for (family, kernel, constants), (features, parameters) in itertools.product(_streaming(), DTYPES):
        for config in _configs.configs(family, ITEMSIZE[parameters]):
            tile = constants | dict(BLOCK_N=config.BLOCK_N, BLOCK_D=config.BLOCK_D)
            for aligned in (True,) if family == "resident_wide" else (True, False):
                found.append(case(kernel, aligned, config, tile, features, parameters))
    for (family, kernel, versions, constants), dtype in itertools.product(_of_statistics(), ITEMSIZE):
        for config, aligned in itertools.product(_configs.configs(family, ITEMSIZE[dtype]), versions):
            found.append(case(kernel, aligned, config, constants | dict(BLOCK=config.BLOCK_D), dtype, dtype))
    for (family, kernel, constants), (features, parameters) in itertools.product(_products(), DTYPES):
        for config in _configs.configs(family, ITEMSIZE[parameters]):
            tile = constants | dict(BLOCK_N=config.BLOCK_N, BLOCK_K=config.BLOCK_K, BLOCK_D=config.BLOCK_D)
            found.append(case(kernel, True, config, tile, features, parameters))
    for diag, config in itertools.product(_flags("DIAG"), _configs.configs("entropy", 4)):
        block = diag | dict(BLOCK=config.BLOCK_D)
        found.append(case(component_terms_kernel, True, config, block, "fp32", "fp32"))
    for config, kernel in itertools.product(_configs.configs("count", 8), (count_kernel, place_kernel)):
        blocks = dict(SPAN=config.BLOCK_D, CHUNK=config.BLOCK_N)
        found.append(case(kernel, False, config, blocks, "i64", "i64"))
    for config in _configs.configs("sort", 8):
        blocks = dict(BLOCK=config.BLOCK_N, CHUNK=config.BLOCK_D)
        found.append(case(pairwise_sort_kernel, False, config, blocks, "i64", "i64"))
    return found
