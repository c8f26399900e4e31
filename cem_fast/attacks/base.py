"""What every attack is: it learns from the attacker's images and rebuilds others from their released features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class Attack(Protocol):
    """A model inversion attack.

    Attributes:
        name: key of the attack in results.json.
        knowledge: one sentence that says what the attacker knows.
    """

    name: str
    knowledge: str

    def fit(self, observe: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
        """Learns to invert.

        Args:
            observe: images ``[N, C, H, W]`` -> features as the cloud sees them, with fresh noise at every call.
            images: the attacker's own images ``[N, C, H, W]``, float32 in [0, 1].
            labels: their classes ``[N]``, int64.
        """

    def reconstruct(self, features: Tensor) -> Tensor:
        """Returns the images rebuilt from released features, ``[N, C, H, W]`` in [0, 1].

        Raises:
            RuntimeError: ``fit`` was not called.
        """

    def half_budget(self) -> Attack | None:
        """Returns an unfitted twin with half the budget, to show that the attack has converged; None where there is no budget."""
