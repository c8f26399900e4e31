"""A decoder trained further against a critic, which penalizes reconstructions unlike the attacker's images."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cem_fast._support.counts import require_number
from cem_fast._support.learning_rate import falling
from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import QUERIES, Attack, Observe, counted, require_fitted, require_positive
from cem_fast.attacks.decoder import Decoder, num_batches
from cem_fast.attacks.networks import Critic, DecoderNetwork

PENALTY = 10.0  # weight of the gradient penalty, Gulrajani et al.'s


@dataclass(kw_only=True, eq=False)
class Gan(Attack):
    """Minimizes ``mse_weight mse(G(z), x) - critic(G(z))`` over the generator G, warm-started from the decoder attack.

    The critic minimizes ``E critic(G(z)) - E critic(x) + 10 E (|grad| - 1)^2``, with the gradient at random mixtures of images and
    reconstructions. Both learning rates fall to zero; the last generator is used.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        decoder: the decoder attack, not yet fitted; the generator is its network.
        epochs: passes over the attacker's images.
        critic_steps: steps of the critic per step of the generator.
        mse_weight: weight of the mean squared error.
        seed: seed of the critic's weights, order and noise.

    Raises:
        ValueError: an argument is out of range.

    Source:
        Gulrajani et al., "Improved training of Wasserstein GANs", NeurIPS 2017; Xia et al., CVPR 2025 (the warm start, the error's weight).

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return torch.nn.functional.avg_pool2d(images, 2)
        >>> decoder = attacks.Decoder(image_shape=(1, 8, 8), epochs=2)
        >>> attack = attacks.Gan(image_shape=(1, 8, 8), decoder=decoder, epochs=1)
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> attack.reconstruct(observe(images)).shape
        torch.Size([16, 1, 8, 8])
    """

    name = "gan"
    knowledge = QUERIES

    image_shape: tuple[int, int, int]
    decoder: Decoder
    epochs: int
    critic_steps: int = 2
    mse_weight: float = 1500.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "epochs", "critic_steps")
        if not 0 < require_number("mse_weight", self.mse_weight) < math.inf:
            raise ValueError(f"mse_weight must be positive and finite, got {self.mse_weight}")

    @property
    def budget(self) -> str:
        return f"{counted(self.epochs, 'epoch')} against a critic, after {self.decoder.budget}"

    def half_budget(self) -> Gan | None:
        """Returns an unfitted copy with half the epochs; None for one. The warm start has an entry of its own, the decoder's."""
        return replace(self, epochs=self.epochs // 2) if self.epochs > 1 else None

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Trains the decoder, then generator and critic; see :meth:`cem_fast.attacks.Attack.fit`.

        Raises:
            ValueError: as for the decoder attack.
        """
        trained = replace(self.decoder)
        trained.fit(observe, images, labels)
        with seeded(self.seed, "gan attack"):
            trained.network = self._train(trained, observe, images)
        self.trained = trained

    def _train(self, trained: Decoder, observe: Observe, images: Tensor) -> DecoderNetwork:
        generator, critic = deepcopy(trained.network).train(), Critic(self.image_shape).to(images.device)
        # The critic has no momentum, as in its source. The generator continues from the decoder at a low rate.
        of_critic = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
        of_generator = torch.optim.Adam(generator.parameters(), lr=0.03 * generator.learning_rate, betas=(0.5, 0.9))
        batches = num_batches(len(images), trained.batch_size)
        rates = [falling(optimizer, steps=self.epochs * batches) for optimizer in (of_critic, of_generator)]
        for _ in range(self.epochs):
            features = trained.standardize(observe(images))
            for batch in torch.randperm(len(images), device=images.device).tensor_split(batches):
                real, rebuilt = images[batch], generator(features[batch])
                for _ in range(self.critic_steps):
                    of_critic.zero_grad()
                    _critic_loss(critic, real, rebuilt.detach()).backward()
                    of_critic.step()
                loss = self.mse_weight * F.mse_loss(rebuilt, real) - critic(rebuilt).mean()
                of_generator.zero_grad()
                loss.backward()
                of_generator.step()
                for rate in rates:
                    rate.step()
        return generator.eval()

    def reconstruct(self, features: Tensor) -> Tensor:
        require_fitted(self, "trained")
        return self.trained.reconstruct(features)


def _critic_loss(critic: nn.Module, real: Tensor, rebuilt: Tensor) -> Tensor:
    """Negated Wasserstein distance plus the penalty on gradient norms other than 1."""
    mixed = torch.lerp(real, rebuilt, torch.rand(len(real), 1, 1, 1, device=real.device)).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mixed).sum(), mixed, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    return critic(rebuilt).mean() - critic(real).mean() + PENALTY * penalty
