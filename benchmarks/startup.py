"""Startup cost of a new process: imports and the first step of the loss."""

from __future__ import annotations

import subprocess
import sys

from cem_fast.benchmarks.table import Row
from cem_fast.benchmarks.timing import quantiles

PROCESSES = {True: 2, False: 5}  # quick or not
STAGES = ("import torch", "import cem_fast", "first step of CEMLoss", "second step")
PROGRAM = """
import sys, time
marks = [time.perf_counter()]
import torch
marks.append(time.perf_counter())
import cem_fast
marks.append(time.perf_counter())
device = sys.argv[1]
loss = cem_fast.CEMLoss(num_classes=10).to(device)
loss.load_mixture(means=torch.rand(10, 5, 512, device=device), variances=torch.rand(10, 5, device=device) + 0.1,
                  weights=torch.full((10, 5), 0.2, device=device), class_prior=torch.full((10,), 0.1, device=device),
                  num_samples=50_000)
x = torch.rand(128, 512, device=device, requires_grad=True)
y = torch.randint(10, (128,), device=device)
for _ in range(2):
    start = time.perf_counter()
    loss(x, y).backward()
    float(x.grad.sum())
    marks.append(marks[-1] + time.perf_counter() - start)
print(*(1e3 * (b - a) for a, b in zip(marks, marks[1:])))
"""


def measure(device: str, *, quick: bool) -> list[Row]:
    """Times the stages in new processes.

    Raises:
        RuntimeError: a process failed; the message is the last line of its standard error.
    """
    found: list[list[float]] = []
    for _ in range(PROCESSES[quick]):
        done = subprocess.run([sys.executable, "-c", PROGRAM, device], capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"a new process failed: {done.stderr.strip().splitlines()[-1]}")
        found.append([float(number) for number in done.stdout.split()])
    return [
        Row("startup", "new process", stage, direction="once").with_times(quantiles(times))
        for stage, times in zip(STAGES, zip(*found))
    ]
