"""Triton kernels of cem_fast, importable without triton."""

from __future__ import annotations

from typing import Any


def aot_cases(*, everywhere: bool = False) -> list[Any]:
    """All kernels, signatures and configurations of the launchers, to compile ahead of time.

    Args:
        everywhere: include cases for other vendors' devices; by default only those that this build of torch can launch.

    Returns:
        Cases with ``name``, ``fn`` (the JIT function), ``signature``, ``constexprs``, ``attrs``, ``options``, ``vectorized``
        (whether 128-bit access to global memory is promised) and ``precision`` (of its matrix products, or None).

    Raises:
        ImportError: triton is not installed.
        RuntimeError: kernels are interpreted (``TRITON_INTERPRET=1``) and cannot be compiled.
    """
    import torch
    from cem_fast.kernels._aot import cases
    from cem_fast.kernels._configs import product_precision
    from triton.runtime.jit import JITFunction

    listed = cases()
    if not isinstance(listed[0].fn, JITFunction):
        raise RuntimeError("kernels are interpreted (TRITON_INTERPRET=1) and cannot be compiled")
    precision = product_precision("gfx" if torch.version.hip else "sm")
    return [case for case in listed if everywhere or case.precision in (None, precision)]
