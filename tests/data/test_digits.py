"""The digits of MNIST: strata, padding, sizes."""

from __future__ import annotations

import torch

from cem_fast import data


def test_digits_are_stratified_and_padded():
    splits = data.load("digits", fold=2)
    assert splits.image_shape == (1, 32, 32)
    assert torch.bincount(splits.train.labels).tolist() == [400] * 10
    assert torch.bincount(splits.test.labels).tolist() == [100] * 10
    assert splits.test.images[:, :, :2].abs().sum() == 0  # the padding
    assert len(splits.test.groups.unique()) == 1000
    assert not splits.mirrored
    assert not set(splits.train.groups.tolist()) & set(splits.test.groups.tolist())
