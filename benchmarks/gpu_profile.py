"""Times each backend on this machine's GPU, on the shapes of the speed model, next to what the model predicts.

usage: python benchmarks/gpu_profile.py [--save FILE] [--case NAME ...]

Times are of replayed CUDA graphs, which leave out the host, against the least bytes that an operation can move and the rate of a
copy on the same device. Where ``ncu`` is installed, its counters of every kernel follow. It takes less than two minutes.
Exit status: 0 if every case ran, 1 otherwise or without a GPU.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cem_fast.ops import backend, library

ROOT = Path(__file__).resolve().parents[1]
PREDICTED = ROOT / "benchmarks/results/gpu_model.csv"
COPY_BYTES = 1 << 30
CALLS, REPLAYS = 10, 9  # of a graph
ITERATIONS = (2, 10)  # of a fit: the difference is that of whole iterations
NCU_SECONDS = 40
COUNTERS = {
    "gpu__time_duration.sum": "us",
    "dram__bytes.sum": "MB",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "% of memory's peak",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "% of warps",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
}

Operators = dict[str, Callable[..., Any]]


class Shape(NamedTuple):
    """Rows, dimensions, classes, components of each; variances per dimension or not."""

    N: int
    D: int
    C: int
    K: int
    diag: bool

    @property
    def features(self) -> int:
        """Bytes of x."""
        return 4 * self.N * self.D

    @property
    def means(self) -> int:
        """Bytes of the means."""
        return 4 * self.C * self.K * self.D

    @property
    def variances(self) -> int:
        """Bytes of the variances."""
        return self.means if self.diag else 4 * self.C * self.K


CASES = {
    "cem 128x512 C10": Shape(128, 512, 10, 5, False),
    "cem 8192x512 C1000": Shape(8192, 512, 1000, 5, False),
    "cem 65536x512 C100": Shape(65536, 512, 100, 5, False),
    "cem 65536x512 C100 diag": Shape(65536, 512, 100, 5, True),
    "cem 4096x2048 C100": Shape(4096, 2048, 100, 5, False),
    "cem 4096x2048 C100 diag": Shape(4096, 2048, 100, 5, True),
    "mixture 4096x128 K1000": Shape(4096, 128, 1, 1000, True),
    "kmeans iteration 16384x512 K10": Shape(16384, 512, 1, 10, False),
    "em iteration 16384x512 K10": Shape(16384, 512, 1, 10, True),
}


def least_bytes(case: str) -> int:
    """Bytes that must be moved: x read in each direction, its gradient written once, the parameters read once."""
    shape, passes = CASES[case], 1 if "iteration" in case else 3
    return passes * shape.features + shape.means + (shape.variances if shape.diag else 0)


class Line(NamedTuple):
    """A measured case; ``note`` says why there is no time."""

    case: str
    backend: str
    us: float | None = None
    share: float | None = None  # of the time that a copy of the least bytes takes
    predicted_us: float | None = None
    note: str = ""


def backends() -> dict[str, Operators]:
    """The operators by backend: as the package chooses, and those of each backend that is there."""
    found: dict[str, Operators] = {"auto": dict(library.OPERATORS)}
    if importlib.util.find_spec("triton") is not None and importlib.util.find_spec("cem_fast.kernels") is not None:
        found["triton"] = dict(importlib.import_module("cem_fast.kernels.operators").OPERATORS)
    try:
        found["cuda"] = dict(backend.cuda_operators())
    except OSError as reason:
        print(f"without the compiled kernels: {reason}", flush=True)
    return found


def call_of(case: str, operators: Operators, device: str) -> Callable[..., Any]:
    """Forward and backward of a case, or, of a fit, a function of the number of its iterations."""
    N, D, C, K, diag = CASES[case]
    generator = torch.Generator().manual_seed(0)
    means = torch.rand(C, K, D, generator=generator)
    labels = torch.randint(C, (N,), generator=generator)
    x = means[labels, torch.randint(K, (N,), generator=generator)] + 0.2 * torch.randn(N, D, generator=generator)
    spread = 0.05 + 0.1 * torch.rand(C, K, *[D] * diag, generator=generator)
    weights, grad = torch.full((C, K), 1 / K), torch.rand(N, generator=generator)
    x, means, labels, spread, weights, grad = (t.to(device) for t in (x, means, labels, spread, weights, grad))
    if case.startswith("cem"):
        prior, one = torch.full((C,), 1 / C, device=device), torch.ones((), device=device)
        samples = torch.tensor(50_000.0, dtype=torch.float64, device=device)
        noise = torch.tensor([0.01], dtype=torch.float64, device=device)

        def step() -> Any:
            priors = (spread, weights, prior, samples, noise)
            _, slope, assignment = operators["cem_fwd"](x, means, labels, *priors, False, 1.0, True, True, 0.125, 0.01)
            return operators["component_statistics_bwd"](slope, one, x, means, labels, assignment)

        return step
    if case.startswith("mixture"):

        def both() -> Any:
            kept = operators["mixture_log_prob_fwd"](x, means, spread, weights, None, False)
            return operators["mixture_log_prob_bwd"](grad, x, means, spread, weights, None, *kept)

        return both
    if case.startswith("kmeans"):
        return lambda iterations: operators["kmeans"](x, means, None, iterations, 0.0, False)
    mixture = (x, means, spread, weights, None)
    return lambda iterations: operators["expectation_maximization"](*mixture, iterations, 0.0, 1e-6)


def graph_us(call: Callable[[], Any]) -> float:
    """Microseconds of a call on the device: the median of replays of a CUDA graph with several calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, compares and loads whatever the call needs
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    graph.replay()
    return statistics.median(_elapsed_us(graph.replay) for _ in range(REPLAYS)) / CALLS


