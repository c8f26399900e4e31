"""Compiles every kernel that can be launched for every architecture; writes benchmarks/results/ahead_of_time.csv.

usage: python tests/aot/collect.py [--share F]

With a share below 1, a random part is compiled and compared with the table instead, if the table is of this Triton.
Exit status: 0 if everything holds.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import triton
from aot.machine import ARCHITECTURES, Report, report
from cem_fast.kernels import aot_cases

TABLE = Path(__file__).resolve().parents[2] / "benchmarks/results/ahead_of_time.csv"
KEY = ("kernel", "arch", "features", "aligned", "configuration")

CASES = aot_cases()


def key(case: Any, arch: int | str) -> dict[str, str]:
    """The columns that say what was compiled."""
    constants = " ".join(f"{name}={int(value)}" for name, value in case.constexprs.items())
    values = (
        case.name,
        f"sm_{arch}" if isinstance(arch, int) else arch,
        case.features,
        str(int(bool(case.attrs))),
        f"{constants} warps={case.options['num_warps']}",
    )
    return dict(zip(KEY, values))


def row(job: tuple[int, int | str]) -> tuple[dict[str, str], list[str]]:
    """One row of the table, and what is wrong with it."""
    case, arch = CASES[job[0]], job[1]
    found: Report = report(case, arch)
    share = round(found.wide / max(1, found.accesses), 3)
    values = {name: str(value) for name, value in {**asdict(found), "wide share": share}.items()}
    return key(case, arch) | values, found.faults(arch, case.vectorized)


def written() -> tuple[str, dict[tuple[str, ...], dict[str, str]]]:
    """The Triton that the table was made with, and its rows by what was compiled."""
    with TABLE.open(newline="") as file:
        version = file.readline().removeprefix("# triton ").split(";")[0]
        return version, {tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}


def write(rows: Iterable[dict[str, str]]) -> None:
    rows = list(rows)
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        file.write(f"# triton {triton.__version__}; python tests/aot/collect.py\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="part of the table to compile, chosen at random")
    share = parser.parse_args().share
    rng = random.Random()
    jobs = [(i, arch) for i in range(len(CASES)) for arch in ARCHITECTURES if rng.random() < share]
    version, table = written() if share < 1 else ("", {})
    rows, failures = [], 0
    with ProcessPoolExecutor(2) as pool:
        for found, faults in pool.map(row, jobs):
            rows.append(found)
            if version == triton.__version__ and table.get(tuple(found[name] for name in KEY)) != found:
                faults.append("not what the table says")
            failures += bool(faults)
            if faults:
                print(*found.values(), "; ".join(faults), flush=True)
    if share == 1:
        write(rows)
    print(f"{len(rows)} compiled by Triton {triton.__version__}, {failures} failures")
    return int(failures > 0 or not rows)


if __name__ == "__main__":
    sys.exit(main())
