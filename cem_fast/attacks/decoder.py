"""A decoder network trained to invert the encoder: the standard attack on split inference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from cem_fast import metrics
from cem_fast._support.counts import require_count, require_number
from cem_fast._support.learning_rate import one_cycle
from cem_fast._support.lookup import lookup
from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import (
    QUERIES,
    Attack,
    MapStandardizer,
    Observe,
    counted,
    in_chunks,
    require_fitted,
    require_images,
    require_positive,
)
from cem_fast.attacks.decoder_cache import cached_decoder
from cem_fast.attacks.networks import ConvDecoder, DecoderNetwork, ResNormDecoder, SlimDecoder

DECODERS: dict[str, Callable[..., DecoderNetwork]] = {
    "slim": SlimDecoder,
    "res_norm": ResNormDecoder,
    "conv_norm": partial(ConvDecoder, normalized=True),
    "plain": partial(ConvDecoder, normalized=False),
}


def _dissimilarity(rebuilt: Tensor, images: Tensor) -> Tensor:
    return 1 - metrics.ssim(rebuilt, images).mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "ssim": _dissimilarity, "l1": F.l1_loss}


@dataclass(kw_only=True, eq=False)
class Decoder(Attack):
    """Trains a network from released features to images, with fresh noise in every epoch.

    Features are standardized by their mean and standard deviation over the attacker's own observations. Tokens and vectors are arranged as
    maps: a grid of patches, or a map of one pixel. Adam's learning rate rises over the first tenth of the steps and falls along a
    cosine to zero. The last network is used, without early stopping.

    Args:
        image_shape: ``(channels, height, width)`` of the images.
        epochs: passes over the attacker's images.
        decoder: ``slim``, ``res_norm``, ``conv_norm`` or ``plain``.
        dropout: fraction of the hidden features that ``slim`` drops in training; the other networks have no dropout.
        loss: ``mse``, ``ssim`` (one minus the structural similarity) or ``l1``.
        batch_size: images per step.
        seed: seed of initial weights, order and noise.

    Raises:
        ValueError: the decoder or the loss is unknown, or an argument is out of range.

    Source:
        Dosovitskiy and Brox, "Inverting visual representations with convolutional networks", CVPR 2016; He, Zhang and Lee, "Model
        inversion attacks against collaborative inference", ACSAC 2019.

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return torch.nn.functional.avg_pool2d(images, 2)
        >>> attack = attacks.Decoder(image_shape=(1, 8, 8), epochs=2)
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> attack.reconstruct(observe(images)).shape
        torch.Size([16, 1, 8, 8])
    """

    name = "decoder"
    knowledge = QUERIES

    image_shape: tuple[int, int, int]
    epochs: int
    decoder: str = "slim"
    dropout: float = 0.3
    loss: str = "mse"
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        lookup("decoder", self.decoder, DECODERS)
        lookup("loss", self.loss, LOSSES)
        require_positive(self, "epochs")
        if not 0 <= require_number("dropout", self.dropout) < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        require_count("batch_size", self.batch_size, 2)  # for batch normalization

    @property
    def budget(self) -> str:
        return f"{counted(self.epochs, 'epoch')} of the network {self.decoder!r} on its images, minimizing {self.loss}"

    def half_budget(self) -> Decoder | None:
        """Returns an unfitted copy with half the epochs and a complete schedule; None for one epoch."""
        return replace(self, epochs=self.epochs // 2) if self.epochs > 1 else None

    def fit(self, observe: Observe, images: Tensor, labels: Tensor) -> None:
        """Trains the decoder; see :meth:`cem_fast.attacks.Attack.fit`.

        Raises:
            ValueError: there are fewer than 2 images, too few for batch normalization.
        """
        require_images(self, images, 2)
        with seeded(self.seed, "decoder attack"):
            observed = observe(images)
            self.standardize = MapStandardizer(observed, self.image_shape)
            train = partial(self._train, observe, images)
            self.network = cached_decoder(observe, asdict(self), images, observed, train=train)

    def _train(self, observe: Observe, images: Tensor) -> DecoderNetwork:
        own = {"dropout": self.dropout} if self.decoder == "slim" else {}
        network = DECODERS[self.decoder](tuple(self.standardize.mean.shape), images, **own).to(images.device)
        steps_per_epoch = num_batches(len(images), self.batch_size)
        optimizer = torch.optim.Adam(network.parameters(), lr=network.learning_rate)
        rates = one_cycle(optimizer, steps=self.epochs * steps_per_epoch, warmup=0.1)
        network.train()
        for epoch in range(self.epochs):
            self.on_step(epoch, self.epochs)
            features = self.standardize(observe(images))
            for batch in torch.randperm(len(images), device=images.device).tensor_split(steps_per_epoch):
                loss = LOSSES[self.loss](network(features[batch]), images[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
        return network.eval()

    @torch.no_grad()
    def reconstruct(self, features: Tensor) -> Tensor:
        require_fitted(self, "network")
        return in_chunks(features[None], lambda messages: self.network(self.standardize(messages[0])), self.image_shape)


def num_batches(count: int, batch_size: int) -> int:
    """Steps per epoch, such that no batch is a single image, which batch normalization does not accept.

    Args:
        count: images.
        batch_size: images per step, at most.

    Example:
        >>> from cem_fast.attacks.decoder import num_batches
        >>> num_batches(65, 32), num_batches(3, 2)
        (3, 1)
    """
    return min(-(-count // batch_size), count // 2)
