"""Smooth random warps of images."""

from __future__ import annotations

import torch

from cem_fast.attacks import warps


def test_images_that_are_not_square_are_rotated_without_distortion(monkeypatch):
    for name in ("SCALING", "SHIFT", "ELASTIC"):
        monkeypatch.setattr(warps, name, 0.0)
    monkeypatch.setattr(warps, "ROTATION", 0.7)
    rows, columns = torch.arange(20.0) - 9.5, torch.arange(60.0) - 29.5
    disc = torch.exp(-(rows[:, None] ** 2 + columns**2) / 18).expand(8, 1, -1, -1)
    torch.testing.assert_close(warps.warped(disc, mirror=True), disc, atol=0.03, rtol=0)
    bar = torch.exp(-(rows[:, None] ** 2 / 4 + columns**2 / 36)).expand(8, 1, -1, -1)
    assert (warps.warped(bar, mirror=True) - bar).abs().amax((1, 2, 3)).max() > 0.1
