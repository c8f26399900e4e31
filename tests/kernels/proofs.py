"""Runs the tests in interpreted/ in a process where Triton interprets its kernels, on the right kernels and on wrong ones.

usage: python tests/kernels/proofs.py [--share F]

With a share below 1, only a random part of the long tests and of the wrong kernels is run; all of them take some 20 minutes.
Exit status: 0 if everything holds.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = Path("tests/kernels/interpreted")

# Runs pytest with cem_fast.kernels taken from another folder.
WITH_KERNELS = """
import importlib.util, sys
folder = sys.argv.pop(1)

class Kernels:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "cem_fast.kernels":
            return importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])

sys.meta_path.insert(0, Kernels)
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def interpreted(*arguments: str, kernels: Path = ROOT / "kernels") -> tuple[int, str]:
    """Runs pytest on interpreted kernels; returns its exit status and its output."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "CEM_FAST_BACKEND": "triton",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", WITH_KERNELS, str(kernels), "-q", "-x", "-p", "no:cacheprovider", "--timeout=1800"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


class Mutant(NamedTuple):
    file: str
    right: str
    wrong: str
    proof: str
    chosen: str


QUICK_ROWS = "test_against_the_reference and scanned and diag"
MUTANTS = {
    "gradient with the wrong sign": Mutant(
        "component_statistics.py", "factor * (x - mean)", "factor * (mean - x)", "test_operators.py", QUICK_ROWS
    ),
    "rows read past their end": Mutant(
        "_rows.py",
        "mask = valid[:, None] & inside[None, :]",
        "mask = valid[:, None] & (inside | True)[None, :]",
        "test_operators.py",
        "padding_of_nan and scanned",
    ),
    "last segment forgotten": Mutant(
        "_reduce.py", "in range(first, last)", "in range(first, last - 1)", "test_operators.py", QUICK_ROWS
    ),
    "stray labels counted": Mutant(
        "_reduce.py", 'float("nan"), total', "total, total", "test_operators.py", "out_of_range and scanned"
    ),
    "a version that is not listed": Mutant(
        "_aot.py", '_flags("DIAG"):', '[{"DIAG": False}]:', "test_operators.py", QUICK_ROWS
    ),
    "products of a single TensorFloat-32": Mutant(
        "_configs.py", '("tf32x3", "ieee")', '("tf32", "ieee")', "test_global_mixture.py", "forward and zero"
    ),
    "no distance taken directly": Mutant(
        "global_mixture.py", "constexpr(0.25)", "constexpr(1e30)", "test_global_mixture.py", "forward and apart"
    ),
    "a tile of components that is forgotten": Mutant(
        "global_mixture.py",
        "mass * tl.exp(highest - anchor)",
        "0 * mass",
        "test_global_mixture.py",
        "forward and offset",
    ),
    "a floor that is not read": Mutant(
        "global_mixture.py",
        "floor = tl.maximum(floor, tl.load(floor_ptr",
        "floor = tl.minimum(floor, tl.load(floor_ptr",
        "test_global_mixture.py",
        "few_components",
    ),
    "shares of components added up too early": Mutant(
        "global_mixture.py", "1) == shares - 1", "1) == 0", "test_global_mixture.py", "forward and offset and many"
    ),
    "rows of a class sorted in any order": Mutant(
        "_grouping.py", "i[None, :] < i[:, None]", "i[None, :] > i[:, None]", "test_operators.py", "counting_sorts"
    ),
    "x read twice": Mutant(
        "component_statistics.py",
        "    if resident is not None:",
        "    if False:",
        "test_traffic.py",
        "CEMLoss",
    ),
}


@functools.cache
def holds(proof: str, chosen: str) -> tuple[bool, str]:
    """Whether a proof passes on the right kernels, and its output. A proof that fails anyway notices nothing."""
    status, output = interpreted(str(INTERPRETED / proof), "-m", "not long", "-k", chosen)
    return status == 0, output


def is_caught(name: str) -> tuple[bool, str]:
    """Whether a proof passes on the right kernels and fails on a wrong copy, and its output."""
    mutant = MUTANTS[name]
    right, output = holds(mutant.proof, mutant.chosen)
    if not right:
        return False, f"fails on the right kernels:\n{output}"
    with tempfile.TemporaryDirectory() as folder:
        for source in (ROOT / "kernels").glob("*.py"):
            text = source.read_text()
            if source.name == mutant.file:
                assert mutant.right in text, f"{mutant.file} no longer says {mutant.right!r}"
                text = text.replace(mutant.right, mutant.wrong)
            Path(folder, source.name).write_text(text)
        proof = str(INTERPRETED / mutant.proof)
        status, output = interpreted(proof, "-m", "not long", "-k", mutant.chosen, kernels=Path(folder))
    # 1: tests ran and failed; anything else says nothing about the proof
    return status == 1, output


EVERYTHING = {
    "the operators as on a GPU": ("tests/ops/test_gpu.py",),
    # what the way through autograd and the dispatcher can break; values are compared above
    "the public functions": (
        "tests/ops/test_mixture_log_prob.py",
        "tests/ops/test_entropy_bound.py",
        "-k",
        "no_rows or strided or one_class or out_of_range or weight_zero or bad_labels or retained or few_samples",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0, help="part of the long tests and the wrong kernels to run")
    share = parser.parse_args().share
    failures = 0
    for name, arguments in {"the launchers": (str(INTERPRETED), f"--long-share={share}"), **EVERYTHING}.items():
        status, output = interpreted(*arguments)
        failures += status != 0
        print(output if status else f"{name}: {output.strip().splitlines()[-1]}", flush=True)
    wrong = [name for name in MUTANTS if random.random() < share]
    for name in wrong:
        caught, output = is_caught(name)
        failures += not caught
        print(f"wrong kernels, {name}: {'noticed' if caught else 'NOT noticed' + output}", flush=True)
    print(f"{1 + len(EVERYTHING) + len(wrong)} proofs, {failures} failures")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
