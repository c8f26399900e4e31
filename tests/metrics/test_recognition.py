"""Recognition: the closed form against its definition, and rates on images with known answers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from cem_fast import data
from cem_fast.metrics import recognition
from cem_fast.metrics.recognition import Recognizer


@pytest.fixture(scope="module")
def faces():
    return data.load("faces", fold=0, image_size=24)


def test_people_are_recognized_and_the_mean_image_is_not(faces):
    recognizer = Recognizer(faces.attacker.images, faces.attacker.labels)
    assert recognizer.rate(faces.test.images, faces.test.labels) > 0.9
    assert recognizer.rate(faces.test.images, faces.test.labels.roll(2)) < 0.02  # somebody else's identity
    nobody = faces.train.images.mean(0).expand(80, -1, -1, -1)
    assert recognizer.rate(nobody, faces.test.labels) == recognition.chance(faces.test.labels) == 1 / 40


def test_blur_and_noise_hide_people(faces):
    recognizer = Recognizer(faces.attacker.images, faces.attacker.labels)
    torch.manual_seed(0)
    noise = torch.randn_like(faces.test.images)
    rates = [recognizer.rate(faces.test.images + std * noise, faces.test.labels) for std in (0.0, 0.5, 3.0)]
    assert rates[0] > rates[1] > rates[2]


@pytest.mark.parametrize("count", [30, 200])  # fewer images than pixels, and more
def test_classifier_is_the_ridge_solution_with_the_least_error_on_images_left_out(count, monkeypatch):
    torch.manual_seed(0)
    images, labels = torch.rand(count, 1, 7, 8), torch.arange(count) % 3
    images[:, 0, 0, 0] += labels
    monkeypatch.setattr(recognition, "PENALTIES", torch.tensor([1e-2, 1.0, 30.0], dtype=torch.float64))
    found = Recognizer(images, labels)

    def solve(kept, penalty):
        x, y = images[kept].flatten(1).double(), F.one_hot(labels[kept]).double()
        centered = x - x.mean(0)
        scatter = centered.T @ centered
        weights = torch.linalg.solve(scatter + penalty * torch.eye(56), centered.T @ (y - y.mean(0)))
        return weights, y.mean(0) - x.mean(0) @ weights

    centered = images.flatten(1).double() - images.flatten(1).double().mean(0)
    unit = centered.square().sum() / min(count - 1, 56)  # the mean eigenvalue
    errors = []
    for penalty in recognition.PENALTIES:
        left_out = 0.0
        for index in range(count):
            weights, intercept = solve(torch.arange(count) != index, penalty * unit)
            answer = images[index].flatten().double() @ weights + intercept
            left_out += (answer - F.one_hot(labels[index], 3)).square().sum()
        errors.append(left_out)
    best = recognition.PENALTIES[int(torch.stack(errors).argmin())]
    torch.testing.assert_close(found.weights, solve(torch.arange(count) >= 0, best * unit)[0], rtol=1e-6, atol=1e-9)


def test_a_sample_of_many_images_covers_every_class(monkeypatch):
    monkeypatch.setattr(recognition, "MAX_IMAGES", 100)
    labels = torch.arange(400) % 4
    images = torch.rand(400, 1, 4, 4)
    images[torch.arange(400), 0, 0, labels] += 3
    assert Recognizer(images, labels).rate(images, labels) > 0.95


def test_chance_is_that_of_the_most_frequent_class():
    assert recognition.chance(torch.tensor([0, 3, 3, 1])) == 0.5


def test_identical_images_are_handled():
    recognizer = Recognizer(torch.zeros(4, 1, 3, 3), torch.tensor([0, 1, 1, 1]))
    assert recognizer.names(torch.rand(2, 1, 3, 3)).tolist() == [1, 1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Recognizer(torch.rand(1, 1, 3, 3), torch.zeros(1).long()), "must agree with N > 1"),
        (lambda: Recognizer(torch.rand(3, 1, 3, 3), torch.zeros(2).long()), r"must agree .* \(3, 1, 3, 3\) and \(2,\)"),
        (
            lambda: Recognizer(torch.rand(3, 1, 3, 3), torch.arange(3)).rate(torch.rand(0, 1, 3, 3), torch.zeros(0)),
            "must agree with N > 0",
        ),
    ],
)
def test_bad_requests(call, message):
    with pytest.raises(ValueError, match=message):
        call()
