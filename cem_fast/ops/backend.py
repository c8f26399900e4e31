"""Choice of the implementation of the operations, made once when the package is imported.

The environment variable ``CEM_FAST_BACKEND`` selects it:

- ``auto`` (default): the fastest available one; on a GPU, only kernels that agree with the reference there.
- ``reference``: plain torch.
- ``cpu``: the compiled CPU kernels.
- ``triton``: the Triton kernels; with ``TRITON_INTERPRET=1``, for CPU tensors.
- ``cuda``: the compiled CUDA kernels.

``CEM_FAST_CPU_CAPABILITY`` selects the CPU's instruction set. Requesting a missing implementation is an error.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cem_fast._support.lookup import lookup
from cem_fast._support.warn import warn
from cem_fast.ops import agreement, library, reference

BACKENDS = ("auto", "triton", "cuda", "cpu", "reference")
CAPABILITIES = ("default", "avx2", "avx512")
PACKAGE = Path(__file__).resolve().parent.parent
_CUDA_LIBRARY = torch.library.Library("cem_fast_cuda", "DEF")  # type: ignore[no-untyped-call]
_CHOICES = torch.library.Library("cem_fast_choice", "DEF")  # type: ignore[no-untyped-call]


def _requested(variable: str, allowed: tuple[str, ...]) -> str | None:
    value = os.environ.get(variable)
    return lookup(f"value of {variable}", value, {name: name for name in allowed}) if value else None


def _compiled(library_name: str, part: str) -> Path:
    """Path of a compiled library.

    Raises:
        OSError: the library is missing; the message is the reason that the installation recorded.
    """
    path = next(PACKAGE.glob(f"{library_name}.*"), None)
    if path is not None:
        return path
    record = PACKAGE / f"_not_built_{part}.txt"
    raise OSError(
        record.read_text().strip() if record.exists() else "the package was not installed with its extensions"
    )


class CpuLibrary:
    """Compiled CPU kernels, which handle CPU tensors once they are loaded.

    Raises:
        OSError: the library is missing or does not load; the message gives the reason.

    Example:
        >>> from cem_fast.ops import backend
        >>> backend.CPU is None or backend.CPU.capability in ("default", "avx2", "avx512")
        True
    """

    def __init__(self) -> None:
        try:
            path = _compiled("_C_cpu", "cpp")
        except OSError as error:
            raise OSError(f"compiled CPU kernels are not built: {error}") from None
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        self._library = ctypes.CDLL(str(path))
        self._library.cem_fast_cpu_capability.restype = ctypes.c_char_p

    @property
    def capability(self) -> str:
        """Instruction set in use: ``default``, ``avx2`` or ``avx512``."""
        name: bytes = self._library.cem_fast_cpu_capability()
        return name.decode()

    def select(self, capability: str) -> None:
        """Selects an instruction set.

        Args:
            capability: ``default``, ``avx2`` or ``avx512``.

        Raises:
            RuntimeError: the instruction set was not built, or this processor lacks it.

        Example:
            >>> from cem_fast.ops import backend
            >>> if backend.CPU is not None:
            ...     backend.CPU.select(backend.CPU.capability)
        """
        if self._library.cem_fast_cpu_select(capability.encode()) != 0:
            raise RuntimeError(
                f"CPU capability {capability!r} is not available: this build on this processor runs {self.capability!r}"
            )


def _triton_launcher(name: str) -> Callable[..., Any]:
    """Triton launcher of an operator; the first call imports triton."""

    def launcher(*args: Any) -> Any:
        return importlib.import_module("cem_fast.kernels.operators").OPERATORS[name](*args)

    return launcher


def _once_it_agrees(name: str, kernel: Callable[..., Any], *others: Callable[..., Any]) -> Callable[..., Any]:
    """Kernel of an operator, replaced by the next one, and last by the reference, on devices where it is wrong.

    The first call with features of a type on a device compares, which waits for the device. Calls during the capture of a CUDA
    graph cannot compare and use the kernel, which must have run before with the same shapes: a capture cannot load kernels.
    """
    chosen: dict[tuple[torch.device, torch.dtype], Callable[..., Any]] = {}
    arguments = [text.split()[-1] for text in library.SCHEMAS[name].strip("(").split(",")]
    place = arguments.index("x" if "x" in arguments else "counts")

    def serve(*args: Any) -> Any:
        features = args[place]
        case = device, dtype = features.device, features.dtype
        serving = chosen.get(case)
        if serving is None:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return kernel(*args)
            serving, final = _first_that_agrees(name, (kernel, *others), device, dtype)
            if final:
                chosen[case] = serving
                is_compiled = serving is CUDA.get(name)
                if is_compiled:  # from now on, these calls do not come here
                    note_agreement(cuda_library(), name, device, dtype)
        return serving(*args)

    return serve


def _by_size(name: str, large: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """Kernel of an operator in COMPILED_FIRST_IF_LARGE: one for large mixtures, one for others."""
    x = int(name.endswith("_bwd"))  # the gradient comes before the features

    def serve(*args: Any) -> Any:
        keep = bool(args[-1].shape[1]) if x else args[-1]
        return (large if _is_large(args[x], args[x + 1], args[x + 4], keep) else other)(*args)

    return serve


_TRANSIENT = {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN}


def _is_transient(failure: BaseException) -> bool:
    """Whether an error is due to the machine's state (memory, disk, a ban on waiting), and tells nothing of a kernel."""
    if isinstance(failure, OSError) and failure.errno in _TRANSIENT:
        return True
    said = str(failure)
    lack = isinstance(failure, (MemoryError, torch.OutOfMemoryError)) or "out of memory" in said.lower()
    if lack or "called a synchronizing CUDA operation" in said:
        return True
    cause = failure.__cause__ or failure.__context__
    return cause is not None and _is_transient(cause)


