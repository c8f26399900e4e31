"""Python threads and forked processes: the bits of a single thread."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from cem_fast import CEMLoss, GaussianMixture, functional

THREADS, REPEATS = 4, 8


def problem() -> tuple[torch.Tensor, torch.Tensor, CEMLoss]:
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.rand(600, 40, generator=generator), torch.arange(600) % 3
    return x, labels, CEMLoss(num_classes=3, num_components=2).fit(x, labels)


def results(x: torch.Tensor, labels: torch.Tensor, cem: CEMLoss) -> list[torch.Tensor]:
    """Values, gradients and a fit, by a loss that several threads may share."""
    mixture = cem.mixture
    leaf = x.clone().requires_grad_()
    loss = cem(leaf, labels)
    loss.backward()
    parameters = mixture.means.clone().requires_grad_(), mixture.variances, mixture.weights
    value = functional.mixture_log_prob(x, *parameters, labels)
    slope = torch.autograd.grad(value.sum(), parameters[0])[0]
    found = functional.component_statistics(x, mixture.means, labels, sums=True)
    fitted = GaussianMixture(num_components=2, num_classes=3, init=mixture.means, max_iter=3, tol=0.0).fit(x, labels)
    return [loss.detach(), leaf.grad, value.detach(), slope, *found, fitted.means, fitted.variances, fitted.weights]


@pytest.mark.parametrize("inner", [1, 2])
def test_threads_at_once_get_the_bits_of_one(inner):
    before = torch.get_num_threads()
    torch.set_num_threads(inner)
    try:
        shared = problem()
        right, barrier = results(*shared), Barrier(THREADS)

        def work(_: int) -> list[list[torch.Tensor]]:
            barrier.wait()
            return [results(*shared) for _ in range(REPEATS)]

        with ThreadPoolExecutor(THREADS) as pool:
            found = [each for many in pool.map(work, range(THREADS)) for each in many]
    finally:
        torch.set_num_threads(before)
    assert len(found) == THREADS * REPEATS
    assert all(torch.equal(a, b) for each in found for a, b in zip(each, right, strict=True))


FORKED = """
import os, sys, threading, time
import torch
from test_threads_and_forks import problem, results

shared = problem()
right = results(*shared)
running = [True]

def work():
    while running[0]:
        results(*shared)

def forked():
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as the workers of a DataLoader do: a pool of threads does not survive a fork
        same = all(map(torch.equal, results(*shared), right))
        os._exit(0 if same else 3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

alone = forked()
others = [threading.Thread(target=work) for _ in range(2)]
for other in others:
    other.start()
time.sleep(0.1)
next_to_threads = [forked() for _ in range(3)]
running[0] = False
print(alone, *next_to_threads)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_gets_the_same_bits_also_while_threads_run():
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stdout.split() == ["0"] * 4, done.stderr[-500:]


class Scored(torch.utils.data.Dataset):
    """Rows and their log-likelihoods, computed in the worker."""

    def __init__(self):
        self.x, _, cem = problem()
        self.mixture = GaussianMixture(num_components=2, init=cem.mixture.means[:1], max_iter=1).fit(self.x)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.mixture.score_samples(self.x[index : index + 1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_workers_of_a_loader_compute():
    data = Scored()
    loader = torch.utils.data.DataLoader(data, batch_size=2, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)).flatten(), data.mixture.score_samples(data.x[:8]))
