"""What every defense is: it decides what the cloud sees, and may add a term to the training loss."""

from __future__ import annotations

from torch import Tensor, nn

from cem_fast.split import SplitModel


class Defense(nn.Module):
    """No defense at all; subclasses override what they need.

    The training loop calls ``start`` once, then for every batch ``penalty`` and, after the optimizer's step, ``after_step``.
    Everything that leaves the device, in training, in testing and under attack, passes through ``release``.

    Attributes:
        uses_bottleneck: whether the network is built with a bottleneck at the cut (every defense of the field has one).
    """

    uses_bottleneck: bool = True

    def start(self, model: SplitModel, images: Tensor) -> None:
        """Prepares for training: builds proxies, given the network and the training images ``[N, C, H, W]``."""

    def release(self, features: Tensor) -> Tensor:
        """Returns the features as the cloud (and so the attacker) sees them."""
        return features

    def penalty(self, images: Tensor, features: Tensor, released: Tensor, labels: Tensor) -> Tensor | float:
        """Returns the term that this defense adds to the training loss of one batch."""
        return 0.0

    def after_step(self, images: Tensor, released: Tensor) -> None:
        """Updates the defense's own networks after the model's step; ``released`` is detached."""
