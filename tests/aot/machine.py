"""Compiles a case of ``cem_fast.kernels.aot_cases()`` for an architecture and reads what came out of the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from cem_fast.kernels._configs import product_precision
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor offers, and what one program may use of its shared memory."""

    shared_kib: int
    warps: int


ARCHITECTURES: dict[int | str, Limits] = {
    75: Limits(64, 32),
    80: Limits(163, 64),
    86: Limits(99, 48),
    89: Limits(99, 48),
    90: Limits(227, 64),
    100: Limits(227, 64),
    120: Limits(99, 48),
    "gfx90a": Limits(64, 32),
    "gfx942": Limits(64, 32),
    "gfx950": Limits(160, 32),
}


def named(architecture: str) -> int | str:
    """The key of ``ARCHITECTURES`` for what kernels/_configs.py calls ``sm_90`` or ``gfx942``."""
    return int(architecture.removeprefix("sm_")) if architecture.startswith("sm_") else architecture


def know(architecture: str, device: Any) -> None:
    """Learns the limits of a device, from torch's properties of it, unless they stand in the table."""
    limits = Limits(
        device.shared_memory_per_block_optin // 1024, device.max_threads_per_multi_processor // device.warp_size
    )
    ARCHITECTURES.setdefault(named(architecture), limits)


# Its tensor cores multiply nothing longer than half precision.
WITHOUT_FLOAT32_PRODUCTS = {75}


@dataclass(frozen=True)
class Report:
    """What one compiled kernel needs and does."""

    registers: int
    spills: int  # NVIDIA: instructions that touch local memory; AMD: vector registers kept in memory
    shared_bytes: int
    occupancy: float  # resident warps over those that a multiprocessor can hold
    accesses: int  # to global memory, as instructions
    wide: int  # of them, how many move 128 bits
    tensor: int  # instructions of tensor cores (NVIDIA) or matrix cores (AMD)

    def faults(self, arch: int | str, case: Any) -> list[str]:
        """What breaks the promises of a case, in words; empty if nothing does."""
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared_bytes > ARCHITECTURES[arch].shared_kib * 1024:
            found.append(f"{self.shared_bytes} bytes of shared memory, at most {ARCHITECTURES[arch].shared_kib} KiB")
        if case.vectorized and not self.wide:
            found.append(f"none of {self.accesses} accesses is 128 bits wide")
        if case.precision is not None and arch not in WITHOUT_FLOAT32_PRODUCTS and not self.tensor:
            found.append("no tensor-core instruction")
        return found


def serves(case: Any, arch: int | str) -> bool:
    """Whether a case is ever launched on an architecture."""
    return case.precision in (None, product_precision(str(arch)))


def report(case: Any, arch: int | str) -> Report:
    """Compiles a case and reads its machine code."""
    source = ASTSource(fn=case.fn, signature=case.signature, constexprs=case.constexprs, attrs=case.attrs)
    target = GPUTarget("cuda", arch, 32) if isinstance(arch, int) else GPUTarget("hip", arch, 64)
    compiled = triton.compile(source, target=target, options=dict(case.options))
    read = _nvidia if isinstance(arch, int) else _amd
    return read(compiled, ARCHITECTURES[arch], case.options["num_warps"])


def occupancy(limits: Limits, warps: int, warps_by_registers: int, shared_bytes: int) -> float:
    """Resident warps over those that a multiprocessor can hold, for programs of so many warps and bytes."""
    # the driver keeps a KiB of shared memory for itself in every program
    by_shared = (limits.shared_kib + 1) * 1024 // (shared_bytes + 1024)
    programs = min(warps_by_registers // warps, by_shared, limits.warps // warps)
    return round(programs * warps / limits.warps, 3)


def warps_by_registers(registers: int) -> int:
    """Warps whose registers a multiprocessor of NVIDIA holds: handed out in eights, to each thread of a warp."""
    return 65536 // (-(-registers // 8) * 8 * 32)


def _nvidia(compiled: Any, limits: Limits, warps: int) -> Report:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run([TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    shared = compiled.metadata.shared
    return Report(
        registers=registers,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared_bytes=shared,
        occupancy=occupancy(limits, warps, warps_by_registers(registers), shared),
        accesses=len(re.findall(r"\b(?:LDG|STG)\.E", code)),
        wide=len(re.findall(r"\b(?:LDG|STG)\.E[.\w]*\.128", code)),
        tensor=len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code)),
    )


def _amd(compiled: Any, limits: Limits, warps: int) -> Report:
    code = compiled.asm["amdgcn"]

    def counted(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", code)[1])

    registers, shared = counted("vgpr_count"), compiled.metadata.shared
    return Report(
        registers=registers,
        spills=counted("vgpr_spill_count"),
        shared_bytes=shared,
        # four units of 512 registers each, handed out in eights
        occupancy=occupancy(limits, warps, 4 * (512 // (-(-registers // 8) * 8)), shared),
        accesses=len(re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", code)),
        wide=len(re.findall(r"\b(?:global|buffer)_(?:load|store)_dwordx4\b", code)),
        tensor=len(re.findall(r"\bv_mfma_", code)),
    )
