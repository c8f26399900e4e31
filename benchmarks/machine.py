"""Allocator, threads, garbage collector and memory: settings that timings depend on, fixed where possible and recorded."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

MALLOC = "GLIBC_TUNABLES"
KEEP_LARGE_BLOCKS = "glibc.malloc.mmap_threshold=4000000000:glibc.malloc.trim_threshold=8000000000"


def keep_large_blocks() -> None:
    """Restarts this command with an allocator that keeps large blocks, unless the user has tuned it.

    By default glibc maps every block of 32 MB or more again, so page faults would dominate the time of new tensors.
    """
    if platform.libc_ver()[0] == "glibc" and MALLOC not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, MALLOC: KEEP_LARGE_BLOCKS})


def processor() -> str:
    """Name of the processor."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[str]:
    """Runs torch on a number of threads, pinned to as many cores; yields a description.

    Args:
        threads: number of threads.

    Raises:
        ValueError: the process has fewer cores.

    Example:
        >>> import torch
        >>> from cem_fast.benchmarks import machine
        >>> with machine.pinned(1):
        ...     torch.get_num_threads()
        1
    """
    before, cores = torch.get_num_threads(), None
    if hasattr(os, "sched_setaffinity"):
        cores = os.sched_getaffinity(0)
        if threads > len(cores):
            raise ValueError(f"threads must be at most the {len(cores)} cores of this process, got {threads}")
        chosen = sorted(cores)[:threads]
        os.sched_setaffinity(0, chosen)
    torch.set_num_threads(threads)
    try:
        yield f"{threads} on cores {', '.join(map(str, chosen))}" if cores else f"{threads}, not pinned"
    finally:
        torch.set_num_threads(before)
        if cores:
            os.sched_setaffinity(0, cores)


def limit_pools(threads: int) -> None:
    """Limits all loaded thread pools to a number of threads, if threadpoolctl is installed."""
    with contextlib.suppress(ImportError):
        import threadpoolctl

        threadpoolctl.threadpool_limits(threads)


def pools() -> str:
    """Thread pools of the loaded libraries: ``openblas 2 (SkylakeX), openmp 2``."""
    try:
        import threadpoolctl
    except ImportError:
        return "unknown: threadpoolctl is not installed"
    found = []
    for pool in threadpoolctl.threadpool_info():
        architecture = f" ({pool['architecture']})" if "architecture" in pool else ""
        found.append(f"{pool['internal_api']} {pool['num_threads']}{architecture}")
    return ", ".join(dict.fromkeys(found)) or "none"


@contextlib.contextmanager
def older_objects_aside() -> Iterator[None]:
    """Hides objects created before the block from the garbage collector.

    Imported packages hold half a million objects; visiting all of them took longer than most timed calls.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def peak_of(call: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory that a call adds, in MiB; None if the system does not report it.

    On the CPU: resident pages of the process, after free blocks were returned to the system (Linux only).
    On CUDA: memory allocated by torch.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with contextlib.suppress(AttributeError, OSError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _kilobytes("VmRSS")
        call()
        return (_kilobytes("VmHWM") - before) / 1024
    except OSError:
        return None


def _kilobytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise OSError(f"{field} is not in /proc/self/status")
