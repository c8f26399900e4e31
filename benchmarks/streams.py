"""Time of a refit after a training epoch, and memory of fits to streams of rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from cem_fast.benchmarks import machine
from cem_fast.benchmarks.table import Row
from cem_fast.benchmarks.timing import quantiles
from torch import Tensor

from cem_fast import CEMLoss, GaussianMixture

REFITS = {True: 3, False: 11}  # quick or not
EPOCH = {True: (5_000, 64), False: (50_000, 512)}  # rows and dimensions; CIFAR-10 in full
BATCHES = {True: (2, 8), False: (20, 80, 320)}  # per stream
BATCH, D, C, K = 10_000, 128, 10, 4
BUDGET_MIB = 32


class Batches:
    """A stream that generates its rows when they are read, so memory never holds all of them."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(self.count):
            random = torch.Generator().manual_seed(index)
            yield torch.randn(BATCH, D, generator=random), torch.randint(C, (BATCH,), generator=random)


def measure(device: torch.device, *, quick: bool) -> list[Row]:
    """Times refits on a device; on the CPU also measures the memory of streams of different lengths."""
    rows = [refit(device, quick=quick)]
    if device.type == "cpu":
        stream(BATCHES[quick][0])  # loads code and memory pools before the measurement
        rows += [stream(count) for count in BATCHES[quick]]
    return rows


def refit(device: torch.device, *, quick: bool) -> Row:
    """A refit that starts from the mixture of slightly different features, as after every epoch."""
    N, dimension = EPOCH[quick]
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(C, (N,), generator=random)
    centers = torch.randn(C, 5, dimension, generator=random)
    x = torch.randn(N, dimension, generator=random) + centers[labels, torch.randint(5, (N,), generator=random)]
    moved = (x + 0.05 * torch.randn(x.shape, generator=random)).to(device)
    x, labels = x.to(device), labels.to(device)
    loss = CEMLoss(num_classes=C, num_components=5, noise_std=0.1).to(device).fit(x, labels)
    state = {name: value.clone() for name, value in loss.state_dict().items()}
    times = []
    for _ in range(REFITS[quick]):
        loss.load_state_dict(state)
        start = time.perf_counter()
        loss.fit(moved, labels)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    row = _row("refit", "fit", N, dimension, 5, "spherical")
    return row.with_times(quantiles(times))


def stream(batches: int) -> Row:
    """A streamed k-means fit and the peak memory that it adds."""
    mixture = GaussianMixture(num_components=K, num_classes=C, algorithm="kmeans", max_iter=2)
    peak = machine.peak_of(
        lambda: mixture.fit_stream(Batches(batches), memory_budget=BUDGET_MIB << 20), torch.device("cpu")
    )
    row = _row("fit_stream", "memory", batches * BATCH, D, K, "diag")
    return replace(row, note=f"memory budget {BUDGET_MIB} MiB", peak_mib=peak)


def _row(op: str, direction: str, N: int, D: int, K: int, covariance: str) -> Row:
    return Row(
        "fitting", op, "cem_fast", N=N, D=D, C=C, K=K, covariance=covariance, dtype="float32", direction=direction
    )
