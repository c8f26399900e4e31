"""The refit of one training epoch's mixture, and what a fit to a stream of rows keeps in memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from cem_fast.benchmarks import machine
from cem_fast.benchmarks.table import Row
from cem_fast.benchmarks.timing import quantiles
from torch import Tensor

from cem_fast import CEMLoss, GaussianMixture

REFITS = {True: 3, False: 11}  # quick or not
EPOCH = {True: (5_000, 64), False: (50_000, 512)}  # rows and dimensions; CIFAR-10 in full
BATCHES = {True: (2, 8), False: (20, 80, 320)}
BATCH, D, C, K = 10_000, 128, 10, 4
BUDGET_MIB = 32


class Batches:
    """Rows that are made when they are read, so that nothing holds them all."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for index in range(self.count):
            random = torch.Generator().manual_seed(index)
            yield torch.randn(BATCH, D, generator=random), torch.randint(C, (BATCH,), generator=random)


def measure(device: torch.device, *, quick: bool) -> list[Row]:
    """Times refits on a device, and on the CPU looks at the memory of streams that differ in length alone."""
    rows = [refit(device, quick=quick)]
    if device.type == "cpu":
        stream(BATCHES[quick][0])  # code and pools are loaded before anything is counted
        rows += [stream(count) for count in BATCHES[quick]]
    return rows


def refit(device: torch.device, *, quick: bool) -> Row:
    """A refit started from the mixture of slightly different features, as after every epoch."""
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
    p20, p50, p80, rounds = quantiles(times)
    shape = {"N": N, "D": dimension, "C": C, "K": 5, "covariance": "spherical", "dtype": "float32"}
    return Row(
        "fitting", "refit", "cem_fast", **shape, direction="fit", p20_ms=p20, p50_ms=p50, p80_ms=p80, rounds=rounds
    )


def stream(batches: int) -> Row:
    """One streamed fit of k-means and the most that it added to the process's memory."""
    mixture = GaussianMixture(num_components=K, num_classes=C, algorithm="kmeans", max_iter=2)
    peak = machine.peak_of(
        lambda: mixture.fit_stream(Batches(batches), memory_budget=BUDGET_MIB << 20), torch.device("cpu")
    )
    shape = {"N": batches * BATCH, "D": D, "C": C, "K": K, "covariance": "diag", "dtype": "float32"}
    note = f"memory budget {BUDGET_MIB} MiB"
    return Row("fitting", "fit_stream", "cem_fast", **shape, direction="memory", note=note, peak_mib=peak)
