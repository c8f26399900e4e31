"""Model inversion attacks, one file each."""

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
    """Names of the attacks that :func:`build` knows."""
    return _NAMES


def decoder_names() -> tuple[str, ...]:
    """Names of the networks that the decoder attack can train."""
    return tuple(DECODERS)


def loss_names() -> tuple[str, ...]:
    """Names of the losses that the decoder attack can minimize."""
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
        name: one of :func:`names`.
        image_shape: ``(channels, height, width)`` of the images.
        epochs: passes of the decoder attack over the attacker's images, also where it is the start of another attack.
        decoder: network of the decoder attack, one of :func:`decoder_names`.
        seed: seed of every random choice of the attack.
        dropout: share of its hidden features that the network ``slim`` drops in training.
        loss: what the decoder attack minimizes, one of :func:`loss_names`.
        batch_size: images per step of the decoder attack, and of the gan attack after it.
        gan_epochs: passes of the gan attack over the attacker's images.
        steps: steps of the optimization attack.

    Returns:
        The attack, not yet fitted.

    Raises:
        ValueError: a name is unknown, or an argument is out of range.
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
