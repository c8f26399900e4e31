"""Compiles every kernel that can be launched for every architecture; writes benchmarks/results/ahead_of_time.csv.

usage: python tests/aot/collect.py [--kernel NAME ...] [--share F]

The table holds the rows of several releases of Triton; those of the one at hand are made again, or, with ``--kernel``, those
of some kernels. With a share below 1, a random part is compiled and compared with the table instead. Exit status: 0 if
everything holds.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from aot.machine import ARCHITECTURES, Report, report, serves
from cem_fast.kernels import aot_cases

TABLE = Path(__file__).resolve().parents[2] / "benchmarks/results/ahead_of_time.csv"
KEY = ("triton", "kernel", "arch", "features", "aligned", "configuration")

CASES = aot_cases(everywhere=True)
JOBS = [(i, arch) for i, case in enumerate(CASES) for arch in ARCHITECTURES if serves(case, arch)]

Row = dict[str, str]


def key(case: Any, arch: int | str) -> Row:
    """The columns that say what was compiled."""
    constants = " ".join(
        f"{name}={value if isinstance(value, str) else int(value)}" for name, value in case.constexprs.items()
    )
    values = (
        triton.__version__,
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
    """Puts rows into the table in place of those of the same kernels and the same Triton."""
    kernels = {(row["triton"], row["kernel"]) for row in found}
    kept = (
        [row for row in written().values() if (row["triton"], row["kernel"]) not in kernels] if TABLE.exists() else []
    )
    with TABLE.open("w", newline="") as file:
        file.write("# python tests/aot/collect.py, with each Triton\n")
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(kept + found, key=key_of))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", nargs="*", help="only these kernels")
    parser.add_argument("--share", type=float, default=1.0, help="part of the table to compile, chosen at random")
    args = parser.parse_args()
    rng = random.Random()
    chosen = [job for job in JOBS if args.kernel is None or CASES[job[0]].name in args.kernel]
    jobs = [job for job in chosen if rng.random() < args.share]
    table = written() if args.share < 1 else {}
    known = any(version == triton.__version__ for version, *_ in table)
    rows, failures = [], 0
    with ProcessPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        for found, faults in pool.map(row, jobs):
            rows.append(found)
            if known and table.get(key_of(found)) != found:
                faults.append("not what the table says")
            failures += bool(faults)
            if faults:
                print(*found.values(), "; ".join(faults), flush=True)
    if args.share == 1 and rows:
        write(rows)
    print(f"{len(rows)} compiled by Triton {triton.__version__}, {failures} failures")
    return int(failures > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
