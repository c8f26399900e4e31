"""Compiles the CUDA kernels for every architecture, warnings as errors, and records what each kernel takes.

usage: python benchmarks/cuda_registers.py [--check]

Writes ``benchmarks/results/cuda_registers.csv``: kernel, architecture, registers, spilled bytes and shared bytes, after a
line that names the compiler. With ``--check`` nothing is written: it is an error if the table of the same compiler differs,
and a kernel that is made to spill must be noticed. Exit status: 0 if nothing spills and everything holds.
"""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc" / "cuda"
TABLE = Path(__file__).resolve().parent / "results" / "cuda_registers.csv"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 103, 120)
FLAGS = ["-O3", "-std=c++20", "-Xptxas=-v", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]

ELEMENTS = {"f": "float", "d": "double", "6__half": "half", "13__nv_bfloat16": "bfloat16"}


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


def readable(symbol: str) -> str:
    """``distance_kernel<true, half>`` of a mangled name: the kernel and its template arguments."""
    found = re.search(r"(?<=\d)([a-z][a-z_]*_kernel)(.*)", symbol)
    if found is None:
        raise ValueError(f"unexpected kernel {symbol}")
    name, rest = found.groups()
    arguments = re.match(r"I(.*?)E?Ev", rest)
    if arguments is None:
        return name
    pattern = r"Lb([01])E|NS0_\d+([A-Za-z]+)I([fd])E|(13__nv_bfloat16|6__half)|([fd])"
    parts = [
        ("true" if boolean == "1" else "false")
        if boolean
        else f"{template}<{ELEMENTS[of]}>"
        if template
        else ELEMENTS[half or plain]
        for boolean, template, of, half, plain in re.findall(pattern, arguments[1])
    ]
    return f"{name}<{', '.join(parts)}>"


def compile_one(source: Path, architecture: int) -> list[Kernel]:
    """Compiles one file for one architecture; returns its kernels.

    Raises:
        RuntimeError: the compiler failed or warned, with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", *FLAGS, f"-arch=sm_{architecture}", "-c", str(source), "-o", f"{folder}/object.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} for sm_{architecture}: {done.stdout}{done.stderr}")
    pattern = r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n"
    return sorted(
        Kernel(
            readable(symbol),
            f"sm_{architecture}",
            int(registers),
            int(stores) + int(loads),
            int((re.search(r"(\d+) bytes smem", rest) or [0, 0])[1]),
        )
        for symbol, stores, loads, registers, rest in re.findall(pattern, done.stderr + "\n", re.DOTALL)
    )


def table() -> list[Kernel]:
    jobs = [(source, architecture) for source in sorted(SOURCES.glob("*.cu")) for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        kernels = [kernel for found in pool.map(lambda job: compile_one(*job), jobs) for kernel in found]
    return sorted(set(kernels))


def compiler() -> str:
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return "nvcc " + re.search(r"V([\d.]+)", said)[1]


def text(kernels: list[Kernel]) -> str:
    out = io.StringIO(newline="")
    out.write(f"# {compiler()}\n")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Kernel._fields)
    writer.writerows(kernels)
    return out.getvalue()


def spilling(kernels: list[Kernel]) -> list[Kernel]:
    return [kernel for kernel in kernels if kernel.spilled_bytes > 0]


def starved() -> list[Kernel]:
    """The moments where so many blocks must fit a multiprocessor that their registers do not."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "csrc")
        shutil.copytree(SOURCES.parent, copy)
        header = copy / "cuda" / "block.cuh"
        right = header.read_text()
        wrong = right.replace("kBlocks = 4", "kBlocks = 16")
        assert wrong != right
        header.write_text(wrong)
        return compile_one(copy / "cuda" / "mixture_moments.cu", 90)


def main() -> int:
    check = "--check" in sys.argv[1:]
    kernels = table()
    for kernel in spilling(kernels):
        print(f"{kernel.name} spills {kernel.spilled_bytes} bytes on {kernel.architecture}")
    failures = len(spilling(kernels)) + (not kernels)
    if not check:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text(kernels))
    else:
        recorded = TABLE.read_text()
        if recorded != text(kernels) and recorded.startswith(f"# {compiler()}\n"):
            print(f"{TABLE.relative_to(ROOT)} is out of date: run python benchmarks/cuda_registers.py")
            failures += 1
        noticed = bool(spilling(starved()))
        print(f"a kernel that spills {'noticed' if noticed else 'NOT noticed'}")
        failures += not noticed
    print(f"{len(kernels)} kernels on {len(ARCHITECTURES)} architectures, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
