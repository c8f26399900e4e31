"""Defenses of collaborative inference, one file each; every one of them composes with CEM."""

from __future__ import annotations

from cem_fast.defenses.adversarial import AdversarialRepresentation
from cem_fast.defenses.base import Defense
from cem_fast.defenses.bottleneck import Bottleneck
from cem_fast.defenses.noise import GaussianNoise
from cem_fast.defenses.noise_arl import NoiseARL
from cem_fast.defenses.none import NoDefense
from cem_fast.names import lookup

__all__ = [
    "AdversarialRepresentation",
    "Bottleneck",
    "Defense",
    "GaussianNoise",
    "NoDefense",
    "NoiseARL",
    "build",
    "names",
]

# every defense's class, and which of the settings it takes
_DEFENSES = {
    "none": (NoDefense, ()),
    "bottleneck": (Bottleneck, ()),
    "noise": (GaussianNoise, ("noise_std",)),
    "adversarial": (AdversarialRepresentation, ("adversary_weight", "seed")),
    "noise_arl": (NoiseARL, ("noise_std", "adversary_weight", "seed")),
}


def names() -> tuple[str, ...]:
    """Names of the defenses that :func:`build` knows."""
    return tuple(_DEFENSES)


def build(name: str, *, noise_std: float, adversary_weight: float, seed: int) -> Defense:
    """Builds a defense by name.

    Args:
        name: one of :func:`names`.
        noise_std: standard deviation of the noise, for those that add noise.
        adversary_weight: weight of the adversarial term, for those that have one.
        seed: seed of the defense's own networks.

    Returns:
        The defense.

    Raises:
        ValueError: the name is unknown, or a setting that this defense uses is out of range.
    """
    cls, wanted = lookup("defense", name, _DEFENSES)
    settings = {"noise_std": noise_std, "adversary_weight": adversary_weight, "seed": seed}
    return cls(**{key: settings[key] for key in wanted})
