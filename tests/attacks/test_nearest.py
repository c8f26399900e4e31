"""The nearest image, by expected distance."""

from __future__ import annotations

import torch

from cem_fast import attacks
from cem_fast._support.seeding import seeded


def test_nearest_is_the_image_with_the_least_expected_distance():
    torch.manual_seed(0)
    images = torch.rand(12, 1, 4, 4)
    spread = torch.linspace(0.05, 2.0, 12).view(-1, 1, 1, 1)  # noise level of each image
    noisy = lambda x: x + spread[: len(x)] * torch.randn_like(x)  # noqa: E731
    attack = attacks.Nearest(image_shape=(1, 4, 4), draws=50)
    attack.fit(noisy, images, torch.zeros(12).long())
    with seeded(0, "nearest attack"):
        own = torch.stack([noisy(images).flatten(1) for _ in range(50)])
    seen = torch.rand(7, 1, 4, 4)
    scale = own.flatten(0, 1).std(0, correction=0)
    distances = ((seen.flatten(1)[:, None, None] - own.permute(1, 0, 2)[None]) / scale).square().sum(3).mean(2)
    assert torch.equal(attack.reconstruct(seen), images[distances.argmin(1)])
    # Loud noise adds to the expected distance, even if the mean features are near.
    assert torch.equal(attack.reconstruct(images[:1]), images[:1])
