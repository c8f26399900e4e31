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


def _once_it_agrees(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Kernel of an operator, replaced by the reference on devices where the two disagree.

    The first call with features of a type on a device compares them, which waits for the device. Calls during the capture of a
    CUDA graph cannot compare and use the kernel, which must have run before with the same shapes: a capture cannot load kernels.
    """
    agrees: dict[tuple[torch.device, torch.dtype], bool] = {}
    arguments = [text.split()[-1] for text in library.SCHEMAS[name].strip("(").split(",")]
    place = arguments.index("x" if "x" in arguments else "counts")

    def serve(*args: Any) -> Any:
        features = args[place]
        case = features.device, features.dtype
        agreed = agrees.get(case)
        if agreed is None:
            if case[0].type == "cuda" and torch.cuda.is_current_stream_capturing():
                return kernel(*args)
            agreed = _agrees(name, kernel, *case)
            if agreed is not None:
                agrees[case] = agreed
        return kernel(*args) if agreed else getattr(reference, name)(*args)

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


def _agrees(name: str, kernel: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> bool | None:
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
        warnings.warn(
            f"the kernel of {name} {fault}; plain torch is slower: see cem-fast doctor --device {device.type} --check",
            stacklevel=2,
        )
    return agreed


def _load_triton(requested: str) -> tuple[str | None, str]:
    """Registers the Triton launchers; returns their dispatch key, or None, and the reason."""
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
        library.register(name, _once_it_agrees(name, launcher) if requested == "auto" else launcher, key)
    if interpreting:
        return key, "TRITON_INTERPRET=1"
    return key, "compiled at first use" + (", and compared with the reference then" if requested == "auto" else "")


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
    if torch.version.cuda is None:
        raise OSError("this build of torch has no CUDA")
    try:
        path = _compiled("_C_cuda", "cuda")
    except OSError as error:
        raise OSError(f"the compiled CUDA kernels are not built: {error}") from None
    torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    for name in library.ON_CUDA:
        library.define(_CUDA_LIBRARY, name)
    return {name: getattr(torch.ops.cem_fast_cuda, name).default for name in library.ON_CUDA}


def _load_cuda(requested: str) -> tuple[bool, str]:
    """Registers the compiled CUDA kernels for CUDA tensors; where Triton handles those, only whole fits.

    Returns:
        Whether they serve all operations, and the reason.
    """
    if requested not in ("auto", "cuda"):
        return False, f"CEM_FAST_BACKEND={requested}"
    try:
        operators = cuda_operators()
    except OSError as error:
        if requested == "cuda":
            raise RuntimeError(f"CEM_FAST_BACKEND=cuda: {error}") from error
        return False, str(error)
    behind_triton = requested == "auto" and TRITON is not None
    for name in library.FITS["cuda"] if behind_triton else operators:
        operator = operators[name]
        library.register(name, _once_it_agrees(name, operator) if requested == "auto" else operator, "CUDA")
        library.WHOLE_FITS.add((name, "cuda"))
    if behind_triton:
        return False, "Triton's kernels serve"
    return True, "CEM_FAST_BACKEND=cuda" if requested == "cuda" else "compared with the reference at first use"


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
TRITON, _TRITON_REASON = _load_triton(REQUESTED)
CUDA, _CUDA_REASON = _load_cuda(REQUESTED)


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