def iteration_us(fit: Callable[[int], Any]) -> float:
    """Microseconds of one iteration of a fit, waits included: the difference between a long and a short one."""
    few, many = ITERATIONS
    fit(few)
    short, long = (statistics.median(_elapsed_us(partial(fit, count)) for _ in range(REPLAYS)) for count in (few, many))
    return (long - short) / (many - few)


def _elapsed_us(run: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end)


def copy_tb_s() -> float:
    """Bytes that a copy reads and writes, in TB/s."""
    x = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * COPY_BYTES / graph_us(lambda: y.copy_(x)) / 1e6


def predictions() -> dict[str, float]:
    """Microseconds on an H200 by case, from the table of the speed model if it is there."""
    if not PREDICTED.exists():
        return {}
    with PREDICTED.open(newline="") as file:
        return {row["case"]: float(row["device_us"]) for row in csv.DictReader(file) if row["version"] == "now"}


def measure(cases: Sequence[str], found: dict[str, Operators], tb_s: float) -> Iterator[Line]:
    """Times every case on every backend; a failure becomes a line."""
    predicted = predictions()
    for case in cases:
        fit = "iteration" in case
        for name, operators in found.items():
            if fit and not {"kmeans", "expectation_maximization"} <= operators.keys():
                continue  # the backend has no whole fits
            try:
                us = (iteration_us if fit else graph_us)(call_of(case, operators, "cuda"))
            except Exception as failure:  # compilers and drivers raise errors of any type
                text = str(failure).splitlines() or [""]
                yield Line(case, name, note=f"{type(failure).__name__}: {text[0][:90]}")
                continue
            yield Line(
                case, name, us, least_bytes(case) / tb_s / 1e6 / us, predicted.get(case) if name == "auto" else None
            )


def table(lines: Sequence[Line]) -> str:
    """The lines as text.

    Example:
        >>> from cem_fast.benchmarks.gpu_profile import Line, table
        >>> print(table([Line("cem 128x512 C10", "auto", 10.0, 0.02, 8.0), Line("cem 128x512 C10", "cuda", note="OSError: no")]))
        case                            backend        us  of a copy  predicted us
        cem 128x512 C10                 auto         10.0         2%           8.0
        cem 128x512 C10                 cuda            OSError: no
    """
    rows = [f"{'case':<31} {'backend':<8} {'us':>8} {'of a copy':>10} {'predicted us':>13}"]
    for line in lines:
        if line.us is None or line.share is None:
            rows.append(f"{line.case:<31} {line.backend:<8}        {line.note}")
            continue
        predicted = "" if line.predicted_us is None else f"{line.predicted_us:.1f}"
        rows.append(f"{line.case:<31} {line.backend:<8} {line.us:>8.1f} {line.share:>10.0%} {predicted:>13}".rstrip())
    return "\n".join(rows)


def run_once(cases: Sequence[str]) -> None:
    """Calls every case once as the package serves it, between marks for a profiler."""
    for case in cases:
        call = call_of(case, dict(library.OPERATORS), "cuda")
        arguments = (ITERATIONS[0],) if "iteration" in case else ()
        call(*arguments)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call(*arguments)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def counters(cases: Sequence[str]) -> str:
    """ncu's counters of every kernel, or why there are none."""
    ncu = shutil.which("ncu")
    if ncu is None:
        return "ncu is not installed: no counters"
    own = [sys.executable, __file__, "--once", "--case", *cases]
    command = [ncu, "--csv", "--profile-from-start", "off", "--metrics", ",".join(COUNTERS), *own]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=NCU_SECONDS)
    except subprocess.TimeoutExpired:
        return f"ncu took longer than {NCU_SECONDS} s: no counters"
    return counted(done.stdout) or f"ncu counted nothing: {(done.stdout + done.stderr).strip()[-300:]}"


def counted(text: str) -> str:
    """One line for each kernel in the CSV that ncu prints."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    kernels: dict[str, list[str]] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines))):
        name = f"{row['ID']:>3} {row['Kernel Name'].split('(')[0][:40]:<40}"
        kernels.setdefault(name, []).append(f"{row['Metric Value']} {row['Metric Unit']} ({row['Metric Name']})")
    return "\n".join(f"{name} {', '.join(values)}" for name, values in kernels.items())


def save(path: Path | None, parts: Sequence[str]) -> None:
    """Writes text to a file, if there is one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(parts) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=Path, help="also write the text to this file")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="only these")
    parser.add_argument("--once", action="store_true", help="call every case once, for a profiler, and time nothing")
    settings = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_profile.py: no GPU")
        return 1
    if settings.once:
        run_once(settings.case)
        return 0
    tb_s = copy_tb_s()
    head = f"{torch.cuda.get_device_name()}, torch {torch.__version__}: a copy reads and writes {tb_s:.2f} TB/s"
    print(head, flush=True)
    lines = list(measure(settings.case, backends(), tb_s))
    parts = [head, table(lines)]
    print(parts[1], flush=True)
    save(settings.save, parts)  # the times are kept even if the counters take too long
    parts.append(counters(settings.case))
    print(parts[2], flush=True)
    save(settings.save, parts)
    return int(any(line.us is None for line in lines))


if __name__ == "__main__":
    sys.exit(main())