def _first_that_agrees(
    name: str, kernels: tuple[Callable[..., Any], ...], device: torch.device, dtype: torch.dtype
) -> tuple[Callable[..., Any], bool]:
    """The first kernel that agrees with the reference, else the reference, and whether that is final."""
    for left, kernel in zip(reversed(range(len(kernels))), kernels):
        agreed = _agrees(name, kernel, device, dtype, is_last=left == 0)
        if agreed is None:
            return getattr(reference, name), False
        if agreed:
            return kernel, True
    return getattr(reference, name), True


def _agrees(
    name: str, kernel: Callable[..., Any], device: torch.device, dtype: torch.dtype, *, is_last: bool
) -> bool | None:
    """Whether a kernel agrees with the reference; None if they could not be compared now."""
    fault, agreed = None, False
    try:
        error = agreement.error(name, kernel, dtype, device)
        agreed = error <= agreement.TOLERANCE[dtype]
        fault = None if agreed else f"is off by {error:.1e} on {device} and is not used there"
    except Exception as failure:  # compilers and drivers raise errors of any type
        what = f"{type(failure).__name__}: {failure}"
        if _is_transient(failure):
            warnings.warn(
                f"the kernel of {name} could not be compared on {device} ({what}); plain torch serves this call, and the "
                "next call compares again",
                stacklevel=2,
            )
            return None
        fault = f"failed ({what}) on {device} and is not used there"
    if fault is not None:
        instead = "plain torch is slower" if is_last else "another kernel is tried"
        warnings.warn(
            f"the kernel of {name} {fault}; {instead}: see cem-fast doctor --device {device.type} --check",
            stacklevel=2,
        )
    return agreed


def _find_triton(requested: str) -> tuple[str | None, str]:
    """Dispatch key of the Triton launchers, or None, and the reason."""
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
    return "CPU" if interpreting else "CUDA", "TRITON_INTERPRET=1" if interpreting else "compiled at first use"


@functools.cache
def cuda_library() -> ctypes.CDLL:
    """Loads the library of the compiled CUDA kernels, which defines ``torch.ops.cem_fast_cuda``.

    Raises:
        OSError: the library is missing or does not load; the message gives the reason.
    """
    if torch.version.cuda is None:
        raise OSError("this build of torch has no CUDA")
    try:
        path = _compiled("_C_cuda", "cuda")
    except OSError as error:
        raise OSError(f"the compiled CUDA kernels are not built: {error}") from None
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    compiled = ctypes.CDLL(str(path))
    if not hasattr(compiled, "cem_fast_cuda_serve"):
        raise OSError(f"{path.name} was built from older sources: install the package again")
    return compiled


