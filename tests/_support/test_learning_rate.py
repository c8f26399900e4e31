"""The learning rate over runs of every length."""

import pytest
import torch

from cem_fast._support.learning_rate import one_cycle


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 100])
@pytest.mark.parametrize("warmup", [0.1, 0.2])
def test_rises_to_the_peak_and_falls_to_zero(steps, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule, rates = one_cycle(optimizer, steps=steps, warmup=warmup), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    peak = rates.index(max(rates))
    assert rates[0] == pytest.approx(0.02)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) <= 0.5
    if steps > 1:
        assert max(rates) == pytest.approx(0.5)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)
