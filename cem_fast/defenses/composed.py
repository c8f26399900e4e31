"""Several defenses as one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from cem_fast.defenses.base import Defense
from cem_fast.models.split import SplitModel


class Composed(Defense):
    """Releases through one defense after the other, and adds up what they add to the loss.

    Every part's penalty and proxy see what leaves the device in the end, after all parts.

    Args:
        *parts: the defenses, in the order in which features pass through them.

    Raises:
        ValueError: there is no part.
    """

    def __init__(self, *parts: Defense):
        super().__init__()
        if not parts:
            raise ValueError("parts must be at least one defense, got none")
        self.parts = nn.ModuleList(parts)
        self.uses_bottleneck = all(part.uses_bottleneck for part in parts)

    @property
    def noise_std(self) -> float:
        return self.parts[-1].noise_std

    def attach(self, model: SplitModel, image_shape: torch.Size) -> None:
        for part in self.parts:
            part.attach(model, image_shape)

    def reshape(self, model: SplitModel, shapes: Mapping[str, torch.Size]) -> None:
        for part in self.parts:
            part.reshape(model, shapes)

    def start(self, model: SplitModel, images: Tensor) -> None:
        for part in self.parts:
            part.start(model, images)

    def before_epoch(self, model: SplitModel, images: Tensor, labels: Tensor, *, epoch: int, epochs: int) -> None:
        for part in self.parts:
            part.before_epoch(model, images, labels, epoch=epoch, epochs=epochs)

    def release(self, features: Tensor) -> Tensor:
        for part in self.parts:
            features = part.release(features)
        return features

    def before_noise(self, features: Tensor) -> Tensor:
        for part in self.parts[:-1]:
            features = part.release(features)
        return self.parts[-1].before_noise(features)

    def penalty(self, images: Tensor, features: Tensor, released: Tensor, labels: Tensor) -> Tensor | float:
        return sum(part.penalty(images, features, released, labels) for part in self.parts)

    def after_step(self, images: Tensor, released: Tensor) -> None:
        for part in self.parts:
            part.after_step(images, released)
