"""What can be launched, spelled out: the product of each kernel's dtypes, alignments and constants."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cem_fast.kernels import _configs
from cem_fast.kernels._configs import FEW_COMPONENTS, MANY_COMPONENTS
from cem_fast.kernels._distance import distance_kernel
from cem_fast.kernels._grouping import pairwise_sort_kernel
from cem_fast.kernels._launch import options
from cem_fast.kernels._reduce import reduce_kernel
from cem_fast.kernels.component_statistics import (
    component_statistics_bwd_kernel,
    component_statistics_fwd_kernel,
    resident_statistics_kernel,
    scatter_kernel,
)
from cem_fast.kernels.entropy_bound import entropy_bound_kernel, entropy_bound_spherical_kernel, sum_kernel
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

# Kernels that touch x or something as large: these promise 128-bit access where their inputs are aligned.
STREAMING = {
    resident_statistics_kernel,
    distance_kernel,
    component_statistics_fwd_kernel,
    component_statistics_bwd_kernel,
    scatter_kernel,
    mixture_log_prob_fwd_kernel,
    mixture_log_prob_bwd_kernel,
    mixture_moments_kernel,
    reduce_kernel,
}


@dataclass(frozen=True)
class Case:
    name: str
    fn: JITFunction
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]
    vectorized: bool
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


def _case(
    fn: JITFunction, config: _configs.Config, constants: dict[str, Any], aligned: bool, features: str, parameters: str
) -> Case:
    signature = {name: _type(name, features, parameters, constants) for name in fn.arg_names}
    attrs = {}
    for i, kind in enumerate(signature.values()):
        if aligned and kind != "constexpr" and not fn.params[i].do_not_specialize:
            attrs[(i,)] = [["tt.divisibility", 16]]
    streams = aligned and fn in STREAMING and not constants.get("FROM_SPLITS", False)
    return Case(fn.__name__, fn, signature, constants, attrs, options(config), streams, features, parameters)


def _flags(*names: str) -> Iterator[dict[str, bool]]:
    for values in itertools.product((False, True), repeat=len(names)):
        yield dict(zip(names, values))


def _by_dtype(family: str, config: _configs.Config) -> Iterator[tuple[JITFunction, dict[str, Any]]]:
    tile = dict(BLOCK_N=config.BLOCK_N, BLOCK_D=config.BLOCK_D)
    if family.startswith("resident"):
        yield resident_statistics_kernel, tile
    if family == "gradient":
        for flags in _flags("PER_DIMENSION", "GATHER"):
            yield component_statistics_bwd_kernel, flags | tile
        for diag in _flags("DIAG"):
            yield mixture_log_prob_bwd_kernel, diag | tile
    if family == "moments":
        for diag in _flags("DIAG"):
            yield mixture_moments_kernel, diag | tile
    if family == "distance":
        yield scatter_kernel, tile
        for block_k, diag in itertools.product((FEW_COMPONENTS, MANY_COMPONENTS), _flags("DIAG")):
            tiles = tile | diag | dict(BLOCK_K=block_k)
            yield distance_kernel, tiles
            for split in _flags("FROM_SPLITS"):
                yield mixture_log_prob_fwd_kernel, split | tiles
                yield component_statistics_fwd_kernel, split | dict(SECOND_PASS=False) | tiles
            if not diag["DIAG"]:  # one program for all dimensions reads x again itself
                yield component_statistics_fwd_kernel, dict(FROM_SPLITS=False, SECOND_PASS=True) | tiles


def cases() -> list[Case]:
    """See :func:`cem_fast.kernels.aot_cases`."""
    if not isinstance(distance_kernel, JITFunction):
        raise RuntimeError("kernels are interpreted (TRITON_INTERPRET=1) and cannot be compiled")
    found = []
    for aligned, (features, parameters) in itertools.product((True, False), DTYPES):
        size = ITEMSIZE[parameters]
        for family in ("distance", "resident_narrow", "resident_wide", "gradient", "moments"):
            if family == "resident_wide" and not (aligned and parameters == "fp32"):
                continue
            config = _configs.config(family, size)
            for fn, constants in _by_dtype(family, config):
                found.append(_case(fn, config, constants, aligned, features, parameters))
    for aligned, dtype in itertools.product((True, False), ITEMSIZE):
        size = ITEMSIZE[dtype]
        config = _configs.config("reduce", size)
        families = ["distance", "resident_narrow", "moments"] + ["resident_wide"] * (dtype == "fp32")
        rows = {_configs.config(family, size).BLOCK_N for family in families}
        for block_n in sorted(rows):
            found.append(_case(reduce_kernel, config, dict(ROWS=block_n, BLOCK=config.BLOCK_D), aligned, dtype, dtype))
        config = _configs.config("entropy", size)
        block = dict(BLOCK=config.BLOCK_D)
        for flags in _flags("DIAG", "NOISE_PER_DIMENSION", "FROM_PARTIALS"):
            if flags["DIAG"] or (flags["NOISE_PER_DIMENSION"] and not flags["FROM_PARTIALS"]):
                found.append(_case(entropy_bound_kernel, config, flags | block, aligned, dtype, dtype))
        found.append(_case(entropy_bound_spherical_kernel, config, block, aligned, dtype, dtype))
        found.append(_case(sum_kernel, config, block, aligned, dtype, dtype))
    config = _configs.config("sort", 8)
    for aligned in (True, False):
        found.append(_case(pairwise_sort_kernel, config, dict(BLOCK=config.BLOCK_N), aligned, "i64", "i64"))
    return found
