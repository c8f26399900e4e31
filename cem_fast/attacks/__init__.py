"""Model inversion attacks: those of the CEM paper, attacks that start from them, and controls.

"The strongest attack" of a report is the strongest of these; a stronger one may exist. Each image under attack is observed once. Repeated
releases of one image are not modeled: the mean of ``n`` releases with independent noise has an ``n``-th of the noise's variance.
"""

from __future__ import annotations

from collections.abc import Callable

from cem_fast._support.lookup import lookup
from cem_fast.attacks.base import Attack
from cem_fast.attacks.decoder import DECODERS, LOSSES, Decoder
from cem_fast.attacks.ensemble import Ensemble
from cem_fast.attacks.gan import Gan
from cem_fast.attacks.nearest import Nearest
from cem_fast.attacks.optimization import Optimization
from cem_fast.attacks.ridge import Ridge

__all__ = [
    "Attack",
    "Decoder",
    "Ensemble",
    "Gan",
    "Nearest",
    "Optimization",
    "Ridge",
    "build",
    "decoder_names",
    "loss_names",
    "names",
]

_NAMES = tuple(cls.name for cls in (Decoder, Ridge, Nearest, Ensemble, Optimization, Gan))


def names() -> tuple[str, ...]:
    """Names of the attacks that :func:`cem_fast.attacks.build` accepts.

    Example:
        >>> from cem_fast import attacks
        >>> attacks.names()
        ('decoder', 'ridge', 'nearest', 'ensemble', 'optimization', 'gan')
    """
    return _NAMES


def decoder_names() -> tuple[str, ...]:
    """Names of the decoder attack's networks.

    Example:
        >>> from cem_fast import attacks
        >>> attacks.decoder_names()
        ('slim', 'res_norm', 'conv_norm', 'plain')
    """
    return tuple(DECODERS)


def loss_names() -> tuple[str, ...]:
    """Names of the decoder attack's losses.

    Example:
        >>> from cem_fast import attacks
        >>> attacks.loss_names()
        ('mse', 'ssim', 'l1')
    """
    return tuple(LOSSES)


def build(
    name: str,
    *,
    image_shape: tuple[int, int, int],
    epochs: int,
    decoder: str,
    seed: int,
    dropout: float = 0.3,
    loss: str = "mse",
    batch_size: int = 32,
    gan_epochs: int = 20,
    steps: int = 120,
) -> Attack:
    """Builds an attack by name.

    Args:
        name: one of :func:`cem_fast.attacks.names`.
        image_shape: ``(channels, height, width)`` of the images.
        epochs: passes of the decoder attack over the attacker's images, also if another attack starts from it.
        decoder: network of the decoder attack, one of :func:`cem_fast.attacks.decoder_names`.
        seed: seed of all random numbers of the attack.
        dropout: fraction of the hidden features that the network ``slim`` drops in training.
        loss: loss of the decoder attack, one of :func:`cem_fast.attacks.loss_names`.
        batch_size: images per step of the decoder attack and of the gan attack.
        gan_epochs: passes of the gan attack over the attacker's images.
        steps: steps of the optimization attack.

    Returns:
        The attack, not yet fitted.

    Raises:
        ValueError: a name is unknown, or an argument is out of range.

    Example:
        >>> import torch
        >>> from cem_fast import attacks
        >>> images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> def observe(images):
        ...     return torch.nn.functional.avg_pool2d(images, 2)
        >>> attack = attacks.build("decoder", image_shape=(1, 8, 8), epochs=2, decoder="slim", seed=0)
        >>> attack.fit(observe, images, torch.zeros(16, dtype=torch.int64))
        >>> attack.reconstruct(observe(images)).shape
        torch.Size([16, 1, 8, 8])
        >>> attack.budget
        "2 epochs of the network 'slim' on its images, minimizing mse"
    """

    def start() -> Decoder:
        return Decoder(
            image_shape=image_shape,
            epochs=epochs,
            decoder=decoder,
            dropout=dropout,
            loss=loss,
            batch_size=batch_size,
            seed=seed,
        )

    builders: dict[str, Callable[[], Attack]] = {
        Decoder.name: start,
        Ridge.name: lambda: Ridge(image_shape=image_shape, seed=seed),
        Nearest.name: lambda: Nearest(image_shape=image_shape, seed=seed),
        Ensemble.name: lambda: Ensemble(image_shape=image_shape, decoder=start(), seed=seed),
        Optimization.name: lambda: Optimization(image_shape=image_shape, decoder=start(), steps=steps, seed=seed),
        Gan.name: lambda: Gan(image_shape=image_shape, decoder=start(), epochs=gan_epochs, seed=seed),
    }
    return lookup("attack", name, builders)()
