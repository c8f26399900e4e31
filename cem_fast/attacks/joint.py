"""Several releases of one image, for attacks that learn from one message."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from cem_fast.attacks.base import Attack, Observe, as_messages, knowing, require_positive
from cem_fast.attacks.view import Averaged


@dataclass(kw_only=True, eq=False)
class Joint(Attack):
    """Gives an attack the mean of ``releases`` messages of every image, in fitting and in reconstruction.

    The mean is all that matters under Gaussian noise, whose variance it divides by their number.

    Args:
        attack: the attack, not yet fitted.
        releases: messages of one image.

    Raises:
        ValueError: ``releases`` is not positive.

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return images + torch.randn(images.shape)
        >>> attack = attacks.build("ridge", image_shape=(1, 8, 8), releases=3)
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> attack.reconstruct(torch.stack([observe(images) for _ in range(3)])).shape
        torch.Size([16, 1, 8, 8])
    """

    attack: Attack
    releases: int

    def __post_init__(self) -> None:
        require_positive(self, "releases")
        self.name = self.attack.name
        self.knowledge = knowing(self.attack.knowledge, self.releases)

    @property
    def budget(self) -> str:
        return f"{self.attack.budget}, from the mean of {self.releases} releases"

    def half_budget(self) -> Joint | None:
        half = self.attack.half_budget()
        return None if half is None else replace(self, attack=half)

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        self.attack.fit(Averaged(observe, self.releases), images, labels)

    def reconstruct(self, features: Tensor) -> Tensor:
        return self.attack.reconstruct(as_messages(features, self.releases).mean(0))
