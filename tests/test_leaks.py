"""Memory over thousands of training steps."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest
import torch

from cem_fast import CEMLoss, GaussianMixture

STEPS, WARM = 2000, 400
MOST = 8 << 20  # bytes; one batch kept per step would be 64 MiB


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_steps_keep_nothing():
    torch.manual_seed(0)
    x, labels = torch.rand(64, 128), torch.arange(64) % 4
    encoder = torch.nn.Linear(128, 128)
    cem = CEMLoss(num_classes=4, num_components=2).fit(x, labels)
    mixture = GaussianMixture(num_components=2, num_classes=4, init=cem.mixture.means, max_iter=2).fit(x, labels)

    def step(index: int) -> None:
        loss = cem(encoder(x), labels)
        loss.backward()
        encoder.zero_grad()
        cem.gather(x, labels)
        mixture.score_samples(x, labels)
        if index % 50 == 0:
            cem.refit()
            cem.fit(x, labels)
            mixture.partial_fit(x, labels)

    for index in range(WARM):
        step(index)
    gc.collect()
    bytes_before, objects_before = resident(), len(gc.get_objects())
    for index in range(STEPS):
        step(index)
    gc.collect()
    assert len(gc.get_objects()) - objects_before < 100
    assert resident() - bytes_before < MOST
