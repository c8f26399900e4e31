"""Model inversion attacks, one file each."""

from __future__ import annotations

from cem_fast.attacks.base import Attack
from cem_fast.attacks.decoder import DECODERS, Decoder
from cem_fast.attacks.ridge import Ridge
from cem_fast.names import lookup

__all__ = ["Attack", "Decoder", "Ridge", "build", "decoder_names", "names"]

_ATTACKS = {"decoder": Decoder, "ridge": Ridge}


def names() -> tuple[str, ...]:
    """Names of the attacks that :func:`build` knows."""
    return tuple(_ATTACKS)


def decoder_names() -> tuple[str, ...]:
    """Names of the networks that the decoder attack can train."""
    return tuple(DECODERS)


def build(name: str, *, image_shape: tuple[int, int, int], epochs: int, decoder: str, seed: int) -> Attack:
    """Builds an attack by name.

    Args:
        name: one of :func:`names`.
        image_shape: ``(channels, height, width)`` of the images.
        epochs: passes of the decoder attack over the attacker's images.
        decoder: network of the decoder attack, one of :func:`decoder_names`.
        seed: seed of every random choice of the attack.

    Returns:
        The attack, not yet fitted.

    Raises:
        ValueError: a name is unknown, or an argument is out of range.
    """
    if lookup("attack", name, _ATTACKS) is Ridge:
        return Ridge(image_shape=image_shape, seed=seed)
    return Decoder(image_shape=image_shape, epochs=epochs, decoder=decoder, seed=seed)
