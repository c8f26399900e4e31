"""Attacks on a trained model."""

from __future__ import annotations

import torch

from cem_fast.data import Part
from cem_fast.experiments.attack import choose_pictures


def test_pictures_are_one_per_class_and_do_not_depend_on_any_result():
    labels = torch.arange(40).repeat_interleave(2)
    part = Part(torch.rand(80, 1, 4, 4), labels, labels)
    chosen = choose_pictures(part)
    assert len(chosen) == 6
    assert len(labels[chosen].unique()) == 6
    few = Part(torch.rand(9, 1, 4, 4), torch.tensor([0, 1, 2] * 3), torch.arange(9))
    assert choose_pictures(few).tolist() == list(range(6))
