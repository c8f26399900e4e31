"""The CUDA kernels, compiled for the host and called with torch's CPU tensors as ``torch.ops.cem_fast`` is."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from cem_fast.ops import library

HERE = Path(__file__).resolve().parent
# CUDA_HOST_SOURCES takes a changed copy of them
SOURCES = Path(os.environ.get("CUDA_HOST_SOURCES", HERE.parent.parent / "csrc" / "cuda"))
FLAGS = ["-std=c++20", "-pthread", "-ffp-contract=fast", "-Wall", "-Wextra", "-Werror"]
FLAGS += ["-DCEM_FAST_SMALL_PARTS", f"-I{HERE}"]
ELEMENTS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def build(folder: Path, *flags: str) -> Path:
    """Compiles the driver with every kernel; returns the program."""
    program = folder / "driver"
    objects = [*_kernels(folder, flags), *_compile(folder, [HERE / "driver.cpp"], flags)]
    _link(program, objects, *flags)
    return program


def build_library(folder: Path, *flags: str) -> Path:
    """Compiles the launchers of torch's tensors with every kernel; returns the library."""
    library = folder / "launchers.so"
    flags = ("-fPIC", *flags)
    kernels = _kernels(folder, flags)
    headers = [argument for path in include_paths() for argument in ("-isystem", path)]
    for_torch = [
        *flags,
        *headers,
        "-fvisibility=hidden",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-include",
        str(HERE / "torch_host.h"),
    ]
    launchers = _compile(folder, [SOURCES / "register.cpp", HERE / "torch_host.cpp"], for_torch)
    libraries = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu", "-lc10"]
    _link(library, [*kernels, *launchers], *flags, "-shared", libraries=libraries)
    return library


def _kernels(folder: Path, flags: Sequence[str]) -> list[Path]:
    """Objects of all kernels, compiled once for the program and the library of a folder, also by two processes."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources, done = sorted(SOURCES.glob("*.cu")), folder / "kernels are compiled"
        objects = [folder / f"{source.name}.o" for source in sources]
        if not done.exists():
            _compile(folder, sources, (*flags, "-fPIC"))
            done.touch()
    return objects


def _compile(folder: Path, sources: list[Path], flags: Sequence[str]) -> list[Path]:
    objects = [folder / f"{source.name}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        command = [_compiler(), *FLAGS, *flags, f"-I{SOURCES}", "-x", "c++", "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    return objects


def _link(target: Path, objects: list[Path], *flags: str, libraries: Sequence[str] = ()) -> None:
    subprocess.run([_compiler(), *flags, "-pthread", *map(str, objects), "-o", str(target), *libraries], check=True)


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def barriers() -> Iterator[str]:
    """Barriers of the kernels, as ``CUDA_HOST_SKIP`` names them.

    A barrier "for other blocks" is left out: blocks run one after the other here, so that nothing can show that it is missing.
    """
    for source in sorted(SOURCES.glob("*.cuh")):
        for number, line in enumerate(source.read_text().splitlines(), 1):
            if "__syncthreads();" in line and "for other blocks" not in line:
                yield f"{source.name}:{number}"


class Failure(RuntimeError):
    """The program ended in the middle of a call; the message is what it said."""


class Host:
    """A running driver; its operators are called by name: ``host.cem_fwd(...)``."""

    def __init__(self, program: Path, **environment: str) -> None:
        self.launches = self.waits = 0
        self.hung = False
        self._process = subprocess.Popen(
            [program],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **environment},
        )

    def close(self) -> None:
        _, said = self._process.communicate()
        if self._process.returncode != 0:
            raise Failure(said.decode())

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Ends the program if a call takes longer: it then fails, and ``hung`` says why."""

        def end() -> None:
            self.hung = True
            self._process.kill()

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._process.kill()
            self._process.communicate()

    def __getattr__(self, name: str) -> Any:
        if name not in library.SCHEMAS:
            raise AttributeError(name)
        return lambda *args: self._call(name, args)

    def _call(self, name: str, args: tuple[Any, ...]) -> Any:
        fakes = library.FAKES[name](*args)
        outputs = (fakes,) if isinstance(fakes, Tensor) else fakes
        message = name.encode().ljust(64, b"\0") + b"".join(_PACK[name](outputs, *args))
        try:
            self._process.stdin.write(message)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise Failure(self._process.stderr.read().decode()) from None
        launched, waited = struct.unpack("2q", self._read(16))
        self.launches, self.last_launches = launched, launched - self.launches
        self.waits, self.last_waits = waited, waited - self.waits
        results = tuple(
            torch.frombuffer(bytearray(self._read(o.nbytes)), dtype=o.dtype).view(o.shape)
            if o.numel()
            else torch.empty(o.shape, dtype=o.dtype)
            for o in outputs
        )
        return results[0] if isinstance(fakes, Tensor) else results

    def _read(self, size: int) -> bytes:
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise Failure(self._process.stderr.read().decode())
        return data


