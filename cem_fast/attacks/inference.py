"""A classifier of released features: what they say apart from pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cem_fast._support.learning_rate import one_cycle
from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import Observe, Standardizer

BATCH = 64  # images per training step


@dataclass(kw_only=True, eq=False)
class FeatureClassifier:
    """Reads a category from released features: a network with one hidden layer, trained on the attacker's images with fresh noise.

    Args:
        steps: training steps.
        width: units of the hidden layer.
        seed: seed of initial weights, order and noise.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.inference import FeatureClassifier
        >>> images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> bright = (images.mean((1, 2, 3)) > 0.5).long()
        >>> classifier = FeatureClassifier(steps=100)
        >>> classifier.fit(lambda x: x.mean(2), images, bright)
        >>> float((classifier.read(images.mean(2)) == bright).float().mean()) > 0.9
        True
    """

    steps: int = 300
    width: int = 128
    seed: int = 0

    def fit(self, observe: Observe, images: Tensor, categories: Tensor) -> None:
        """Trains the network.

        Args:
            observe: function from images ``[N, C, H, W]`` to their released features, with fresh noise at every call.
            images: the attacker's images ``[N, C, H, W]``.
            categories: ``[N]`` int64, at least 0.

        Raises:
            ValueError: there is no image, or the lengths differ.
        """
        if not len(images) or categories.shape != images.shape[:1]:
            raise ValueError(
                f"images [N, C, H, W] and categories [N] must agree with N > 0, got {tuple(images.shape)} and {tuple(categories.shape)}"
            )
        with seeded(self.seed, "classifier of features"), torch.enable_grad():
            features = observe(images).detach().flatten(1).float()
            self.standardize = Standardizer(features)
            self.network = nn.Sequential(
                nn.Linear(features.shape[1], self.width),
                nn.ReLU(),
                nn.Dropout(0.3),
                nn.Linear(self.width, int(categories.max()) + 1),
            ).to(images.device)
            optimizer = torch.optim.AdamW(self.network.parameters(), lr=3e-3, weight_decay=1e-2)
            rates = one_cycle(optimizer, steps=self.steps, warmup=0.1)
            order: list[Tensor] = []
            for _ in range(self.steps):
                if not order:
                    features = observe(images).detach().flatten(1).float()
                    order = list(torch.randperm(len(images), device=images.device).split(BATCH))
                batch = order.pop()
                loss = F.cross_entropy(self.network(self.standardize(features[batch])), categories[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
            self.network.eval()

    @torch.no_grad()
    def read(self, features: Tensor) -> Tensor:
        """Returns the most probable category of every message, ``[N]`` int64.

        Args:
            features: released features ``[N, ...]``.

        Raises:
            RuntimeError: ``fit`` was not called.
        """
        if not hasattr(self, "network"):
            raise RuntimeError("this classifier is not fitted: call fit(observe, images, categories) first")
        return self.network(self.standardize(features.flatten(1).float())).argmax(1)
