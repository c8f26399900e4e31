"""What this installation computes with, why, and whether it computes right."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

import cem_fast
from cem_fast.experiments import provenance
from cem_fast.ops import agreement
from cem_fast.ops.agreement import TOLERANCE
from cem_fast.ops.library import OPERATORS

if TYPE_CHECKING:
    from rich.console import Console


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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compared = list(compare(device))
    for refused in (str(warning.message) for warning in caught if "is not used there" in str(warning.message)):
        wrong += 1
        console.print(f"WRONG  {refused}", markup=False, highlight=False, soft_wrap=True)
    for name, dtype, error in compared:
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
        for name in agreement.names():
            yield name, dtype, agreement.error(name, OPERATORS[name], dtype, device)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}, ")
        elif isinstance(value, list | tuple):
            yield prefix + key, ", ".join(map(str, value)) or "none"
        else:
            yield prefix + key, "none" if value is None else str(value)
