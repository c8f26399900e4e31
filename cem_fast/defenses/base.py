"""What every defense is: it decides what the cloud sees, and may add a term to the training loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cem_fast._support.ranks import Ranks
from cem_fast.models.split import SplitModel


class Defense(nn.Module):
    """No defense at all; subclasses override what they need.

    The training loop calls ``start`` once, ``before_epoch`` at the start of every epoch, then for every batch ``penalty`` and, after the
    optimizer's step, ``after_step``. Everything that leaves the device, in training, in testing and under attack, passes through
    ``release``. A saved network is rebuilt by ``attach`` and ``reshape``. For training to go on after an interruption, state between two
    epochs must be in parameters, buffers and optimizers that ``start`` makes and keeps as attributes.

    Attributes:
        uses_bottleneck: whether the network is built with a bottleneck at the cut (every defense of the field has one).
        noise_std: standard deviation of the Gaussian noise that ``release`` adds last, to what ``before_noise`` returns.
        ranks: the processes that train together; each gives ``penalty`` and ``after_step`` its share of a batch.
    """

    uses_bottleneck: bool = True
    noise_std: float = 0.0
    ranks: Ranks = Ranks()

    def attach(self, model: SplitModel, image_shape: torch.Size) -> None:
        """Builds the defense's own networks, and changes the network where the defense does; a second time changes nothing more.

        Args:
            model: the network, on the device to train on.
            image_shape: ``(channels, height, width)`` of the images.
        """

    def reshape(self, model: SplitModel, shapes: Mapping[str, torch.Size]) -> None:
        """Gives the network the shapes that this defense had brought it to, by the names in its ``state_dict``."""

    def start(self, model: SplitModel, images: Tensor) -> None:
        """Prepares for training, given the network and the training images ``[N, C, H, W]``; attaches the defense."""
        self.attach(model, images.shape[1:])

    def before_epoch(self, model: SplitModel, images: Tensor, labels: Tensor, *, epoch: int, epochs: int) -> None:
        """May change the network between two epochs (from 0); the optimizer follows the parameters that it has after this."""

    def release(self, features: Tensor) -> Tensor:
        """Returns the features as the cloud (and so the attacker) sees them."""
        return features

    def before_noise(self, features: Tensor) -> Tensor:
        """Returns what ``release`` adds its Gaussian noise to."""
        return self.release(features)

    def penalty(self, images: Tensor, features: Tensor, released: Tensor, labels: Tensor) -> Tensor | float:
        """Returns the term that this defense adds to the training loss of one batch."""
        return 0.0

    def after_step(self, images: Tensor, released: Tensor) -> None:
        """Updates the defense's own networks after the model's step; ``released`` is detached."""

    def optimizers(self) -> dict[str, torch.optim.Optimizer]:
        """The optimizers of this defense and its parts, by the names of their attributes."""
        return {
            f"defense.{name}.{key}": value
            for name, module in self.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, torch.optim.Optimizer)
        }

    @contextmanager
    def trained_over(self, ranks: Ranks) -> Iterator[None]:
        """Inside the block, this defense and its parts are trained by these processes together."""
        parts = [module for module in self.modules() if isinstance(module, Defense)]
        for part in parts:
            part.ranks = ranks
        try:
            yield
        finally:
            for part in parts:
                del part.ranks
