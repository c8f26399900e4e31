"""Categories read from released features."""

from __future__ import annotations

import pytest
import torch

from cem_fast.attacks.inference import FeatureClassifier


def released(images, noise):
    return images.flatten(1) + noise * torch.randn(len(images), images[0].numel())


@pytest.mark.parametrize("noise, least, most", [(0.05, 0.95, 1.0), (50.0, 0.0, 0.65)])
def test_a_category_is_read_as_far_as_noise_lets_it(noise, least, most):
    torch.manual_seed(0)
    categories = torch.arange(600) % 2
    images = torch.rand(600, 1, 4, 4) * (0.5 + categories.view(-1, 1, 1, 1))
    classifier = FeatureClassifier(steps=200)
    before = torch.get_rng_state()
    classifier.fit(lambda x: released(x, noise), images[:400], categories[:400])
    assert torch.equal(torch.get_rng_state(), before)
    right = (classifier.read(released(images[400:], noise)) == categories[400:]).float().mean()
    assert least <= float(right) <= most


def test_bad_requests_of_a_classifier():
    with pytest.raises(RuntimeError, match="this classifier is not fitted"):
        FeatureClassifier().read(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"images \[N, C, H, W\] and categories \[N\] must agree"):
        FeatureClassifier().fit(torch.clone, torch.rand(3, 1, 2, 2), torch.zeros(2).long())
