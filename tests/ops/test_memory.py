"""Memory that a step of the CEM loss allocates in addition to the gradient."""

import subprocess
import sys

import pytest

import cem_fast

MEASURE = """
import sys, torch
from cem_fast import CEMLoss

rows, dimension, classes, components, covariance_type = int(sys.argv[1]), int(sys.argv[2]), 10, 5, sys.argv[3]
torch.manual_seed(0)
shape = (classes, components, dimension)
loss = CEMLoss(num_classes=classes, num_components=components, noise_std=0.1, covariance_type=covariance_type)
loss.load_mixture(
    means=torch.rand(shape),
    variances=torch.rand(shape if covariance_type == "diag" else shape[:2]) + 0.1,
    weights=torch.full((classes, components), 1 / components),
    class_prior=torch.full((classes,), 1 / classes),
    num_samples=rows,
)
x, labels = torch.rand(rows, dimension, requires_grad=True), torch.randint(0, classes, (rows,))
gradient = torch.zeros_like(x)  # stands where the gradient will be, already touched
small = slice(0, 1000)
loss(x[small], labels[small]).backward()  # code and thread pools are loaded before anything is counted
x.grad = None


def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))


with open("/proc/self/clear_refs", "w") as control:
    control.write("5")  # the peak starts again from here
before = resident("VmRSS")
value = loss(x, labels)
forward = resident("VmHWM") - before
del gradient
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")
before = resident("VmRSS")
value.backward()
print(forward, resident("VmHWM") - before - x.grad.nbytes)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory from /proc")
@pytest.mark.parametrize("covariance_type", ["spherical", "diag"])
def test_step_stays_within_its_budget(covariance_type):
    if cem_fast.backends()["on CPU tensors"].startswith("reference"):
        pytest.skip("the budget is that of the compiled operations")
    rows, dimension, classes, components = 600_000, 64, 10, 5
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(rows), str(dimension), covariance_type],
        capture_output=True,
        text=True,
        check=True,
    )
    forward, backward = (int(n) for n in done.stdout.split())
    statistics = 4 * classes * components * (2 * dimension + 8)
    page_noise = 2**20
    budget = rows * (components + 4) * 4 + statistics + page_noise
    assert forward <= budget, f"forward took {forward / 2**20:.1f} MiB, budget {budget / 2**20:.1f} MiB"
    assert backward <= budget, (
        f"backward took {backward / 2**20:.1f} MiB besides the gradient, budget {budget / 2**20:.1f} MiB"
    )
