"""The images of ten people, and a network for them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cem_fast import data, models


@pytest.fixture(scope="module")
def splits():
    """The images of ten people, at 16x16 pixels."""
    faces = data.load("faces", fold=0, image_size=16)
    train, test = (part[part.labels < 10] for part in (faces.train, faces.test))
    return replace(faces, train=train, test=test, attacker=train, num_classes=10, class_names=faces.class_names[:10])


@pytest.fixture
def model(splits):
    torch.manual_seed(0)
    return models.build("slim", image_shape=splits.image_shape, num_classes=10, cut=2, bottleneck=8)
