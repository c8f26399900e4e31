"""Times tile sizes of the Triton kernels on this machine's GPU and prints the rows to put into kernels/_configs.py.

usage: python benchmarks/tune_kernels.py [--family gradient ...] [--rows 8192] [--dimension 2048] [--classes 100]
           [--components 10] [--seconds 300] [--check]

Every tile size is timed with 4 and 8 warps, and the fastest with 2 and 3 stages, as replays of a CUDA graph. Each family has an
equal share of the seconds; what is left then is not tried. What cannot be launched, spills or breaks another promise of tests/aot
is left out, with the reason. With ``--check`` nothing is timed and no GPU is needed: of every tile size one kernel, chosen at
random, is compiled for an architecture chosen at random. Exit status: 0 if every family has a row, or, with ``--check``, if
everything compiles.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

if __name__ == "__main__":
    TESTS = Path(__file__).resolve().parents[1] / "tests"
    if not (TESTS / "aot").is_dir():
        raise SystemExit("tune_kernels judges by tests/aot, which is not installed: run it in the source tree")
    sys.path.insert(0, str(TESTS))

import torch
import triton
from aot import machine
from cem_fast.kernels import _aot, _configs, _launch
from cem_fast.kernels._configs import Config
from cem_fast.kernels.operators import OPERATORS

# Rows and dimensions of a tile, and components where a kernel can choose
CANDIDATES: dict[str, list[tuple[int, ...]]] = {
    "distance": [(32, 32), (64, 32), (32, 64), (64, 64)],
    "resident_narrow": [(32, 128), (64, 128)],
    "resident_wide": [(16, 512), (32, 512)],
    "gradient": [(64, 32), (128, 32), (64, 64), (32, 128)],
    "moments": [(32, 32), (64, 32), (32, 64), (64, 64)],
    "reduce": [(1, 512), (1, 1024), (1, 2048)],
    "entropy": [(1, 512), (1, 1024), (1, 2048)],
    "sort": [(128, 32), (256, 32), (128, 64)],
    "count": [(64, 32), (128, 32), (128, 64)],
    "product": [(64, 16, 32), (64, 32, 32), (64, 16, 64), (128, 16, 32)],
    "product_gradient": [(64, 32, 16), (64, 64, 16), (128, 32, 16)],
    "product_moments": [(16, 16, 64), (16, 32, 64), (32, 32, 64), (16, 64, 64)],
}
WARPS = (4, 8)
STAGES = (2, 3)  # of the fastest tile size; the others have one
TIMED_SHARE = 0.75  # of a family's seconds; the rest judges the machine code


class Shape(NamedTuple):
    rows: int
    dimension: int
    classes: int
    components: int


def candidates(family: str) -> Iterator[Config]:
    """Tile sizes and warps to try; those of the table come first."""
    tried = [
        Config(rows, width, warps, 1, *components)
        for (rows, width, *components), warps in itertools.product(CANDIDATES[family], WARPS)
    ]
    now = _configs.config(family, itemsize(family))
    yield from sorted(tried, key=lambda config: config != now)


def itemsize(family: str) -> int:
    """Bytes of the parameters that a family is tuned for: of float32, or of the labels that it sorts."""
    return min(_configs.TABLE[family]["*"])


def workload(family: str, shape: Shape, device: str) -> tuple[str, list[Any]]:
    """An operator that spends its time in the kernels of the family, and its arguments."""
    N, D, C, K = shape
    if family == "resident_narrow":
        D = min(D, _configs.config(family, 4).BLOCK_D)
    if family == "resident_wide":
        D = _configs.config(family, 4).BLOCK_D
    if family in ("sort", "count"):
        # nearly nothing but labels
        N, D, K = _configs.PAIRWISE_SORT_ROWS * (8 if family == "count" else 1), 1, 1
    if family.startswith("product"):
        C, K = 1, max(K * C, _configs.PRODUCT_COMPONENTS)
    on = {"device": device}
    x, labels = torch.rand(N, D, **on), torch.randint(0, C, (N,), **on)
    means, variances = torch.rand(C, K, D, **on), torch.rand(C, K, D, **on) + 0.1
    weights, prior = torch.full((C, K), 1 / K, **on), torch.full((C,), 1 / C, **on)
    row_weights, r = torch.rand(N, **on), torch.softmax(torch.rand(N, K, **on), 1)
    if family in ("sort", "count"):
        return "component_statistics_fwd", [x, means, labels, None, None, False, False]
    if family == "distance":
        return "mixture_log_prob_fwd", [x, means, variances, weights, labels, False]
    if family == "gradient":
        assignment = torch.randint(0, K, (N,), **on)
        return "component_statistics_bwd", [variances, None, x, means, labels, assignment]
    if family.startswith("product"):
        one = [x, means, variances, weights, None]
        log_prob, nothing = OPERATORS["mixture_log_prob_fwd"](*one, False)
        if family == "product":
            return "mixture_log_prob_fwd", [*one, False]
        name = "mixture_log_prob_bwd" if family == "product_gradient" else "mixture_moments"
        return name, [row_weights, *one, log_prob, nothing]
    if family in ("moments", "reduce"):
        return "mixture_moments", [row_weights, x, means, variances, weights, labels, row_weights, r]
    samples, noise = torch.tensor(50_000.0, dtype=torch.float64), torch.tensor([0.01], dtype=torch.float64)
    priors = [variances, weights, prior, samples.to(device), noise.to(device)]
    options = [False, 1.0, True, True, 0.125, 0.01]
    if family == "entropy":
        counts, scatter = torch.rand(C, K, **on) + 1, torch.rand(C, K, D, **on)
        return "entropy_bound", [counts, scatter, D, *priors, *options]
    return "cem_fwd", [x, means, labels, *priors, *options]


def milliseconds(operator: str, arguments: list[Any]) -> float:
    return triton.testing.do_bench_cudagraph(lambda: OPERATORS[operator](*arguments), quantiles=[0.5])


def said(failure: Exception) -> str:
    """Kind and first line of an error."""
    return ": ".join([type(failure).__name__, *str(failure).splitlines()[:1]])


def faults_of_case(family: str, config: Config, architecture: str, number: int) -> list[str]:
    """What one kernel of a family would do wrong under a configuration, from the machine code; empty if nothing."""
    case, arch = _aot.cases_under(family, itemsize(family), config)[number], machine.named(architecture)
    if not machine.serves(case, arch):
        return []
    try:
        wrong = machine.report(case, arch).faults(arch, case)
    except Exception as failure:  # whatever a compiler raises
        wrong = [said(failure)]
    return [f"{case.name} ({case.features}{', aligned' * bool(case.attrs)}): {fault}" for fault in wrong]


def faults(family: str, config: Config, architecture: str, pool: Executor | None = None) -> list[str]:
    """What every kernel of a family would do wrong under a configuration; compiled by a pool of processes if there is one."""
    numbers = range(len(_aot.cases_under(family, itemsize(family), config)))
    found = (map if pool is None else pool.map)(partial(faults_of_case, family, config, architecture), numbers)
    return [fault for of_case in found for fault in of_case]


def tune(
    family: str,
    architecture: str,
    shape: Shape,
    device: str = "cuda",
    time: Callable[[str, list[Any]], float] = milliseconds,
    faults: Callable[[str, Config, str], list[str]] = faults,
    deadline: float = math.inf,
) -> Config | None:
    """Puts the fastest configuration without a fault into the table, and returns it; None if there is no such.

    After the deadline, of the monotonic clock, only the first configuration is timed.
    """
    rows, size = _configs.TABLE[family], itemsize(family)
    before = rows.get(architecture, {})
    times: dict[Config, float] = {}

    def try_all(configs: Iterator[Config]) -> None:
        for config in configs:
            if times and monotonic() > deadline:
                print(f"  {family} {config}: no time left for it and what follows", flush=True)
                return
            rows[architecture] = before | {size: config}
            try:
                times[config] = time(*workload(family, shape, device))
            except Exception as failure:  # whatever a compiler or a driver raises
                print(f"  {family} {config}: left out: {said(failure)}", flush=True)
            else:
                print(f"  {family} {config}: {times[config]:.4f} ms", flush=True)

    try_all(candidates(family))
    if times:
        best = min(times, key=times.__getitem__)
        try_all(best._replace(num_stages=stages) for stages in STAGES)
    for config in sorted(times, key=times.__getitem__):
        found = faults(family, config, architecture)
        if not found:
            rows[architecture] = before | {size: config}
            print(f'"{family}": {{"{architecture}": {{{size}: {config}}}}}', flush=True)
            return config
        print(f"  {family} {config}: left out: {found[0]}", flush=True)
    rows[architecture] = before
    print(f"{family}: no tile size can be used here; the table keeps its row", flush=True)
    return None


def tune_all(families: list[str], architecture: str, shape: Shape, seconds: float) -> int:
    """Tunes families one after the other within a time; returns the exit status."""
    arch = machine.named(architecture)
    end, done = monotonic() + seconds, True
    # processes of their own: a fork of one that holds a GPU cannot use it, nor must it
    with ProcessPoolExecutor(
        int(os.environ.get("MAX_JOBS", os.cpu_count() or 1)),
        multiprocessing.get_context("spawn"),
        machine.ARCHITECTURES.__setitem__,
        (arch, machine.ARCHITECTURES[arch]),
    ) as pool:
        for place, family in enumerate(families):
            share = TIMED_SHARE * (end - monotonic()) / (len(families) - place)
            judge = partial(faults, pool=pool)
            best = tune(family, architecture, shape, faults=judge, deadline=monotonic() + share)
            done = done and best is not None
    return int(not done)


def compiled(family: str, config: Config, architecture: int | str, seed: int) -> tuple[str, bool]:
    """Compiles one kernel, chosen at random, under a configuration; returns what came out, and whether it compiled."""
    chosen = [c for c in _aot.cases_under(family, itemsize(family), config) if machine.serves(c, architecture)]
    case = random.Random(seed).choice(chosen)
    name = f"{family} {config}: {case.name} {case.features} for {architecture}"
    try:
        found = machine.report(case, architecture).faults(architecture, case)
    except Exception as failure:  # whatever a compiler raises
        return f"{name}: FAILED: {type(failure).__name__}: {failure}", False
    return f"{name}: {'would be left out: ' + '; '.join(found) if found else 'holds'}", True


def check(families: list[str]) -> int:
    """See the top of this file; returns the exit status."""
    jobs = [(family, config) for family in families for config in candidates(family)]
    jobs = [(family, config._replace(num_stages=random.choice((1, *STAGES)))) for family, config in jobs]
    places = [random.choice(list(machine.ARCHITECTURES)) for _ in jobs]
    seeds = [random.randrange(1 << 30) for _ in jobs]
    with ProcessPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        results = list(pool.map(compiled, *zip(*jobs), places, seeds))
    left_out = sum("left out" in text for text, _ in results)
    failures = [text for text, right in results if not right]
    print(*failures, sep="\n", end="\n" * bool(failures))
    print(f"{len(results)} tile sizes compiled, {left_out} would be left out, {len(failures)} failures")
    return int(bool(failures) or not results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="*", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--components", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=300, help="time for all families together (default: 300)")
    parser.add_argument("--check", action="store_true", help="time nothing; compile one kernel of every tile size")
    args = parser.parse_args()
    if args.check:
        return check(args.family)
    if not torch.cuda.is_available():
        raise SystemExit("tune_kernels.py: no GPU (--check needs none)")
    torch.manual_seed(0)
    index = torch.cuda.current_device()
    architecture = _launch._architecture(index)
    machine.know(architecture, torch.cuda.get_device_properties(index))
    shape = Shape(args.rows, args.dimension, args.classes, args.components)
    return tune_all(args.family, architecture, shape, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
