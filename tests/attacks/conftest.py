"""Networks under attack, shared by the tests of all attacks."""

import pytest
import torch

from cem_fast import data, defenses, models, training


@pytest.fixture(scope="session")
def small_faces():
    return data.load("faces", fold=0, image_size=16)


@pytest.fixture(scope="session")
def untrained(small_faces):
    """Features of an untrained, undefended encoder of the small faces."""
    torch.manual_seed(0)
    model = models.build("slim", image_shape=small_faces.image_shape, num_classes=40, cut=1, bottleneck=8)
    training.clean_features(model.train(), small_faces.train.images)
    return training.observer(model, defenses.Bottleneck())


@pytest.fixture(scope="session")
def faces(undefended_faces):
    return undefended_faces[0]


@pytest.fixture(scope="session")
def observe(undefended_faces):
    """Features of the trained network, undefended."""
    return training.observer(undefended_faces[1], defenses.Bottleneck())


@pytest.fixture(scope="session")
def noisy(undefended_faces):
    """Features of the trained network with Gaussian noise of standard deviation 0.1."""
    return training.observer(undefended_faces[1], defenses.GaussianNoise(noise_std=0.1))
