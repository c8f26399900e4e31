"""Triton's JIT on a device that is not there: kernels are compiled and launched as on an H200, and nothing runs.

CPU tensors stand for those of the device. Launches cost the host what they cost with a device, but for the driver's call.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from aot.device import Launch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
WARP = 32


_seen: list[Launch] | None = None


@contextlib.contextmanager
def recording() -> Iterator[list[Launch]]:
    """Lists the launches inside the block."""
    global _seen
    before, _seen = _seen, []
    try:
        yield _seen
    finally:
        _seen = before


def _registers(cubin: bytes) -> int:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"REG:(\d+)", usage.stdout)[1])


class _Utils:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024, "multiprocessor_count": 132, "warpSize": WARP}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        registers = _registers(kernel)
        return object(), SimpleNamespace(registers=registers), registers, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        self.name, self.names = metadata.name, source.fn.arg_names
        self.threads, self.shared = metadata.num_warps * WARP, metadata.shared

    def __call__(self, x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
        if _seen is None:
            return
        values = dict(zip(self.names, rest[-len(self.names) :]))
        numbers = {name: int(value) for name, value in values.items() if isinstance(value, (bool, int))}
        _seen.append(Launch(self.name, x * y * z, self.threads, function.registers, self.shared, numbers=numbers))


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, architecture: int) -> None:
        self.utils, self.target = _Utils(), GPUTarget("cuda", architecture, WARP)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install(architecture: int = 90) -> None:
    """Makes Triton compile for an architecture and launch nothing, for the rest of the process."""
    driver.set_active(_Driver(architecture))
