"""Composition of defenses."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from cem_fast.defenses.base import Defense, released, require_defense
from cem_fast.defenses.noise import GaussianNoise
from cem_fast.models.split import SplitModel


class Composed(Defense):
    """Releases features through several defenses in turn, and adds up their penalties.

    The penalties and proxies of all parts are computed on the final released features.

    Args:
        *parts: the defenses, in the order in which features pass through them.

    Raises:
        TypeError: a part is no defense.
        ValueError: there is no part.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> defense = defenses.Composed(defenses.TopKPruning(pruned_share=0.5), defenses.GaussianNoise(noise_std=0.1))
        >>> defense.noise_std
        0.1
        >>> defense.before_noise(torch.tensor([[1.0, 4.0, 2.0, 3.0]]))
        tensor([[0., 4., 0., 3.]])
    """

    def __init__(self, *parts: Defense):
        super().__init__()
        if not parts:
            raise ValueError("parts must be at least one defense, got none")
        self.parts = nn.ModuleList(require_defense("parts", part) for part in parts)
        self.uses_bottleneck = all(part.uses_bottleneck for part in parts)
        self.keeps_range = all(part.keeps_range for part in parts)

    @property
    def noise_std(self) -> float:  # type: ignore[override]  # that of the last part, read-only
        return self._members()[-1].noise_std

    @property
    def secure(self) -> bool:
        return any(part.secure for part in self._members())

    @secure.setter
    def secure(self, value: bool) -> None:
        for part in self._members():
            part.secure = value

    def attach(self, model: SplitModel, image_shape: torch.Size) -> None:
        for part in self._members():
            part.attach(model, image_shape)

    def reshape(self, model: SplitModel, shapes: Mapping[str, torch.Size]) -> None:
        for part in self._members():
            part.reshape(model, shapes)

    def start(self, model: SplitModel, images: Tensor) -> None:
        for part in self._members():
            part.start(model, images)

    def before_epoch(self, model: SplitModel, images: Tensor, labels: Tensor, *, epoch: int, epochs: int) -> None:
        for part in self._members():
            part.before_epoch(model, images, labels, epoch=epoch, epochs=epochs)

    def release(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        for part in self._members():
            features = released(part, features, generator)
        return features

    def before_noise(self, features: Tensor) -> Tensor:
        *earlier, last = self._members()
        for part in earlier:
            features = part.release(features)
        return last.before_noise(features)

    def log_likelihood(self, released: Tensor, features: Tensor, *, noise_std: float = 0.0) -> Tensor:
        """Returns the log-density of the last random part that is not Gaussian noise, with the noise that follows added up.

        See :meth:`cem_fast.defenses.Defense.log_likelihood`.

        Raises:
            NotImplementedError: two parts are random besides the final noise, or the last one has no density.
        """
        *earlier, last = self._members()
        while earlier and isinstance(last, GaussianNoise):
            noise_std = math.hypot(noise_std, last.noise_std)
            *earlier, last = earlier
        for part in earlier:
            if not torch.equal(part.release(features[:1]), part.release(features[:1])):
                raise NotImplementedError(
                    f"the likelihood of two random defenses in turn is unknown: {type(part).__name__}, {type(last).__name__}"
                )
            features = part.release(features)
        return last.log_likelihood(released, features, noise_std=noise_std)

    def penalty(self, images: Tensor, features: Tensor, released: Tensor, labels: Tensor) -> Tensor | float:
        return sum(part.penalty(images, features, released, labels) for part in self._members())

    def after_step(self, images: Tensor, released: Tensor) -> None:
        for part in self._members():
            part.after_step(images, released)

    def _members(self) -> list[Defense]:
        return cast("list[Defense]", list(self.parts))
