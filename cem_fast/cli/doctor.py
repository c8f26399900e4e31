"""Report on an installation: versions, backends, and a check of every operation against the reference.

``python -m cem_fast.cli.doctor`` needs torch and numpy only, not the libraries of the command line.
"""

from __future__ import annotations

import argparse
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import cem_fast
from cem_fast.cli import device as devices
from cem_fast.experiments import provenance
from cem_fast.ops import agreement
from cem_fast.ops.agreement import TOLERANCE
from cem_fast.ops.library import OPERATORS


def examine(*, device: torch.device, check: bool) -> int:
    """Print versions, devices and backends; with ``check``, also compare every operation with the reference.

    Args:
        device: device of the check.
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
        print(f"{name + ':':<34} {value}")
    if not check:
        return 0
    wrong = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compared = list(compare(device))
    refused = [str(warning.message) for warning in caught if "is not used there" in str(warning.message)]
    for message in dict.fromkeys(refused):  # repeated for every dtype
        wrong += 1
        print(f"WRONG  {message}")
    for name, dtype, error in compared:
        right = error <= TOLERANCE[dtype]
        wrong += not right
        verdict = "ok    " if right else "WRONG "
        kind = str(dtype).removeprefix("torch.")
        print(f"{verdict} {name} in {kind} on {device}: off by {error:.1e} (allowed {TOLERANCE[dtype]:.0e})")
    print(f"{wrong} operations differ from the reference" if wrong else "every operation agrees with the reference")
    return int(wrong > 0)


def compare(device: torch.device) -> Iterator[tuple[str, torch.dtype, float]]:
    """Compare every operation on a device with the float64 reference on the CPU.

    Args:
        device: device of the operations.

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


def main(arguments: list[str] | None = None) -> int:
    """Run ``python -m cem_fast.cli.doctor``.

    Args:
        arguments: the arguments; None for those of this process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cem_fast.cli.doctor", description="Shows versions, devices and backends."
    )
    parser.add_argument("--check", action="store_true", help="compare every operation with the reference")
    parser.add_argument("--device", default="cpu", help="where to compute: cpu, cuda, cuda:1, ... (default: cpu)")
    settings = parser.parse_args(arguments)
    try:
        device = devices.find(settings.device)
    except ValueError as error:
        parser.error(str(error))
    return examine(device=device, check=settings.check)


if __name__ == "__main__":
    sys.exit(main())
