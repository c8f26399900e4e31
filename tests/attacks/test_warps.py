"""Smooth random warps of images."""

from __future__ import annotations

import torch
from torch.nn import functional as F

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


def test_places_are_an_affine_map_and_local_shifts_between_knots():
    torch.manual_seed(0)
    affine, knots = torch.randn(3, 2, 3), torch.randn(3, 2, warps.KNOTS, warps.KNOTS)
    local = F.interpolate(knots, [7, 12], mode="bicubic", align_corners=True)
    expected = F.affine_grid(affine, [3, 1, 7, 12], align_corners=False) + local.permute(0, 2, 3, 1)
    places = torch.cat([affine, knots.flatten(2)], 2) @ warps.fields(7, 12, torch.device("cpu"))
    torch.testing.assert_close(places.view(3, 2, 7, 12).permute(0, 2, 3, 1), expected)
