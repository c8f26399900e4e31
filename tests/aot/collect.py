"""Compiles every kernel for every architecture, Triton's as launched and CUDA C++'s with nvcc where that is installed, and
writes benchmarks/results/ahead_of_time.csv.

usage: python tests/aot/collect.py [--compiler triton nvcc] [--kernel NAME ...] [--check [--share F]]

The table holds the rows of several compilers; those of the ones at hand are made again, or, with ``--kernel``, those of some
of Triton's kernels. With ``--check`` nothing is written: what is compiled, all or a random part, must be what the table says
of the same compiler, and a kernel that is made to spill must be noticed. Exit status: 0 if everything holds.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from aot import nvcc
from aot.machine import ARCHITECTURES, Report, report, serves
from cem_fast.kernels import aot_cases

TABLE = Path(__file__).resolve().parents[2] / "benchmarks/results/ahead_of_time.csv"
KEY = ("compiler", "kernel", "arch", "features", "aligned", "configuration")

CASES = aot_cases(everywhere=True)
JOBS = [(i, arch) for i, case in enumerate(CASES) for arch in ARCHITECTURES if serves(case, arch)]

Row = dict[str, str]


def key(case: Any, arch: int | str) -> Row:
    """The columns that say what was compiled."""
    constants = " ".join(
        f"{name}={value if isinstance(value, str) else int(value)}" for name, value in case.constexprs.items()
    )
    values = (
        f"triton {triton.__version__}",
        case.name,
        f"sm_{arch}" if isinstance(arch, int) else arch,
        case.features,
        str(int(bool(case.attrs))),
        f"{constants} warps={case.options['num_warps']}",
    )
    return dict(zip(KEY, values))


def key_of(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def row(job: tuple[int, int | str]) -> tuple[Row, list[str]]:
    """One row of the table, and what is wrong with it."""
    case, arch = CASES[job[0]], job[1]
    found: Report = report(case, arch)
    share = round(found.wide / max(1, found.accesses), 3)
    values = {name: str(value) for name, value in {**asdict(found), "wide share": share}.items()}
    return key(case, arch) | values, found.faults(arch, case)


def written() -> dict[tuple[str, ...], Row]:
    """The rows of the table by what was compiled, and with what."""
    with TABLE.open(newline="") as file:
        file.readline()
        return {key_of(row): row for row in csv.DictReader(file)}


def write(found: list[Row]) -> None:
    """Puts rows into the table in place of those of the same kernels and the same compiler."""
    kernels = {(row["compiler"], row["kernel"]) for row in found}
    kept = (
        [row for row in written().values() if (row["compiler"], row["kernel"]) not in kernels] if TABLE.exists() else []
    )
    with TABLE.open("w", newline="") as file:
        file.write("# python tests/aot/collect.py, with each Triton\n")
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + found, key=key_of))


def compiled(jobs: list[tuple[int, int | str]], files: list[tuple[Path, int]]) -> Iterator[tuple[Row, list[str]]]:
    """Rows of Triton's cases and of the files of CUDA C++, each with what is wrong with it."""
    with ProcessPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        yield from pool.map(row, jobs)
        for found in pool.map(nvcc.rows, files):
            yield from found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    there = ["triton", *(["nvcc"] if shutil.which("nvcc") else [])]
    parser.add_argument("--compiler", nargs="+", choices=there, default=there, help="only these compilers")
    parser.add_argument("--kernel", nargs="*", help="only these of Triton's kernels")
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--share", type=float, default=1.0, help="with --check: part to compile, chosen at random")
    args = parser.parse_args()
    if args.share < 1 and not args.check:
        parser.error("--share: a part of the table can only be compared with it (--check)")
    with_nvcc = "nvcc" in args.compiler and args.kernel is None
    jobs = [job for job in JOBS if args.kernel is None or CASES[job[0]].name in args.kernel]
    jobs = [job for job in jobs if "triton" in args.compiler and random.random() < args.share]
    files = [job for job in nvcc.JOBS if with_nvcc and random.random() < args.share]
    table = written() if args.check else {}
    known = {compiler for compiler, *_ in table}
    found: dict[tuple[str, ...], Row] = {}
    failures = 0
    for line, faults in compiled(jobs, files):
        # what several files of CUDA C++ include is the same in each
        if found.setdefault(key_of(line), line) != line:
            faults.append("not what another file made of it")
        if line["compiler"] in known and table.get(key_of(line)) != line:
            faults.append("not what the table says")
        failures += bool(faults)
        if faults:
            print(*line.values(), "; ".join(faults), flush=True)
    if not args.check and found:
        write(list(found.values()))
    if args.check and files:
        noticed = nvcc.starved()
        failures += not noticed
        print(f"a kernel that spills {'noticed' if noticed else 'NOT noticed'}")
    by = {compiler: sum(compiler == line["compiler"] for line in found.values()) for compiler, *_ in found}
    print(", ".join(f"{count} kernels compiled by {name}" for name, count in by.items()) + f"; {failures} failures")
    return int(failures > 0 or not found)


if __name__ == "__main__":
    sys.exit(main())
