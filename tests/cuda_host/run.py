"""Runs the CUDA kernels on the host under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

usage: python tests/cuda_host/run.py

Every barrier of the kernels is then left out in turn, and ThreadSanitizer must notice each. Exit status: 0 if everything
holds.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cuda_host.host import Failure, Host, barriers, build
from cuda_host.problems import SHAPES, Problem, expected, problems
from tolerances import RELATIVE, relative_error

SANITIZERS = {"address,undefined": ["-fno-sanitize-recover=all"], "thread": []}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def agrees(host: Host, problem: Problem) -> bool:
    """Whether the kernels agree with the reference.

    Raises:
        Failure: a sanitizer stopped them.
    """
    results = getattr(host, problem.name)(*problem.arguments)
    pairs = zip((results,) if isinstance(results, torch.Tensor) else results, expected(problem), strict=True)
    return all(
        torch.equal(found, wanted)
        if not wanted.is_floating_point()
        else relative_error(found.nan_to_num(), wanted.nan_to_num()) <= RELATIVE[found.dtype]
        for found, wanted in pairs
    )


def all_problems() -> Iterator[Problem]:
    for shape in SHAPES:
        yield from problems(shape, torch.float32, shape[0] % 2 == 0)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        yield from problems(SHAPES[1], dtype, True)
    yield from problems(SHAPES[1], torch.float32, False, bad_labels=True)


def notices(program: Path, barrier: str) -> bool:
    """Whether a data race, or the crash that it leads to, is reported where one barrier is left out."""
    try:
        # several tiles of dimensions and of components; segments that are longer than a block
        with Host(program, CUDA_HOST_SKIP=barrier, **ENVIRONMENT) as host:
            for shape in ((40, 70, 2, 9), (600, 5, 1, 34)):
                for diag in (True, False):
                    for problem in problems(shape, torch.float32, diag):
                        agrees(host, problem)
    except Failure as failure:
        return "ThreadSanitizer" in str(failure)
    return False


def main() -> int:
    torch.manual_seed(0)
    runs, failures = 0, 0
    for name, flags in SANITIZERS.items():
        with tempfile.TemporaryDirectory() as folder:
            program = build(Path(folder), "-O1", "-g", f"-fsanitize={name}", *flags)
            calls, wrong = 0, 0
            try:
                with Host(program, **ENVIRONMENT) as host:
                    for problem in all_problems():
                        calls += 1
                        wrong += not agrees(host, problem)
            except Failure as failure:
                wrong += 1
                print(failure)
            print(f"{name}: {calls} calls, {wrong} wrong", flush=True)
            runs, failures = runs + calls, failures + wrong
            if name != "thread":
                continue
            for barrier in barriers():
                noticed = notices(program, barrier)
                print(f"{name}: without the barrier at {barrier} {'noticed' if noticed else 'NOT noticed'}", flush=True)
                runs, failures = runs + 1, failures + (not noticed)
    print(f"{runs} runs, {failures} failures")
    return int(failures > 0 or runs == 0)


if __name__ == "__main__":
    sys.exit(main())
