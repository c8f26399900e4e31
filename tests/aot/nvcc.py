"""Compiles the CUDA C++ kernels for every architecture, warnings as errors, and reads what each of them needs."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from aot import machine

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
FLAGS = ["-O3", "-std=c++20", "-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
LIMITS = {arch: limits for arch, limits in machine.ARCHITECTURES.items() if isinstance(arch, int)}
LIMITS[103] = LIMITS[100]
WARPS = 4  # of a block

JOBS = [(source, arch) for source in sorted(SOURCES.glob("*.cu")) for arch in LIMITS]
ELEMENTS = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}


@functools.cache
def name() -> str:
    """The compiler and its release, as the table names it."""
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"V([\d.]+)", said)[1]


def readable(symbol: str) -> tuple[str, str]:
    """``distance_kernel`` and ``true half`` of a mangled name: the kernel and its template arguments."""
    found = re.search(r"(?<=\d)([a-z][a-z_]*_kernel)(.*)", symbol)
    if found is None:
        raise ValueError(f"unexpected kernel {symbol}")
    kernel, rest = found.groups()
    arguments = re.match(r"I(.*?)Ev", rest)
    if arguments is None:
        return kernel, ""
    pattern = r"Lb([01])E|NS0_\d+([A-Za-z]+)I([fd])E|(13__nv_bfloat16|6__half)|([fd])"
    parts = [
        ("true" if boolean == "1" else "false")
        if boolean
        else f"{template}<{ELEMENTS[of]}>"
        if template
        else ELEMENTS[half or plain]
        for boolean, template, of, half, plain in re.findall(pattern, arguments[1])
    ]
    return kernel, " ".join(parts)


def rows(job: tuple[Path, int]) -> list[tuple[dict[str, str], list[str]]]:
    """Compiles one file for one architecture; returns a row of the table for each of its kernels, and what is wrong with it.

    Raises:
        RuntimeError: the compiler failed or warned, with what it said.
    """
    source, arch = job
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch=sm_{arch}", "-c", str(source), "-o", f"{folder}/object.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} for sm_{arch}: {done.stdout}{done.stderr}")
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n"
    found = []
    for symbol, stores, loads, registers, rest in re.findall(pattern, done.stderr + "\n", re.DOTALL):
        kernel, arguments = readable(symbol)
        shared, spills = int((re.search(r"(\d+) bytes smem", rest) or [0, 0])[1]), int(stores) + int(loads)
        warps = machine.warps_by_registers(int(registers))
        row = {
            "compiler": name(),
            "kernel": kernel,
            "arch": f"sm_{arch}",
            "features": "",
            "aligned": "",
            "configuration": arguments,
            "registers": registers,
            "spills": str(spills),
            "shared_bytes": str(shared),
            "occupancy": str(machine.occupancy(LIMITS[arch], WARPS, warps, shared)),
            # what stands in the machine code is read of Triton's kernels alone
            "accesses": "",
            "wide": "",
            "tensor": "",
            "wide share": "",
        }
        found.append((row, [f"{spills} bytes of spills"] * bool(spills)))
    return found


def starved() -> bool:
    """Whether spills are noticed: of the moments, where so many blocks must fit a multiprocessor that their registers do not."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "csrc")
        shutil.copytree(SOURCES.parent, copy)
        header = copy / "cuda" / "block.cuh"
        right = header.read_text()
        wrong = right.replace("kBlocks = 4", "kBlocks = 16")
        assert wrong != right
        header.write_text(wrong)
        return any(faults for _, faults in rows((copy / "cuda" / "mixture_moments.cu", 90)))
