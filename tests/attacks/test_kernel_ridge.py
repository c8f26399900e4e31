"""Kernel ridge regression: better than ridge, exact where it is not approximated, and chosen on held-out images."""

from __future__ import annotations

import pytest
import torch
from support.attacking import build

from cem_fast import metrics
from cem_fast.attacks import kernel_ridge
from cem_fast.attacks.kernel_ridge import KernelRidge
from cem_fast.attacks.warps import are_mirrored, warped


def error(attack, splits, observe):
    attack.fit(observe, splits.attacker.images, splits.attacker.labels)
    return float(metrics.mse(attack.reconstruct(observe(splits.test.images)), splits.test.images).mean())


def test_kernel_ridge_beats_ridge_on_noisy_features(faces, noisy):
    torch.manual_seed(0)
    found = {name: error(build(name, faces.image_shape), faces, noisy) for name in ("ridge", "kernel_ridge")}
    assert found["kernel_ridge"] < 0.9 * found["ridge"]


def test_centers_approximate_all_rows(faces, noisy, monkeypatch):
    monkeypatch.setattr(kernel_ridge, "CENTERS", 256)
    torch.manual_seed(0)
    found = [error(KernelRidge(image_shape=faces.image_shape, rows=rows), faces, noisy) for rows in (8000, 319)]
    assert found[1] < 1.3 * found[0]


def test_the_solution_is_that_of_kernel_ridge_regression():
    torch.manual_seed(0)
    z, x, new = torch.rand(30, 4).double(), torch.rand(30, 3).double(), torch.rand(5, 4).double()
    solution = kernel_ridge._Solution(z, x, width=0.3, penalty=0.1)

    def kernel(a, b):
        return torch.exp(-torch.cdist(a, b).square() / 0.6)

    mean = x.mean(0)
    expected = mean + kernel(new, z) @ torch.linalg.solve(kernel(z, z) + 0.1 * torch.eye(30), x - mean)
    torch.testing.assert_close(solution.predict(new), expected)
    everything = kernel_ridge._Solution(z, x, width=0.3, penalty=0.1, centers=torch.arange(30))
    torch.testing.assert_close(everything.predict(new), expected, rtol=0, atol=1e-2)


@pytest.mark.parametrize("mirror", [True, False])
def test_warped_images_resemble_their_originals(faces, mirror):
    torch.manual_seed(0)
    images = faces.train.images[:40]
    others = torch.cat([warped(images, mirror=mirror) for _ in range(4)])
    assert 0 <= others.min() <= others.max() <= 1
    own = metrics.mse(others, images.repeat(4, 1, 1, 1))
    if mirror:
        own = torch.minimum(own, metrics.mse(others, images.flip(3).repeat(4, 1, 1, 1)))
    assert 0 < own.mean() < 0.5 * metrics.mse(images[torch.randperm(40)], images).mean()


def test_mirrored_kinds_of_images_are_recognized(faces):
    held_out, rest = torch.arange(64), torch.arange(64, 320)
    assert are_mirrored(faces.train.images, held_out=held_out, rest=rest)
    slanted = faces.train.images * torch.linspace(0.2, 1, faces.image_shape[2])
    assert not are_mirrored(slanted, held_out=held_out, rest=rest)
