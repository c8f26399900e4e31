"""Predicts the time of the operations on a GPU and writes benchmarks/results/gpu_model.csv. Needs no GPU.

usage: python tests/aot/gpu_model.py [--check]

Launches, grids and shared memory are recorded: Triton's from its JIT with launches that go nowhere, those of CUDA C++ from the
launchers built for the host. Registers are those of the compilers. What a kernel waits for stands in work_triton.py and
work_cuda.py, and the time that follows from it in device.py; docs/internals/gpu_model.md explains the model.

With ``--check`` nothing is written: the rows must be those of the table, the host's time within a factor of three.
Exit status: 0 if everything holds.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from aot import device, faked, nvcc, work_cuda, work_triton
from aot.device import A100, H200, Device, Launch, Work
from cem_fast.benchmarks.gpu_profile import CASES, least_bytes
from cem_fast.kernels.operators import OPERATORS
from cuda_host.host import Launchers, build_library
from torch.utils._python_dispatch import TorchDispatchMode

from cem_fast import CEMLoss
from cem_fast.functional import mixture_log_prob
from cem_fast.ops import backend, library, validate

HERE = Path(__file__).resolve()
TABLE = HERE.parents[2] / "benchmarks/results/gpu_model.csv"
AHEAD_OF_TIME = TABLE.with_name("ahead_of_time.csv")
BEFORE = HERE.parent / "version_0_1.json"
# The host's time of an empty backward pass on the idle machine of the table (AMD EPYC, torch 2.14)
ENGINE_US = 18.0
# of glibc's mallopt
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
SERVES = "CUDA C++"  # what ``auto`` takes for every case
COMPILED = (*backend.COMPILED_FIRST, *library.FITS["cuda"])  # operators whose kernels of CUDA C++ come first
MOST_OFF = 3.0  # between two measurements of the host's time


class Asked(NamedTuple):
    """What one call asks of the device and of the host."""

    launches: list[tuple[Launch, Work]]
    torch_operations: int
    waits: int
    host_us: float
    scratch: int  # bytes of temporary memory


def row(case: str, version: str, serves: str, asked: Asked, on: Device) -> dict[str, str]:
    """One row of the table."""
    shape, clock = CASES[case], on.clock_ghz * 1e3
    least = least_bytes(case)
    busy = [work_cuda.busy_blocks(shape, launch) for launch, _ in asked.launches]
    times = [device.microseconds(*one, on, blocks) for one, blocks in zip(asked.launches, busy)]
    of_torch = asked.torch_operations * device.TORCH_US + asked.waits * device.WAIT_US
    on_device = sum(times) + of_torch
    slowest, _ = max(zip(asked.launches, times), key=lambda pair: pair[1])
    launch, work = slowest
    streams = [device.in_flight(one, of, on) for one, of in asked.launches if of.requested]
    values: dict[str, Any] = {
        "case": case,
        "version": version,
        "serves": serves,
        "device": on.name,
        "launches": len(times) + asked.torch_operations,
        "slowest": launch.kernel,
        "programs": launch.blocks,
        "programs_per_multiprocessor": round(launch.blocks / on.multiprocessors, 2),
        "threads": launch.threads,
        "registers": launch.registers,
        "shared_bytes": launch.shared,
        "blocks_per_multiprocessor": on.resident(launch),
        "dependent_steps": round(max(of.steps for _, of in asked.launches), 1),
        "path_us": round(work.path / clock, 2),
        "bytes_in_flight_kb": round(min(streams, default=0) / 1024, 1),
        "bytes_share": round(max(1.0, sum(of.moved for _, of in asked.launches) / least), 3),
        "scratch_share": round(asked.scratch / shape.features, 3),
        "floor_us": round(least / on.memory_tb_s / 1e6, 2),
        "device_us": round(on_device, 1),
        "host_us": round(asked.host_us, 1),
        # the host does not run ahead of the device where it waits for it
        "predicted_us": round(on_device if asked.waits else max(on_device, asked.host_us), 1),
        "kernels": " + ".join(f"{one.kernel} {took:.1f}" for (one, _), took in zip(asked.launches, times)),
    }
    return {name: str(value) for name, value in values.items()}


def before() -> Iterator[dict[str, str]]:
    """Rows of version 0.1, from its recorded launches."""
    recorded = json.loads(BEFORE.read_text())
    for case, shape in CASES.items():
        launches = [
            Launch(**{name: value for name, value in one.items() if name != "case"})
            for one in recorded["launches"]
            if one["case"] == case
        ]
        of_torch = recorded["torch"].get(case, {"operations": 0, "waits": 0})
        host = recorded["host_us"].get(case, 0) + device.TRITON_CALL_US * len(launches)
        asked = Asked(
            [(launch, work_triton.work_of(shape, launch)) for launch in launches],
            of_torch["operations"],
            of_torch["waits"],
            host,
            recorded["scratch"].get(case, 0),
        )
        yield row(case, "0.1", "Triton", asked, H200)


# ---- the launchers of this tree


@functools.cache
def _by_nvcc(architecture: str = "sm_90") -> dict[tuple[str, str], tuple[int, int]]:
    """Registers and static shared memory of the CUDA C++ kernels, from the table that collect.py checks."""
    with AHEAD_OF_TIME.open(newline="") as file:
        file.readline()
        rows = [
            row for row in csv.DictReader(file) if row["compiler"].startswith("nvcc") and row["arch"] == architecture
        ]
    return {(row["kernel"], row["configuration"]): (int(row["registers"]), int(row["shared_bytes"])) for row in rows}


class _Operations(TorchDispatchMode):
    """Counts torch's own operations that launch a kernel."""

    IDLE = ("empty", "new_empty", "detach", "alias", "lift_fresh", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::")
        ours = function.namespace != "aten"
        self.count += not (ours or function.is_view or name.startswith(self.IDLE))
        return function(*args, **(kwargs or {}))


class Served:
    """The operators of CPU tensors, served by launchers that run nothing, through the package's own path.

    Kernels of CUDA C++ serve without Python, as where they have agreed with the reference. While torch's operations are
    counted, and for Triton's kernels, Python chooses.
    """

    def __init__(self, folder: Path) -> None:
        faked.install()
        # results stay uninitialized: nothing may look at them
        validate.is_readable = lambda value: False
        self.compiled = Launchers(
            build_library(folder, "-O1", "-DCUDA_HOST_FIBERS", "-DCUDA_HOST_IDLE", "-UCEM_FAST_SMALL_PARTS")
        )
        of_cuda = {name: getattr(self.compiled, name) for name in library.ON_CUDA}
        of_triton = {name: backend._triton_launcher(name) for name in OPERATORS}
        self.backends = {"Triton": of_triton, "CUDA C++": of_cuda}
        self.now: dict[str, Callable[..., Any]] = {}
        self.counting: _Operations | None = None
        for name in library.SCHEMAS:
            if name in COMPILED:
                backend.serve_compiled(self.compiled.library, name, self._operator(name), "CPU")
            else:
                library.register(name, self._operator(name), "CPU")

    def use(self, name: str) -> None:
        """Lets a backend serve from now on."""
        self.now = self.backends[name]
        self._agree(name == "CUDA C++")

    def _agree(self, agrees: bool) -> None:
        for name in COMPILED:
            backend.note_agreement(self.compiled.library, name, torch.device("cpu"), torch.float32, agrees)

    def _operator(self, name: str) -> Callable[..., Any]:
        def serve(*args: Any) -> Any:
            if self.counting is None:
                return self.now[name](*args)
            with self.counting:  # torch leaves it at the operator
                return self.now[name](*args)

        return serve

    def launches(self, call: Callable[[], Any]) -> tuple[list[Launch], list[Launch], int]:
        """The launches of a call, of Triton and of CUDA C++, and torch's own operations."""
        self.compiled.launches()
        self.counting = _Operations()
        self._agree(False)
        with faked.recording() as seen, self.counting:
            call()
        self._agree(self.now is self.backends["CUDA C++"])
        operations, self.counting = self.counting.count, None
        found = []
        for symbol, blocks, threads, dynamic in self.compiled.launches():
            kernel, arguments = nvcc.readable(symbol)
            registers, fixed = _by_nvcc()[kernel, arguments]
            found.append(Launch(kernel, blocks, threads, registers, fixed + dynamic, arguments))
        return list(seen), found, operations

    def asked(self, case: str) -> Asked:
        """What a step of a case asks of the device and of the host."""
        if "iteration" in case:
            return self._iteration(case)
        shape, call = CASES[case], step_of(case)
        call()
        of_triton, of_cuda, operations = self.launches(call)
        works = [(launch, work_triton.work_of(shape, launch)) for launch in of_triton]
        works += [(launch, work_cuda.work_of(shape, launch)) for launch in of_cuda]
        driver = device.TRITON_CALL_US * len(of_triton) + device.CPP_CALL_US * len(of_cuda)
        # on the CPU, torch's own operations compute: few rows
        host = added_us(step_of(case, rows=64) if operations else call)
        return Asked(works, operations, 0, host + driver, scratch(call))

    def _iteration(self, case: str) -> Asked:
        """One iteration of a fit: a call with one more, less the same call without it."""
        shape, fit = CASES[case], fit_of(case, self.now)
        fit(1)
        _, few, _ = self.launches(lambda: fit(2))
        _, many, _ = self.launches(lambda: fit(3))
        launches = list((Counter(_frozen(many)) - Counter(_frozen(few))).elements())
        works = [(launch, work_cuda.work_of(shape, launch)) for launch in map(_thawed, launches)]
        host = max(0.0, host_us(lambda: fit(10)) - host_us(lambda: fit(2))) / 8
        return Asked(works, 0, 0, host + device.CPP_CALL_US * len(works), scratch(lambda: fit(2)))


def _frozen(launches: list[Launch]) -> list[tuple[Any, ...]]:
    return [launch[:-1] for launch in launches]


def _thawed(launch: tuple[Any, ...]) -> Launch:
    return Launch(*launch)


def host_us(call: Callable[[], Any]) -> float:
    """The processor's time of a call in microseconds: the least of many, because other programs only add to it."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(500):
        start = time.thread_time_ns()
        call()
        best = min(best, time.thread_time_ns() - start)
    return best / 1e3


def engine_us() -> float:
    """The host's time of a backward pass through nothing, which a training step has with any loss."""
    x, one = torch.zeros((), requires_grad=True), torch.ones(())
    return host_us(lambda: torch.autograd.grad(x.view(()), x, one))


def added_us(call: Callable[[], Any]) -> float:
    """What a call adds to the host's time of a training step, on an idle processor: the median of five measurements."""

    def measured() -> float:
        before, took, after = engine_us(), host_us(call), engine_us()
        slower = min(before, after) / ENGINE_US  # other programs slow down this one
        return took / slower - ENGINE_US

    return statistics.median(measured() for _ in range(5))


def keep_memory() -> None:
    """Makes large allocations as cheap as those of torch's allocator on a GPU: freed memory stays with the process."""
    libc = ctypes.CDLL(None)
    for option in (MMAP_THRESHOLD, TRIM_THRESHOLD):
        libc.mallopt(option, 2**31 - 1 if option == TRIM_THRESHOLD else 2**30)


def scratch(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates and frees."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
    events = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept
    return sum(size for size in events if size > 0) - sum(events)


def step_of(case: str, rows: int | None = None) -> Callable[[], Any]:
    """Forward and backward of a case, through the public functions."""
    N, D, C, K, diag = CASES[case]
    N = rows or N
    x, means = torch.rand(N, D, requires_grad=True), torch.rand(C, K, D)
    variances, weights = torch.rand(C, K, *[D] * diag) + 0.1, torch.full((C, K), 1 / K)
    if case.startswith("mixture"):
        grad = torch.rand(N)
        return lambda: torch.autograd.grad(mixture_log_prob(x, means, variances, weights), x, grad)
    loss = CEMLoss(num_classes=C, num_components=K, noise_std=0.1, covariance_type="diag" if diag else "spherical")
    prior, one = torch.full((C,), 1 / C), torch.ones(())
    loss.load_mixture(means=means, variances=variances, weights=weights, class_prior=prior, num_samples=50_000)
    labels = torch.randint(0, C, (N,))
    return lambda: torch.autograd.grad(loss(x, labels), x, one)


def fit_of(case: str, operators: dict[str, Callable[..., Any]]) -> Callable[[int], Any]:
    """A fit of a case with a number of iterations."""
    N, D, C, K, diag = CASES[case]
    x, means = torch.rand(N, D), torch.rand(C, K, D)
    if case.startswith("kmeans"):
        return lambda count: operators["kmeans"](x, means, None, count, 0.0, diag)
    variances, weights = torch.rand(C, K, *[D] * diag) + 0.1, torch.full((C, K), 1 / K)
    maximize = operators["expectation_maximization"]
    return lambda count: maximize(x, means, variances, weights, None, count, 0.0, 1e-6)


def now(folder: Path) -> Iterator[dict[str, str]]:
    """Rows of this tree: as ``auto`` serves each case, then by each backend alone."""
    keep_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    served = Served(folder)
    for name in served.backends:
        served.use(name)
        for case in CASES:
            if name == "Triton" and "iteration" in case:
                continue  # it has no kernels for whole iterations
            asked = served.asked(case)
            if name == SERVES:
                yield row(case, "now", name, asked, H200)
            yield row(case, f"now, {name} alone", name, asked, H200)
            if name == "CUDA C++":
                yield row(case, f"now, {name} alone", name, compiled_for(A100, asked), A100)


def compiled_for(where: Device, asked: Asked) -> Asked:
    """The same launches with the registers of another architecture."""
    moved = []
    for launch, work in asked.launches:
        registers, _ = _by_nvcc(f"sm_{where.architecture}")[launch.kernel, launch.configuration]
        moved.append((launch._replace(registers=registers), work))
    return asked._replace(launches=moved)


def main() -> int:
    if backend.REQUESTED != "reference":  # plain torch, until the launchers take its place
        environment = os.environ | {"CEM_FAST_BACKEND": "reference"}
        return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = [*now(Path(folder)), *before()]
    if args.check:
        return check(rows)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    for found in rows:
        print(
            *(found[name] for name in ("version", "case", "predicted_us", "device_us", "host_us", "kernels")), sep="  "
        )
    return 0


def key_of(row: dict[str, str]) -> tuple[str, ...]:
    return row["case"], row["version"], row["device"]


def check(rows: list[dict[str, str]]) -> int:
    """Compares rows with the table; returns the exit status."""
    with TABLE.open(newline="") as file:
        written = {key_of(row): row for row in csv.DictReader(file)}
    faults = [f"{key}: not made again" for key in written.keys() - {key_of(row) for row in rows}]
    for found in rows:
        wanted = written.get(key_of(found), {})
        for name, value in found.items():
            if not alike(name, value, wanted.get(name, ""), found):
                faults.append(
                    f"{found['case']}, {found['version']}: {name} is {value}, the table says {wanted.get(name)}"
                )
    print(*faults, f"{len(rows)} rows made again, {len(faults)} differences", sep="\n")
    return int(bool(faults))


def alike(name: str, value: str, wanted: str, found: dict[str, str]) -> bool:
    """Whether a value is that of the table; the host's time, and what follows from it, about."""
    if value == wanted or name not in ("host_us", "predicted_us"):
        return value == wanted
    return wanted != "" and 1 / MOST_OFF <= float(value) / float(wanted) <= MOST_OFF


if __name__ == "__main__":
    sys.exit(main())