@functools.cache
def cuda_operators() -> dict[str, torch._ops.OpOverload]:
    """Loads the compiled CUDA kernels as ``torch.ops.cem_fast_cuda``; needs no GPU and registers them nowhere else.

    Returns:
        The operator of every name in ``library.ON_CUDA``.

    Raises:
        OSError: the library is missing or does not load; the message gives the reason.

    Example:
        >>> from cem_fast.ops import backend
        >>> try:
        ...     names = set(backend.cuda_operators())
        ... except OSError as error:  # an installation without them
        ...     names = {"mixture_moments"}
        >>> "mixture_moments" in names
        True
    """
    cuda_library()
    for name in library.ON_CUDA:
        library.define(_CUDA_LIBRARY, name)
    return {name: getattr(torch.ops.cem_fast_cuda, name).default for name in library.ON_CUDA}


def _load_cuda(requested: str) -> tuple[dict[str, torch._ops.OpOverload], str]:
    """Compiled CUDA kernels by operator, none if they are not used, and the reason."""
    if requested not in ("auto", "cuda"):
        return {}, f"CEM_FAST_BACKEND={requested}"
    try:
        return cuda_operators(), "CEM_FAST_BACKEND=cuda" if requested == "cuda" else "built for this package"
    except OSError as error:
        if requested == "cuda":
            raise RuntimeError(f"CEM_FAST_BACKEND=cuda: {error}") from error
        return {}, str(error)


# Operators whose compiled CUDA kernels need fewer launches and less of the host's time than Triton's.
COMPILED_FIRST = ("component_statistics_fwd", "component_statistics_bwd", "entropy_bound", "cem_fwd")

# Others, of which that holds for one class without labels and at least so many components and dimensions.
COMPILED_FIRST_IF_LARGE = ("mixture_log_prob_fwd", "mixture_log_prob_bwd")
LARGE_COMPONENTS, LARGE_DIMENSIONS = 128, 32


def _is_large(x: Any, means: Any, labels: Any, keep: bool) -> bool:
    """Whether csrc/cuda/global_mixture.cu has kernels for a mixture; ``keep`` if responsibilities come in or out."""
    components, dimension = means.shape[1:]
    enough = components >= LARGE_COMPONENTS and dimension >= LARGE_DIMENSIONS
    return enough and labels is None and not keep and x.dtype != torch.float64


# Types of features, in the order of ``Element`` in csrc/common/problem.h.
ELEMENTS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def serve_compiled(compiled: ctypes.CDLL, name: str, choose: Callable[..., Any], dispatch_key: str) -> None:
    """Registers the compiled kernel of an operator, which serves without Python where it has agreed with the reference.

    Args:
        compiled: the library of the kernels.
        name: name of the operator.
        choose: serves the other calls, and says with ``note_agreement`` which ones it no longer wants.
        dispatch_key: kind of tensors.
    """
    library.define(_CHOICES, name)
    _CHOICES.impl(name, choose, dispatch_key)  # type: ignore[no-untyped-call]
    compiled.cem_fast_cuda_serve(name.encode(), dispatch_key.encode())


def note_agreement(
    compiled: ctypes.CDLL, name: str, device: torch.device, dtype: torch.dtype, agrees: bool = True
) -> None:
    """Notes whether the compiled kernel of an operator agrees with the reference on a device."""
    compiled.cem_fast_cuda_agree(name.encode(), ELEMENTS.index(dtype), device.index or 0, agrees)


