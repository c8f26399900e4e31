"""A decoder network trained to invert the encoder: the field's standard attack."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from cem_fast.attacks.networks import ResNormDecoder, SlimDecoder
from cem_fast.names import lookup
from cem_fast.rates import one_cycle
from cem_fast.seeding import seeded

DECODERS = {"slim": SlimDecoder, "res_norm": ResNormDecoder}


class Decoder:
    """Trains a network from released features to images, with fresh noise at every epoch.

    Features are standardized by their mean and standard deviation over the attacker's own observations. Adam's rate rises over the
    first tenth of the steps and falls along a cosine to zero, so that the last network is the one to use: nothing is picked on the way.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        epochs: passes over the attacker's images.
        decoder: ``slim`` or ``res_norm``.
        batch_size: images per step.
        seed: seed of the initial weights, the order and the noise.

    Raises:
        ValueError: the decoder is unknown, or an argument is out of range.

    Source:
        Dosovitskiy and Brox, "Inverting visual representations with convolutional networks", CVPR 2016; He, Zhang and Lee, "Model
        inversion attacks against collaborative inference", ACSAC 2019.
    """

    name = "decoder"
    knowledge = "knows the training images and, through the encoder and the defense, their features; sees test features as released"

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        epochs: int,
        decoder: str = "slim",
        batch_size: int = 32,
        seed: int = 0,
    ):
        lookup("decoder", decoder, DECODERS)
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        if batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, for batch normalization, got {batch_size}")
        self.image_shape = tuple(image_shape)
        self.epochs = epochs
        self.decoder = decoder
        self.batch_size = batch_size
        self.seed = seed

    def half_budget(self) -> Decoder:
        """Returns an unfitted twin with half the epochs and its own full schedule."""
        return Decoder(
            image_shape=self.image_shape,
            epochs=max(1, self.epochs // 2),
            decoder=self.decoder,
            batch_size=self.batch_size,
            seed=self.seed,
        )

    def fit(self, observe: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
        """Trains the decoder; see :meth:`cem_fast.attacks.base.Attack.fit`.

        Raises:
            ValueError: there are fewer than 2 images, too few to normalize a batch, or the features are not maps ``[N, C, H, W]``.
        """
        if len(images) < 2:
            raise ValueError(f"the decoder attack needs at least 2 images, got {len(images)}")
        with seeded(self.seed, "decoder attack"):
            self._standardize(observe(images))
            if self.mean.dim() != 3:
                raise ValueError(
                    "the decoder attack needs features that are maps [N, C, H, W], got [N, "
                    f"{', '.join(map(str, self.mean.shape))}]: cut the network before it flattens them, or attack it with ridge"
                )
            self.network = DECODERS[self.decoder](tuple(self.mean.shape), images).to(images.device)
            # no batch of a single image: it cannot be normalized
            steps_per_epoch = min(-(-len(images) // self.batch_size), len(images) // 2)
            optimizer = torch.optim.Adam(self.network.parameters(), lr=self.network.learning_rate)
            rates = one_cycle(optimizer, steps=self.epochs * steps_per_epoch, warmup=0.1)
            self.network.train()
            for _ in range(self.epochs):
                features = self._standardized(observe(images))
                for batch in torch.randperm(len(images), device=images.device).tensor_split(steps_per_epoch):
                    loss = F.mse_loss(self.network(features[batch]), images[batch])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    rates.step()
            self.network.eval()

    @torch.no_grad()
    def reconstruct(self, features: Tensor) -> Tensor:
        if not hasattr(self, "network"):
            raise RuntimeError("this decoder attack has learned nothing yet: call fit(observe, images, labels) first")
        return torch.cat([self.network(self._standardized(part)).clamp(0, 1) for part in features.split(256)])

    def _standardize(self, features: Tensor) -> None:
        self.mean = features.mean(0)
        deviation = features.std(0, correction=0)
        # a feature that hardly varies here may well vary on other images: do not blow it up
        self.scale = deviation.clamp_min(1e-3 * float(deviation.square().mean().sqrt()) + 1e-12)

    def _standardized(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.scale
