"""Cost of a network: counts by hand, and those of the paper."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cem_fast import CEMLoss, cost, models
from cem_fast.models.split import SplitModel


def test_a_network_counted_by_hand():
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4), nn.Flatten(), nn.Linear(8 * 4 * 4, 5),
    )  # fmt: skip
    model = SplitModel.from_sequential(network, cut=3).train()
    network[1].eval()
    found = cost.measure(model, torch.rand(2, 3, 8, 8), passes=2)
    assert (found["encoder"].parameters, found["encoder"].macs) == (3 * 4 * 9 + 4 + 8, 3 * 4 * 9 * 64)
    assert (found["decoder"].parameters, found["decoder"].macs) == (8 * 9 + 8 + 128 * 5 + 5, 8 * 9 * 16 + 128 * 5)
    assert all(part.seconds > 0 for part in found.values())
    assert network.training
    assert not network[1].training


def test_the_papers_network_costs_what_the_paper_says():
    model = models.build("vgg11", image_shape=(3, 32, 32), num_classes=10, cut=2, bottleneck=8)
    found = cost.measure(model, torch.rand(1, 3, 32, 32), passes=1)
    device, cloud = found["encoder"], found["decoder"]
    assert device.parameters == 85_256
    assert device.macs == 1024 * 3 * 64 * 9 + 256 * 64 * 128 * 9 + 64 * 128 * 8 * 9
    assert device.macs / 1e6 == pytest.approx(21.9, rel=0.04)  # theirs counts more than multiplications
    assert cloud.macs / 1e6 == pytest.approx(133.59, rel=0.005)
    assert (device.parameters + cloud.parameters) / 1e6 == pytest.approx(9.775, abs=5e-4)


def test_time_is_the_median_of_the_passes(monkeypatch):
    ticks = iter([0.0, 1.0, 0.0, 100.0, 0.0, 2.0] * 2)
    monkeypatch.setattr(cost.time, "perf_counter", lambda: next(ticks))
    model = SplitModel(nn.Identity(), nn.Flatten())
    found = cost.measure(model, torch.rand(1, 1, 2, 2), passes=3)
    assert [part.seconds for part in found.values()] == [2.0, 2.0]


def test_bad_requests():
    model = SplitModel(nn.Identity(), nn.Flatten())
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        cost.measure(model, torch.rand(0, 1, 2, 2))
    with pytest.raises(ValueError, match="passes must be at least 1, got 0"):
        cost.measure(model, torch.rand(1, 1, 2, 2), passes=0)


@pytest.fixture
def small():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Sigmoid(), nn.Flatten(), nn.Linear(32, 3)
    )
    images, labels = torch.rand(12, 1, 4, 4), torch.arange(12) % 3
    return SplitModel.from_sequential(network, cut=3), images, labels


@pytest.mark.parametrize("classes", [3, 1])
def test_the_cost_of_cem_is_measured_in_alternate_steps(small, classes, monkeypatch):
    model, images, labels = small
    took = iter(
        [9.0, 0.5, 0.7, 0.6, *[8.0, 8.0], *[1.0, 1.5], *[12.0, 11.0], *[2.0, 2.5]]
    )  # refits, then pairs of steps
    clock = [0.0]

    def ticking() -> float:
        ticking.calls += 1
        clock[0] += next(took) if ticking.calls % 2 == 0 else 0.0
        return clock[0]

    ticking.calls = 0
    monkeypatch.setattr(cost.time, "perf_counter", ticking)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    cem = CEMLoss(num_classes=classes, num_components=2, noise_std=0.1)
    found = cost.measure_training(model.eval(), cem, images, labels, batch_size=4, steps=3)
    # the pairs: without CEM first in the second and in the fourth, with CEM first in the third
    assert (found.step, found.added, found.refit) == pytest.approx((2.0, 0.5, 0.6))
    assert found.epoch(10) == pytest.approx((20.0, 25.6))
    assert cem.is_fitted
    assert not model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_only_the_steps_with_cem_call_it(small, monkeypatch):
    model, images, labels = small
    cem, called = CEMLoss(num_classes=3, num_components=2, noise_std=0.1), []
    monkeypatch.setattr(CEMLoss, "forward", lambda self, x, y: called.append(len(y)) or x.sum() * 0)
    cost.measure_training(model, cem, images, labels, batch_size=5, steps=4)
    assert called == [5] * 5
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        cost.measure_training(model, cem, images, labels, batch_size=5, steps=0)
    with pytest.raises(ValueError, match="images must hold at least one image, got none"):
        cost.measure_training(model, cem, images[:0], labels[:0], batch_size=5)