def _register_gpu_kernels() -> None:
    """Registers Triton's and the compiled CUDA kernels; ``auto`` prefers one of them for each operator."""
    for name in library.ON_CUDA:
        triton: list[Callable[..., Any]] = [_triton_launcher(name)] if TRITON and name in library.EVERYWHERE else []
        compiled: list[Callable[..., Any]] = [CUDA[name]] if CUDA else []
        kernels = compiled + triton if name in COMPILED_FIRST else triton + compiled
        if kernels:
            kernel = _once_it_agrees(name, *kernels) if REQUESTED == "auto" else kernels[0]
            if REQUESTED == "auto" and compiled and triton and name in COMPILED_FIRST_IF_LARGE:
                kernel = _by_size(name, _once_it_agrees(name, *compiled, *triton), kernel)
            if REQUESTED == "auto" and compiled == kernels[:1]:
                serve_compiled(cuda_library(), name, kernel, TRITON or "CUDA")
            else:
                library.register(name, kernel, TRITON or "CUDA")
        if compiled and name in library.FITS["cuda"]:
            library.WHOLE_FITS.add((name, "cuda"))


def _warn_of_another_package() -> None:
    """Warns if this package, which was not compiled, hides an installed one that was, as in the folder of the sources."""
    for place in (Path(entry, PACKAGE.name).resolve() for entry in sys.path):
        if place != PACKAGE and any(place.glob("_C_cpu*")):
            warn(
                f"cem_fast is imported from {PACKAGE}, where its kernels are not compiled, and not from {place}, where they are: run "
                "from another folder; plain torch is slower"
            )
            return


def choose() -> tuple[str, CpuLibrary | None, str]:
    """Reads the environment and loads the CPU kernels if it selects them.

    Returns:
        The requested backend, the CPU library if it is in use, and the reason for the choice for CPU tensors.

    Raises:
        ValueError: a variable has an unknown value.
        RuntimeError: the requested implementation is not available; the message gives the reason.

    Example:
        >>> from cem_fast.ops import backend
        >>> requested, library, reason = backend.choose()
        >>> requested in backend.BACKENDS
        True
    """
    requested = _requested("CEM_FAST_BACKEND", BACKENDS) or "auto"
    capability = _requested("CEM_FAST_CPU_CAPABILITY", CAPABILITIES)
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
        _warn_of_another_package()
        return requested, None, str(error)
    if capability is None:
        return requested, cpu, "the widest instruction set of this processor"
    cpu.select(capability)
    return requested, cpu, f"CEM_FAST_CPU_CAPABILITY={capability}"


REQUESTED, CPU, _CPU_REASON = choose()
TRITON, _TRITON_REASON = _find_triton(REQUESTED)
CUDA, _CUDA_REASON = _load_cuda(REQUESTED)
_register_gpu_kernels()


def _on_cuda() -> str:
    """Implementation in use for CUDA tensors, and the reason."""
    compared = "; compared with the reference at first use" if REQUESTED == "auto" else ""
    if TRITON == "CUDA" and CUDA:
        large = f"mixtures of {LARGE_COMPONENTS} components or more"
        return f"compiled for {', '.join(COMPILED_FIRST)} and {large}, which is faster there; triton for the rest{compared}"
    if TRITON == "CUDA":
        return f"triton: {_TRITON_REASON}{compared}; cuda {_CUDA_REASON}"
    if CUDA:
        return f"compiled: {_CUDA_REASON}{compared}; triton {_TRITON_REASON}"
    return f"reference: triton {_TRITON_REASON}; cuda {_CUDA_REASON}"


def describe() -> dict[str, Any]:
    """Implementation in use for each kind of tensor, and the reason.

    Returns:
        The requested backend; the implementation and the reason for CPU and for CUDA tensors; and how the compiled parts were
        built, or None.

    Example:
        >>> import cem_fast
        >>> list(cem_fast.backends())
        ['backend asked for', 'on CPU tensors', 'on CUDA tensors', 'build']
    """
    try:
        build = importlib.import_module("cem_fast._C").build_info()
    except ImportError:
        build = None
    on_cpu = "triton (interpreted)" if TRITON == "CPU" else f"compiled ({CPU.capability})" if CPU else "reference"
    return {
        "backend asked for": REQUESTED,
        "on CPU tensors": f"{on_cpu}: {_CPU_REASON}",
        "on CUDA tensors": _on_cuda(),
        "build": build,
    }
