"""Which implementation of the operations is in force, chosen once when the package is imported, and why.

``CEM_FAST_BACKEND`` asks for one: ``auto`` takes the best there is (on a GPU only kernels that agree with the reference there),
``reference`` plain torch, ``cpu`` the compiled CPU kernels, ``triton`` the Triton kernels (on CPU tensors where
``TRITON_INTERPRET=1``), ``cuda`` the compiled CUDA kernels; asking for what this installation lacks is an error.
``CEM_FAST_CPU_CAPABILITY`` asks for an instruction set.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cem_fast._support.lookup import lookup
from cem_fast.ops import agreement, library, reference

BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")
CAPABILITIES = ("default", "avx2", "avx512")
PACKAGE = Path(__file__).resolve().parent.parent
_CUDA_LIBRARY = torch.library.Library("cem_fast_cuda", "DEF")


def _requested(variable: str, allowed: tuple[str, ...], default: str | None) -> str | None:
    value = os.environ.get(variable) or default
    return None if value is None else lookup(f"value of {variable}", value, {name: name for name in allowed})


def _compiled(library_name: str, part: str) -> Path:
    """The path of a compiled library.

    Raises:
        OSError: it is not there, with the reason that the installation recorded.
    """
    path = next(PACKAGE.glob(f"{library_name}.*"), None)
    if path is not None:
        return path
    record = PACKAGE / f"_not_built_{part}.txt"
    raise OSError(
        record.read_text().strip() if record.exists() else "the package was not installed with its extensions"
    )


class CpuLibrary:
    """The compiled CPU kernels, loaded and registered; they serve CPU tensors from then on.

    Raises:
        OSError: the library is not there, or does not load, with the reason.
    """

    def __init__(self) -> None:
        try:
            path = _compiled("_C_cpu", "cpp")
        except OSError as error:
            raise OSError(f"compiled CPU kernels are not built: {error}") from None
        torch.ops.load_library(path)
        self._library = ctypes.CDLL(str(path))
        self._library.cem_fast_cpu_capability.restype = ctypes.c_char_p

    @property
    def capability(self) -> str:
        """The instruction set in force: ``default``, ``avx2`` or ``avx512``."""
        return self._library.cem_fast_cpu_capability().decode()

    def select(self, capability: str) -> None:
        """Puts an instruction set in force.

        Args:
            capability: ``default``, ``avx2`` or ``avx512``.

        Raises:
            RuntimeError: it was not built, or this processor lacks it.
        """
        if self._library.cem_fast_cpu_select(capability.encode()) != 0:
            raise RuntimeError(
                f"CPU capability {capability!r} is not available: this build on this processor runs {self.capability!r}"
            )


def _triton_launcher(name: str) -> Callable[..., Any]:
    """The launcher of one operator; triton is imported by its first call."""

    def launcher(*args: Any) -> Any:
        return importlib.import_module("cem_fast.kernels.operators").OPERATORS[name](*args)

    return launcher


def _once_it_agrees(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """An operator's kernel, compared with the reference by its first call on a device; where they differ, the reference.

    That first call waits for the device. While a CUDA graph is captured nothing can be compared, and the kernel serves as it is.
    """
    agrees: dict[torch.device, bool] = {}

    def serve(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        if device not in agrees:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return kernel(*args)
            agrees[device] = _agrees(name, kernel, device)
        return kernel(*args) if agrees[device] else getattr(reference, name)(*args)

    return serve


def _agrees(name: str, kernel: Callable[..., Any], device: torch.device) -> bool:
    try:
        error = agreement.error(name, kernel, torch.float32, device)
        fault = f"is off by {error:.1e}" if error > agreement.TOLERANCE[torch.float32] else None
    except Exception as failure:  # whatever a compiler or a driver raises
        fault = f"failed ({type(failure).__name__}: {failure})"
    if fault is not None:
        warnings.warn(
            f"the kernel of {name} {fault} on {device} and is not used there; plain torch is slower: see "
            f"cem-fast doctor --device {device.type} --check",
            stacklevel=2,
        )
    return fault is None


def _load_triton(requested: str) -> tuple[str | None, str]:
    """Registers the Triton launchers; returns the dispatch key that they serve, or None, and the reason."""
    if requested not in ("auto", "triton"):
        return None, f"CEM_FAST_BACKEND={requested}"
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "the package triton is not installed"
    elif importlib.util.find_spec("cem_fast.kernels") is None:
        reason = "the package was not installed with its kernels"
    elif interpreting and requested == "auto":
        reason = "TRITON_INTERPRET=1, where CEM_FAST_BACKEND=triton asks for them"
    elif not interpreting and torch.version.cuda is None and torch.version.hip is None:
        reason = "this build of torch has no CUDA"
    if reason is not None:
        if requested == "triton":
            raise RuntimeError(f"CEM_FAST_BACKEND=triton: {reason}")
        return None, reason
    key = "CPU" if interpreting else "CUDA"
    for name in library.EVERYWHERE:
        launcher = _triton_launcher(name)
        library.LIBRARY.impl(name, _once_it_agrees(name, launcher) if requested == "auto" else launcher, key)
    if interpreting:
        return key, "TRITON_INTERPRET=1"
    return key, "compiled at first use" + (", and compared with the reference then" if requested == "auto" else "")


@functools.cache
def cuda_operators() -> dict[str, torch._ops.OpOverload]:
    """Loads the compiled CUDA kernels, which needs no GPU; they serve nothing but ``torch.ops.cem_fast_cuda`` by that.

    Returns:
        The operator of every name in ``library.EVERYWHERE``.

    Raises:
        OSError: the library is not there, or does not load, with the reason.
    """
    if torch.version.cuda is None:
        raise OSError("this build of torch has no CUDA")
    try:
        path = _compiled("_C_cuda", "cuda")
    except OSError as error:
        raise OSError(f"the compiled CUDA kernels are not built: {error}") from None
    torch.ops.load_library(path)
    for name in library.EVERYWHERE:
        _CUDA_LIBRARY.define(name + library.SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"cem_fast_cuda::{name}", library.FAKES[name], lib=_CUDA_LIBRARY)
    return {name: getattr(torch.ops.cem_fast_cuda, name).default for name in library.EVERYWHERE}


def _load_cuda(requested: str) -> tuple[bool, str]:
    """Registers the compiled CUDA kernels for CUDA tensors if nothing else serves those; returns whether, and why or why not."""
    if requested not in ("auto", "cuda"):
        return False, f"CEM_FAST_BACKEND={requested}"
    if requested == "auto" and TRITON is not None:
        return False, "Triton's kernels serve"
    try:
        operators = cuda_operators()
    except OSError as error:
        if requested == "cuda":
            raise RuntimeError(f"CEM_FAST_BACKEND=cuda: {error}") from error
        return False, str(error)
    for name, operator in operators.items():
        library.LIBRARY.impl(name, _once_it_agrees(name, operator) if requested == "auto" else operator, "CUDA")
    return True, "CEM_FAST_BACKEND=cuda" if requested == "cuda" else "compared with the reference at first use"


def choose() -> tuple[str, CpuLibrary | None, str]:
    """Reads the environment and loads what it asks for.

    Returns:
        The backend asked for, the CPU library if it is to serve, and the reason for what serves CPU tensors.

    Raises:
        ValueError: a variable has an unknown value.
        RuntimeError: what was asked for is not to be had, with the reason.
    """
    requested = _requested("CEM_FAST_BACKEND", BACKENDS, "auto")
    capability = _requested("CEM_FAST_CPU_CAPABILITY", CAPABILITIES, None)
    if requested == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return requested, None, "TRITON_INTERPRET=1"
    if requested == "reference":
        if capability is not None:
            raise RuntimeError(
                f"CEM_FAST_CPU_CAPABILITY={capability} needs the compiled kernels, got CEM_FAST_BACKEND=reference"
            )
        return requested, None, "CEM_FAST_BACKEND=reference"
    try:
        cpu = CpuLibrary()
    except OSError as error:
        if requested == "cpu" or capability is not None:
            asked = f"CEM_FAST_BACKEND={requested}" if requested == "cpu" else f"CEM_FAST_CPU_CAPABILITY={capability}"
            raise RuntimeError(f"{asked}: {error}") from error
        return requested, None, str(error)
    if capability is None:
        return requested, cpu, "the widest instruction set of this processor"
    cpu.select(capability)
    return requested, cpu, f"CEM_FAST_CPU_CAPABILITY={capability}"


REQUESTED, CPU, _CPU_REASON = choose()
TRITON, _TRITON_REASON = _load_triton(REQUESTED)
CUDA, _CUDA_REASON = _load_cuda(REQUESTED)


def describe() -> dict[str, Any]:
    """What serves each kind of tensor, and why.

    Returns:
        The backend asked for; for tensors on the CPU and on CUDA what is in force and the reason; and how the compiled parts
        were built, or None.
    """
    try:
        from cem_fast import _C
    except ImportError:
        build = None
    else:
        build = _C.build_info()
    on_cpu = "triton (interpreted)" if TRITON == "CPU" else f"compiled ({CPU.capability})" if CPU else "reference"
    if TRITON == "CUDA":
        on_cuda = f"triton: {_TRITON_REASON}"
    elif CUDA:
        on_cuda = f"compiled: {_CUDA_REASON}"
    else:
        on_cuda = f"reference: triton {_TRITON_REASON}; cuda {_CUDA_REASON}"
    return {
        "backend asked for": REQUESTED,
        "on CPU tensors": f"{on_cpu}: {_CPU_REASON}",
        "on CUDA tensors": on_cuda,
        "build": build,
    }
