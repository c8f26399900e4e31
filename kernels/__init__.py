"""Triton kernels of cem_fast, importable without triton."""

from __future__ import annotations

from typing import Any


def aot_cases() -> list[Any]:
    """Every kernel, signature and configuration that the launchers can ask for, to compile ahead of time.

    Returns:
        Cases with ``name``, ``fn`` (the JIT function), ``signature``, ``constexprs``, ``attrs``, ``options``, ``vectorized``
        (whether 128-bit access to global memory is promised) and ``precision`` (of its matrix products, or None).

    Raises:
        ImportError: triton is not installed.
        RuntimeError: kernels are being interpreted (``TRITON_INTERPRET=1``), and so cannot be compiled.
    """
    from cem_fast.kernels._aot import cases
    from triton.runtime.jit import JITFunction

    listed = cases()
    if not isinstance(listed[0].fn, JITFunction):
        raise RuntimeError("kernels are interpreted (TRITON_INTERPRET=1) and cannot be compiled")
    return listed
