"""Model inversion attacks, one file each."""

from __future__ import annotations

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

_ATTACKS = {
    "decoder": Decoder,
    "ridge": Ridge,
    "nearest": Nearest,
    "ensemble": Ensemble,
    "optimization": Optimization,
    "gan": Gan,
}


def names() -> tuple[str, ...]:
    """Names of the attacks that :func:`build` knows."""
    return tuple(_ATTACKS)


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
    shared = {"image_shape": image_shape, "seed": seed}
    of_decoder = {"epochs": epochs, "decoder": decoder, "dropout": dropout, "loss": loss, "batch_size": batch_size}
    cls = lookup("attack", name, _ATTACKS)
    if cls is Decoder:
        return Decoder(**shared, **of_decoder)
    if cls in (Ridge, Nearest):
        return cls(**shared)
    budget = {Ensemble: {}, Optimization: {"steps": steps}, Gan: {"epochs": gan_epochs}}[cls]
    return cls(**shared, decoder=Decoder(**shared, **of_decoder), **budget)