class Launchers:
    """The launchers of torch's tensors, on the host; its operators are called by name. One to a process."""

    def __init__(self, path: Path) -> None:
        torch.ops.load_library(path)
        self._names = torch.library.Library("cem_fast_cuda_host", "DEF")
        for name in library.ON_CUDA:
            self._names.define(name + library.SCHEMAS[name])
        self._path = path
        self.library = ctypes.CDLL(str(path))

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return getattr(torch.ops.cem_fast_cuda_host, name).default

    def fail_after(self, launches: int) -> None:
        """Lets the launch after so many others fail."""
        self.library.cuda_host_fail_after(ctypes.c_int64(launches))

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Lets launches become nodes of a graph."""
        self.library.cuda_host_capture(True)
        try:
            yield
        finally:
            self.library.cuda_host_capture(False)

    def fills(self) -> int:
        """Fills of memory since the last call: nodes of a graph that are no kernels."""
        return self.library.cuda_host_fills()

    def launches(self) -> list[tuple[str, int, int, int]]:
        """Launches since the last call, of a library built with ``CUDA_HOST_IDLE``, which runs none of them.

        Returns:
            Mangled name of the kernel, blocks, threads of a block, and bytes of its dynamic shared memory.
        """
        found: list[tuple[int, ...]] = []
        collect = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(lambda *launch: found.append(launch))
        self.library.cuda_host_launches(collect)
        return [(self._names_of[kernel - self._base], *rest) for kernel, *rest in found]

    @functools.cached_property
    def _names_of(self) -> dict[int, str]:
        """Functions of the library by their place in it."""
        listed = subprocess.run(["nm", self._path], check=True, capture_output=True, text=True).stdout.splitlines()
        symbols = (line.split() for line in listed)
        return {int(at, 16): name for at, kind, name in (s for s in symbols if len(s) == 3) if kind in "tTW"}

    @functools.cached_property
    def _base(self) -> int:
        """Address of the library."""
        known = next(at for at, name in self._names_of.items() if name == "cuda_host_fail_after")
        return ctypes.cast(self.library.cuda_host_fail_after, ctypes.c_void_p).value - known


def _integers(*values: int) -> bytes:
    return struct.pack(f"{len(values)}q", *map(int, values))


def _bytes(t: Tensor) -> bytes:
    return bytes(t.detach().contiguous().view(-1).view(torch.uint8).numpy())


def _input(t: Tensor | None) -> bytes:
    return _integers(-1) if t is None else _integers(t.nbytes) + _bytes(t)


def _outputs(*tensors: Tensor | None) -> bytes:
    return _integers(*(-1 if t is None else t.nbytes for t in tensors))


def _features(x: Tensor) -> bytes:
    """Rows as they lie, gaps included."""
    N, D = x.shape
    stride = x.stride(0) if N > 1 else D
    span = x.as_strided(((N - 1) * stride + D if N else 0,), (1,))
    return _input(span) + _integers(stride, ELEMENTS.index(x.dtype), N, D)


def _mixture(
    means: Tensor, labels: Tensor | None, variances: Tensor | None = None, weights: Tensor | None = None
) -> bytes:
    C, K, _ = means.shape
    tensors = b"".join(_input(t) for t in (labels, means, variances, weights))
    return _integers(C, K) + tensors + _integers(variances is not None and variances.dim() == 3)


def _kept(responsibilities: Tensor) -> Tensor | None:
    return responsibilities if responsibilities.shape[1] else None


def _bound(outputs, D, variances, weights, prior, samples, noise, official, boost, unbiased, mean, threshold, gamma):
    C, K = weights.shape
    yield _integers(C, K, D, variances.dim() == 3)
    yield from map(_input, (variances, weights, prior, samples, noise))
    yield _integers(noise.numel(), official) + struct.pack("d", boost) + _integers(unbiased, mean)
    yield struct.pack("2d", threshold, gamma) + _outputs(*outputs)


def _log_prob_fwd(outputs, x, means, variances, weights, labels, keep):
    yield _features(x) + _mixture(means, labels, variances, weights)
    yield _outputs(outputs[0], outputs[1] if keep else None)


def _log_prob_bwd(outputs, grad, x, means, variances, weights, labels, log_prob, responsibilities):
    yield _features(x) + _mixture(means, labels, variances, weights)
    yield _input(grad) + _input(log_prob) + _input(_kept(responsibilities)) + _outputs(*outputs)


def _moments(outputs, row_weights, x, means, variances, weights, labels, log_prob, responsibilities):
    yield _features(x) + _mixture(means, labels, variances, weights)
    yield _input(row_weights) + _input(_kept(responsibilities)) + _outputs(*outputs)


def _statistics_fwd(outputs, x, means, labels, variances, weights, per_dimension, sums):
    counts, scatter, totals, assignment = outputs
    yield _features(x) + _mixture(means, labels, variances, weights) + _integers(per_dimension)
    yield _outputs(counts, scatter, totals if sums else None, assignment)


def _statistics_bwd(outputs, grad, scale, x, means, labels, assignment):
    C, K, _ = means.shape
    yield _features(x) + _integers(C, K) + _input(labels) + _input(means) + _integers(-1, -1, grad.dim() == 3)
    yield _input(grad) + _input(scale) + _input(assignment) + _outputs(*outputs)


def _entropy_bound(outputs, counts, scatter, D, variances, *rest):
    yield _input(counts) + _input(scatter) + _integers(variances.dtype == torch.float64)
    yield from _bound(outputs, D, variances, *rest)


def _cem_fwd(outputs, x, means, labels, variances, weights, *rest):
    yield _features(x) + _mixture(means, labels)
    yield from _bound(outputs[:2], x.shape[1], variances, weights, *rest)
    yield _outputs(outputs[2])


def _kmeans(outputs, x, means, labels, max_iter, tol, per_dimension):
    yield _features(x) + _mixture(means, labels) + _integers(max_iter) + struct.pack("d", tol)
    yield _integers(per_dimension) + _outputs(*outputs)


def _expectation_maximization(outputs, x, means, variances, weights, labels, max_iter, tol, reg_covar):
    yield _features(x) + _mixture(means, labels, variances, weights) + _integers(max_iter)
    yield struct.pack("3d", tol, reg_covar, torch.finfo(means.dtype).tiny) + _outputs(*outputs)


_PACK = {
    "kmeans": _kmeans,
    "expectation_maximization": _expectation_maximization,
    "mixture_log_prob_fwd": _log_prob_fwd,
    "mixture_log_prob_bwd": _log_prob_bwd,
    "mixture_moments": _moments,
    "component_statistics_fwd": _statistics_fwd,
    "component_statistics_bwd": _statistics_bwd,
    "entropy_bound": _entropy_bound,
    "cem_fwd": _cem_fwd,
}
