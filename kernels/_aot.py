"""List of all possible launches: the product of each kernel's versions, dtypes, constants and configurations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cem_fast.kernels import _configs
from cem_fast.kernels._configs import Config
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
    global_floor_kernel,
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
ITEMSIZE = {"fp32": 4, "fp64": 8, "i64": 8}

FEATURES = {"x_ptr", "dx_ptr"}
INT64_POINTERS = {"index_ptr", "offsets_ptr", "sizes_ptr", "assignment_ptr", "labels_ptr", "order_ptr", "ticket_ptr"}
DOUBLE_POINTERS = {"num_samples_ptr", "noise_ptr"}
INT64 = {"boost", "threshold", "gamma"}

EITHER, ALIGNED, GENERAL = (True, False), (True,), (False,)
# Tile constants of a kernel, and the fields of a configuration with their values
TILE = {"BLOCK_N": "BLOCK_N", "BLOCK_D": "BLOCK_D"}
PRODUCT_TILE = {"BLOCK_N": "BLOCK_N", "BLOCK_K": "BLOCK_K", "BLOCK_D": "BLOCK_D"}
ROW = {"BLOCK": "BLOCK_D"}


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


@dataclass(frozen=True)
class Launch:
    """One kernel with dtypes and constants, but without a configuration."""

    family: str
    kernel: Kernel
    versions: tuple[bool, ...]  # aligned or not
    constants: dict[str, Any]
    tile: dict[str, str]
    features: str
    parameters: str

    def cases(self, config: Config) -> Iterator[Case]:
        """The versions of the kernel under one configuration."""
        kernel = self.kernel
        constants = self.constants | {name: getattr(config, field) for name, field in self.tile.items()}
        for aligned in self.versions:
            fn = kernel.aligned if aligned else kernel.general
            signature = {name: self._type(name, constants) for name in fn.arg_names}
            attrs = {(fn.arg_names.index(name),): [["tt.divisibility", 16]] for name in kernel.wide if aligned}
            # one variance a component leaves the bound nothing to read by dimension
            narrow = kernel is entropy_bound_kernel and not constants["DIAG"]
            # AMD's warps of 64 threads share one tile of means, which is too small for wide access
            narrow |= kernel is global_floor_kernel and self.features in ("bf16", "fp16")
            streams = bool(attrs) and not narrow
            precision = constants.get("PRECISION")
            yield Case(
                kernel.name,
                fn,
                signature,
                constants,
                attrs,
                options(config),
                streams,
                precision,
                self.features,
                self.parameters,
            )

    def _type(self, name: str, constants: dict[str, Any]) -> str:
        if name in constants:
            return "constexpr"
        if name in FEATURES:
            return f"*{self.features}"
        if name in INT64_POINTERS:
            return "*i64"
        if name in DOUBLE_POINTERS:
            return "*fp64"
        if name.endswith("_ptr"):
            return f"*{self.parameters}"
        return "i64" if name in INT64 else "i32"


def _flags(*names: str) -> Iterator[dict[str, bool]]:
    for values in itertools.product((False, True), repeat=len(names)):
        yield dict(zip(names, values))


def _streaming() -> Iterator[tuple[str, Kernel, dict[str, Any]]]:
    """Configuration, kernel and constants of the kernels that read x."""
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
    """Configuration, kernel, versions and constants of the kernels that read only parameters and statistics."""
    # partial results are always aligned
    yield "reduce", reduce_kernel, ALIGNED, {}
    yield "entropy", entropy_bound_spherical_kernel, GENERAL, {}
    yield "entropy", sum_kernel, GENERAL, {}
    yield "entropy", entropy_bound_kernel, EITHER, dict(DIAG=False, FROM_PARTIALS=False)
    for from_partials in _flags("FROM_PARTIALS"):
        yield "entropy", entropy_bound_kernel, EITHER, dict(DIAG=True) | from_partials


def _products() -> Iterator[tuple[str, Kernel, dict[str, Any]]]:
    """Configuration, kernel and constants of matrix products, which exist in float32 only."""
    for diag, precision in itertools.product(_flags("DIAG"), _configs.PRODUCT_PRECISIONS):
        constants = diag | dict(PRECISION=precision)
        yield "product", global_floor_kernel, constants
        yield "product", global_log_prob_kernel, constants
        yield "product", global_responsibilities_kernel, constants
        yield "product_gradient", global_gradient_kernel, constants
        yield "product_moments", global_moments_kernel, constants


def launches() -> Iterator[Launch]:
    """All possible launches, without their configurations."""
    for (family, kernel, constants), dtypes in itertools.product(_streaming(), DTYPES):
        # the wide tile leaves no registers for unaligned loads
        versions = ALIGNED if family == "resident_wide" else EITHER
        yield Launch(family, kernel, versions, constants, TILE, *dtypes)
    for (family, kernel, versions, constants), dtype in itertools.product(_of_statistics(), ("fp32", "fp64")):
        yield Launch(family, kernel, versions, constants, ROW, dtype, dtype)
    for (family, kernel, constants), dtypes in itertools.product(_products(), DTYPES):
        yield Launch(family, kernel, ALIGNED, constants, PRODUCT_TILE, *dtypes)
    for diag in _flags("DIAG"):
        yield Launch("entropy", component_terms_kernel, ALIGNED, diag, ROW, "fp32", "fp32")
    for kernel in (count_kernel, place_kernel):
        yield Launch("count", kernel, GENERAL, {}, {"SPAN": "BLOCK_D", "CHUNK": "BLOCK_N"}, "i64", "i64")
    yield Launch("sort", pairwise_sort_kernel, GENERAL, {}, {"BLOCK": "BLOCK_N", "CHUNK": "BLOCK_D"}, "i64", "i64")


def cases() -> list[Case]:
    """See :func:`cem_fast.kernels.aot_cases`."""
    return [
        case
        for launch in launches()
        for config in _configs.configs(launch.family, ITEMSIZE[launch.parameters])
        for case in launch.cases(config)
    ]


def cases_under(family: str, itemsize: int, config: Config) -> list[Case]:
    """Cases under a configuration of a family with parameters of ``itemsize`` bytes."""
    return [
        case
        for launch in launches()
        if launch.family == family and ITEMSIZE[launch.parameters] == itemsize
        for case in launch.cases(config)
    ]
