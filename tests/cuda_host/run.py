"""Runs the CUDA kernels on the host under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

usage: python tests/cuda_host/run.py

Every barrier of the kernels is then left out in turn, and ThreadSanitizer must notice each; and the launchers, and what blocks
do for each other, are made wrong, one way after the other, which the tests must notice. Exit status: 0 if everything holds.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cuda_host.host import HERE, SOURCES, Failure, Host, barriers, build
from cuda_host.problems import GLOBAL_SHAPES, SHAPES, Problem, allowed, expected, problems
from support.tolerances import relative_error

SANITIZERS = {"address,undefined": ["-fno-sanitize-recover=all"], "thread": []}
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}

HANGS = 100  # seconds, which no call takes
TRIES = 12  # of the problems of one class, half of whose races ThreadSanitizer misses: it forgets accesses at random

# Several classes to a block; several tiles of dimensions and of components; rows that are sorted in turns
QUICK = ((20, 5, 5, 3), (20, 300, 2, 3), (40, 70, 2, 9), (70, 5, 2, 3))
# More classes than threads; segments that are longer than a block
SLOW = ((150, 2, 200, 1), (600, 5, 1, 34))


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
        else relative_error(found.nan_to_num(), wanted.nan_to_num()) <= allowed(problem, found)
        for found, wanted in pairs
    )


def all_problems() -> Iterator[Problem]:
    for shape in SHAPES:
        yield from problems(shape, torch.float32, shape[0] % 2 == 0)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        yield from problems(SHAPES[1], dtype, True)
    yield from problems(SHAPES[1], torch.float32, False, bad_labels=True)
    for shape in GLOBAL_SHAPES:
        for diag in (False, True):
            yield from of_one_class(shape, diag)


def of_one_class(shape: tuple[int, int, int, int], diag: bool) -> Iterator[Problem]:
    """Log-likelihoods without labels, and their gradients."""
    return (one for one in problems(shape, torch.float32, diag, labeled=False) if "log_prob" in one.name)


def racing_problems() -> list[Problem]:
    """Problems that show every barrier, the quick ones first: a barrier is noticed by the first that shows it."""
    of_one = [problem for _ in range(TRIES) for problem in of_one_class(GLOBAL_SHAPES[0], True)]
    found = [*labeled(QUICK), *of_one, *labeled(SLOW)]
    # the operator with most problems comes last: others show its barriers, too
    return sorted(found, key=lambda problem: problem.name == "component_statistics_fwd")


def labeled(shapes: Sequence[tuple[int, int, int, int]]) -> Iterator[Problem]:
    for shape in shapes:
        for diag in (True, False):
            yield from problems(shape, torch.float32, diag)


def notices(program: Path, racing: Sequence[Problem], barrier: str) -> bool:
    """Whether a data race, the crash that it leads to, or a call without an end is seen where one barrier is left out."""
    host = Host(program, CUDA_HOST_SKIP=barrier, **ENVIRONMENT)
    try:
        with host:
            for problem in racing:
                with host.within(HANGS):
                    getattr(host, problem.name)(*problem.arguments)
    except Failure as failure:
        return host.hung or "ThreadSanitizer" in str(failure)
    return False


class Mutant(NamedTuple):
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...] = ("test_launchers.py",)


AT_THE_SAME_TIME = ("test_cuda_host.py", "-k", "same_time")


LAUNCHERS = {
    "the device's guard": Mutant("register.cpp", "torch::stable::accelerator::DeviceGuard guard_", "int32_t guard_"),
    "the current stream": Mutant("queue.cuh", "static_cast<cudaStream_t>(context_.stream)", "nullptr"),
    "the check of a launch": Mutant("queue.cuh", "if (status != cudaSuccess) throw", "if (false) throw"),
    "64 bits of an offset": Mutant("component_statistics.cuh", "row[r] * x_.stride", "int(row[r] * x_.stride)"),
    "counters that are ready again": Mutant("block.cuh", "if (last) *ticket = 0;", ""),
    "counters of a sort that are ready again": Mutant("sort.cuh", "*taken = *sorted = 0;", "ready = true;"),
    "the wait for a sort": Mutant("sort.cuh", "while (!ready) ready = is_sorted();", "", AT_THE_SAME_TIME),
    "the last block to leave a sort": Mutant("sort.cuh", "ranges + gridDim.x", "ranges + 1", AT_THE_SAME_TIME),
    "counters of a graph": Mutant("ticket.cuh", "queue.is_captured()", "false"),
    "neighbors made of what lies apart": Mutant(
        "../common/arguments.h", "t.is_contiguous() ? t.const", "true ? t.const"
    ),
}


def launchers_notice(name: str) -> bool:
    """Whether the tests of the launchers fail where something is left out."""
    mutant = LAUNCHERS[name]
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder, "csrc")
        shutil.copytree(SOURCES.parent, sources)
        file = sources / "cuda" / mutant.file
        text = file.read_text()
        assert mutant.right in text, f"{mutant.file} no longer says {mutant.right!r}"
        file.write_text(text.replace(mutant.right, mutant.wrong))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--timeout=1800", *mutant.tests]
        environment = os.environ | {"CUDA_HOST_SOURCES": str(sources / "cuda")}
        done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True)
    # a test failed, or the process crashed; that nothing was compiled says nothing
    return (done.returncode == 1 and "failed" in done.stdout.splitlines()[-1]) or done.returncode < 0


def main() -> int:
    torch.manual_seed(0)
    runs, failures = 0, 0
    pool = ThreadPoolExecutor(os.cpu_count())
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
            left_out, noticing = list(barriers()), functools.partial(notices, program, racing_problems())
            for barrier, noticed in zip(left_out, pool.map(noticing, left_out), strict=True):
                print(f"{name}: without the barrier at {barrier} {'noticed' if noticed else 'NOT noticed'}", flush=True)
                runs, failures = runs + 1, failures + (not noticed)
    for name, noticed in zip(LAUNCHERS, pool.map(launchers_notice, LAUNCHERS), strict=True):
        print(f"launchers without {name}: {'noticed' if noticed else 'NOT noticed'}", flush=True)
        runs, failures = runs + 1, failures + (not noticed)
    print(f"{runs} runs, {failures} failures")
    return int(failures > 0 or runs == 0)


if __name__ == "__main__":
    sys.exit(main())
