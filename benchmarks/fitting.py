"""How long fits take as the work grows, and what a stream keeps in memory.

usage: python benchmarks/fitting.py [--quick] [--save FOLDER]

Prints one row for each size (median of repeated fits), fits the slope of log time against log size, and with ``--save`` writes
fitting.csv and fitting.png. A slope of 1 is time in proportion to the work. The refit is that of one CIFAR-10 epoch: 50,000
rows of 512 features, ten classes, five components, started from the mixture of slightly different features.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import math
import platform
import statistics
import sys
import threading
import time
import warnings
from pathlib import Path

import torch

import cem_fast
from cem_fast import CEMLoss, GaussianMixture

BASE = {"N": 10_000, "D": 128, "K": 8, "C": 10}
SIZES = {
    "N": (1_000, 10_000, 100_000, 1_000_000),
    "D": (8, 64, 512, 4_096),
    "K": (2, 16, 128, 1_024),
    "C": (1, 10, 100, 1_000),
}
ITERATIONS = 5


def rows_of(N: int, D: int, C: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, D, generator=generator), torch.randint(0, C, (N,), generator=generator)


def median_ms(function, repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def time_of_fit(algorithm: str, repeats: int, N: int, D: int, K: int, C: int) -> float:
    x, labels = rows_of(N, D, C)
    start = x[torch.randint(0, N, (C, K), generator=torch.Generator().manual_seed(1))]
    given = {}
    if algorithm == "em":
        given = {"init_variances": torch.ones(C, K, D), "init_weights": torch.full((C, K), 1 / K)}
    mixture = GaussianMixture(
        num_components=K, num_classes=C, algorithm=algorithm, init=start, max_iter=ITERATIONS, tol=0.0, **given
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spare components are timed as any other
        return median_ms(lambda: mixture.fit(x, labels), repeats)


def slope(sizes: list[float], times: list[float]) -> float:
    """Of log time against log size, over the larger half, where the work outweighs the calls."""
    u, v = ([math.log(value) for value in values[-2:]] for values in (sizes, times))
    return (v[-1] - v[0]) / (u[-1] - u[0])


def time_of_refit(repeats: int) -> float:
    x, labels = rows_of(50_000, 512, 10)
    centers = torch.randn(10, 5, 512, generator=torch.Generator().manual_seed(2))
    x += centers[labels, torch.randint(0, 5, (50_000,), generator=torch.Generator().manual_seed(3))]
    loss = CEMLoss(num_classes=10, num_components=5, noise_std=0.1).fit(x, labels)
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    moved = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    times = []
    for _ in range(repeats):
        loss.load_state_dict(state)
        start = time.perf_counter()
        loss.fit(moved, labels)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def release_free_memory() -> None:
    """Gives back what the allocator keeps, so that a fit cannot use it unseen."""
    with contextlib.suppress(AttributeError, OSError):  # glibc's alone
        ctypes.CDLL(None).malloc_trim(0)


class Batches:
    """Rows that are made when they are read, so that nothing holds them all."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        for index in range(self.count):
            generator = torch.Generator().manual_seed(index)
            yield torch.randn(10_000, 128, generator=generator), torch.randint(0, 10, (10_000,), generator=generator)


def memory_of_stream(batches: int) -> float:
    """The most that a streamed fit added to the process's memory, in MiB."""
    release_free_memory()
    before, peak, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    GaussianMixture(num_components=4, num_classes=10, algorithm="kmeans", max_iter=2).fit_stream(
        Batches(batches), memory_budget=32 << 20
    )
    done.set()
    watcher.join()
    return (peak - before) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the largest sizes")
    parser.add_argument("--save", type=Path)
    arguments = parser.parse_args()
    repeats = 3
    records = []
    for algorithm in ("kmeans", "em"):
        for axis, sizes in SIZES.items():
            sizes = sizes[:-1] if arguments.quick else sizes
            times = []
            for size in sizes:
                problem = BASE | {axis: size}
                if axis == "K":
                    problem["N"] = 20_000  # rows enough for all components
                if axis == "C":
                    problem["N"] = 100 * size  # as many rows of every class
                times.append(time_of_fit(algorithm, repeats, **problem))
                records.append({"fit": algorithm, "axis": axis, **problem, "ms": round(times[-1], 3)})
                print(f"{algorithm:7s} {axis}={size:<9d} {times[-1]:10.2f} ms", flush=True)
            print(f"{algorithm:7s} {axis}: slope {slope(list(sizes), times):.2f}", flush=True)
    refit = time_of_refit(repeats)
    print(f"refit of 50,000 x 512, C = 10, K = 5: {refit:.1f} ms")
    memory_of_stream(8)  # code and pools are loaded before anything is counted
    for count in (20, 80) if arguments.quick else (20, 80, 320):
        peak = memory_of_stream(count)
        records.append(
            {"fit": "stream", "axis": "memory", "N": 10_000 * count, "D": 128, "K": 4, "C": 10, "MiB": round(peak, 1)}
        )
        print(f"stream of {10_000 * count:,} rows, budget 32 MiB: {peak:.1f} MiB more")
    records.append(
        {"fit": "refit", "axis": "CIFAR-10 epoch", "N": 50_000, "D": 512, "K": 5, "C": 10, "ms": round(refit, 2)}
    )
    print(
        f"{torch.get_num_threads()} threads, {platform.machine()}, torch {torch.__version__}, "
        f"{cem_fast.backends()['on CPU tensors']}"
    )
    if arguments.save:
        save(records, arguments.save)


def save(records: list[dict], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/fitting.py " + " ".join(sys.argv[1:])
    about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "command": command}
    with open(folder / "fitting.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["fit", "axis", "N", "D", "K", "C", "ms", "MiB", *about])
        writer.writeheader()
        writer.writerows({**record, **about} for record in records)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True)
    for axis, plot in zip(SIZES, axes):
        for algorithm in ("kmeans", "em"):
            found = [r for r in records if (r["fit"], r["axis"]) == (algorithm, axis)]
            plot.loglog([r[axis] for r in found], [r["ms"] for r in found], marker="o", label=algorithm)
        plot.set_xlabel(axis)
        plot.grid(True, which="both", alpha=0.2)
    axes[0].set_ylabel(f"ms, {ITERATIONS} iterations")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(folder / "fitting.png", dpi=110)


if __name__ == "__main__":
    main()
