"""Cost of CEM in a training epoch of the paper's VGG11, per step and for the refit, with this library and the released loop.

Three copies of the network train on the same batches in turn, so other load on the machine affects all of them equally:
without CEM, with ``CEMLoss``, and with the loss of the released script, which runs the encoder's backward twice.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from cem_fast.benchmarks import released
from cem_fast.benchmarks.table import Row
from cem_fast.benchmarks.timing import Quantiles, quantiles
from torch.nn import functional

from cem_fast import CEMLoss, models
from cem_fast.training import clean_features

BATCH, CLASSES, COMPONENTS, NOISE_STD = 128, 10, 5, 0.025
IMAGES = {True: 4 * BATCH, False: 79 * BATCH}  # quick or not
REFITS = 5
PLAIN, OURS, RELEASED = "without CEM", "cem_fast", "released loop"
STEP, ADDED, REFIT, REFIT_OWN_PASS = "step", "step, added", "refit on kept features", "refit with an encoder pass"


def measure(device: torch.device, *, quick: bool) -> list[Row]:
    """Times one epoch after a warm-up batch.

    Returns:
        Rows for each variant: the time of a step, the time added to the same step without CEM, and the time of a refit of
        the mixture to the features of the epoch.
    """
    torch.manual_seed(0)
    images = torch.rand(IMAGES[quick] + BATCH, 3, 32, 32, device=device)
    labels = torch.randint(CLASSES, (len(images),), device=device)
    network = models.build("vgg11", image_shape=(3, 32, 32), num_classes=CLASSES, cut=2, bottleneck=8)
    networks = {PLAIN: network.to(device)}
    networks |= {name: copy.deepcopy(networks[PLAIN]) for name in (OURS, RELEASED)}
    steps = {name: _Step(name, network) for name, network in networks.items()}
    clean = clean_features(networks[OURS], images)
    cem = CEMLoss(num_classes=CLASSES, num_components=COMPONENTS, noise_std=NOISE_STD).to(device)
    first = _timed(lambda: cem.fit(clean, labels), device)
    mixture = (cem.mixture.means, cem.mixture.variances, cem.mixture.weights, float(len(images)), NOISE_STD)
    penalties: dict[str, Callable[..., Any] | None] = {
        PLAIN: None,
        OURS: cem,
        RELEASED: lambda x, y: released.loss(x.flatten(1), y, *mixture),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn, start in enumerate(range(0, len(images), BATCH)):
        batch = images[start : start + BATCH], labels[start : start + BATCH]
        for name in random.Random(turn).sample(list(steps), len(steps)):
            took = _timed(partial(steps[name].run, *batch, penalties[name]), device)
            if turn > 0:
                times[name].append(took)
    added = {name: [a - b for a, b in zip(times[name], times[PLAIN])] for name in (OURS, RELEASED)}
    found = {(name, STEP): quantiles(took) for name, took in times.items()}
    found |= {(name, ADDED): quantiles(took) for name, took in added.items()}
    found |= _refits(cem, networks[OURS], steps[OURS].kept[BATCH:], images[BATCH:], labels[BATCH:], device)
    return [_row(name, direction, times, IMAGES[quick], first) for (name, direction), times in found.items()]


class _Step:
    """A network, its optimizer, and the features of past steps."""

    def __init__(self, name: str, network: Any):
        self.name, self.network = name, network
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        self.batches: list[torch.Tensor] = []

    @property
    def kept(self) -> torch.Tensor:
        return torch.cat(self.batches).flatten(1)

    def run(self, x: torch.Tensor, y: torch.Tensor, penalty: Callable[..., Any] | None) -> None:
        features = self.network.encoder(x)
        released_features = features + NOISE_STD * torch.randn_like(features)
        loss = functional.cross_entropy(self.network.decoder(released_features), y)
        self.optimizer.zero_grad()
        if self.name == RELEASED:
            self._twice(loss, penalty(features, y))  # type: ignore[misc]
        else:
            (loss if penalty is None else loss + penalty(features, y)).backward()
        self.optimizer.step()
        if self.name == OURS:
            self.batches.append(features.detach())

    def _twice(self, loss: torch.Tensor, penalty: torch.Tensor) -> None:
        """Two backward passes as in the released script; gradients of the penalty are kept and added to those of the loss."""
        penalty.backward(retain_graph=True)
        kept = {p: p.grad.clone() for p in self.network.encoder.parameters() if p.grad is not None}
        self.optimizer.zero_grad()
        loss.backward()
        for parameter, gradient in kept.items():
            parameter.grad += gradient


def _refits(
    cem: CEMLoss, network: Any, kept: torch.Tensor, images: torch.Tensor, labels: torch.Tensor, device: torch.device
) -> dict[tuple[str, str], Quantiles]:
    """Refits that start from the mixture of the last epoch, as in training."""
    state = copy.deepcopy(cem.state_dict())
    own_pass: list[float] = []
    reused: list[float] = []
    for _ in range(REFITS):
        reused.append(_timed(lambda: cem.fit(kept, labels), device))
        cem.load_state_dict(state)
        own_pass.append(_timed(lambda: cem.fit(clean_features(network, images), labels), device))
        cem.load_state_dict(state)
    loop = [_timed(lambda: released.fit(kept, labels, cem.mixture.means), device) for _ in range(REFITS)]
    return {
        (OURS, REFIT): quantiles(reused),
        (OURS, REFIT_OWN_PASS): quantiles(own_pass),
        (RELEASED, REFIT): quantiles(loop),
    }


def _timed(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def _row(name: str, direction: str, times: Quantiles, images: int, first: float) -> Row:
    return Row(
        "training",
        "epoch of VGG11",
        name,
        N=images,
        D=512,
        C=CLASSES,
        K=COMPONENTS,
        covariance="spherical",
        dtype="float32",
        direction=direction,
        note=f"batches of {BATCH}, 32x32 pixels",
        first_ms=first if (name, direction) == (OURS, REFIT) else None,
    ).with_times(times)
