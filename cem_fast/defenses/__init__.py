"""The defenses of Xia et al., CVPR 2025, and of its released code, one file each. Each composes with the others, noise and CEM.

What CEM and these defenses do not promise: CEM bounds the mean squared error of every attack from below, up to the unknown entropy of the
data. Labels and attributes of an image can leak while its pixels do not.
"""

from __future__ import annotations

from typing import Any

from cem_fast._support.lookup import lookup
from cem_fast.defenses.adversarial import AdversarialRepresentation
from cem_fast.defenses.base import Defense
from cem_fast.defenses.bottleneck import Bottleneck
from cem_fast.defenses.composed import Composed
from cem_fast.defenses.distance_correlation import DistanceCorrelation
from cem_fast.defenses.dropout import FeatureDropout
from cem_fast.defenses.local_dp import LocalDP
from cem_fast.defenses.noise import GaussianNoise
from cem_fast.defenses.noise_arl import NoiseARL
from cem_fast.defenses.noise_nopeek import NoiseNoPeek
from cem_fast.defenses.none import NoDefense
from cem_fast.defenses.patrol import Patrol
from cem_fast.defenses.quantized import Quantized
from cem_fast.defenses.ressfl import ResSFL
from cem_fast.defenses.sca import SparseCodingArchitecture
from cem_fast.defenses.topk_pruning import TopKPruning

__all__ = [
    "AdversarialRepresentation",
    "Bottleneck",
    "Composed",
    "Defense",
    "DistanceCorrelation",
    "FeatureDropout",
    "GaussianNoise",
    "LocalDP",
    "NoDefense",
    "NoiseARL",
    "NoiseNoPeek",
    "Patrol",
    "Quantized",
    "ResSFL",
    "SparseCodingArchitecture",
    "TopKPruning",
    "build",
    "names",
    "settings",
]

# class and settings of each defense; one without noise_std among its settings is composed with the noise
_DEFENSES: dict[str, tuple[type[Defense], tuple[str, ...]]] = {
    "none": (NoDefense, ()),
    "bottleneck": (Bottleneck, ()),
    "noise": (GaussianNoise, ("noise_std", "train_noise_std")),
    "adversarial": (AdversarialRepresentation, ("adversary_weight", "seed")),
    "noise_arl": (NoiseARL, ("noise_std", "train_noise_std", "adversary_weight", "seed")),
    "ressfl": (ResSFL, ("adversary_weight", "ssim_threshold", "seed")),
    "patrol": (Patrol, ("adversary_weight", "ssim_threshold", "pruned_channels", "seed")),
    "sca": (SparseCodingArchitecture, ("sparse_threshold", "seed")),
    "distance_correlation": (DistanceCorrelation, ("nopeek_weight",)),
    "noise_nopeek": (NoiseNoPeek, ("noise_std", "train_noise_std", "nopeek_weight")),
    "dropout": (FeatureDropout, ("dropout_rate",)),
    "topk_pruning": (TopKPruning, ("pruned_share",)),
    "local_dp": (LocalDP, ("privacy_mechanism", "privacy_epsilon", "privacy_delta", "privacy_clip")),
}


def names() -> tuple[str, ...]:
    """Names of the defenses that :func:`cem_fast.defenses.build` accepts.

    Example:
        >>> from cem_fast import defenses
        >>> defenses.names()[:4]
        ('none', 'bottleneck', 'noise', 'adversarial')
    """
    return tuple(_DEFENSES)


def settings() -> tuple[str, ...]:
    """Names of the settings that :func:`cem_fast.defenses.build` accepts.

    Example:
        >>> from cem_fast import defenses
        >>> "dropout_rate" in defenses.settings()
        True
    """
    return tuple(dict.fromkeys(key for _, wanted in _DEFENSES.values() for key in wanted))


def build(
    name: str, *, noise_std: float, train_noise_std: float | None = None, secure: bool = False, **values: Any
) -> Defense:
    """Builds a defense by name.

    Args:
        name: one of :func:`cem_fast.defenses.names`.
        noise_std: standard deviation of the Gaussian noise that every defense adds last to the features it releases; 0 for none.
        train_noise_std: standard deviation of that noise in training mode; None for ``noise_std``.
        secure: whether the defense draws from the operating system's secure generator; not for evaluations.
        **values: the other :func:`cem_fast.defenses.settings`; those that this defense does not use may be left out.

    Returns:
        The defense, composed with the noise.

    Raises:
        TypeError: a setting that this defense needs is missing.
        ValueError: the name or a setting is unknown, or a setting that this defense uses is out of range.
        ImportError: a package that this defense needs is not installed.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> defense = defenses.build("dropout", noise_std=0.1, dropout_rate=0.3)
        >>> [type(part).__name__ for part in defense.parts]
        ['FeatureDropout', 'GaussianNoise']
        >>> defense.release(torch.rand(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """
    cls, wanted = lookup("defense", name, _DEFENSES)
    for key in values:
        lookup("setting", key, dict.fromkeys(settings()))
    values |= {"noise_std": noise_std, "train_noise_std": train_noise_std}
    if missing := [key for key in wanted if key not in values]:
        raise TypeError(f"the defense {name} needs the settings {', '.join(missing)}")
    defense = cls(**{key: values[key] for key in wanted})
    if noise_std != 0 and "noise_std" not in wanted:
        defense = Composed(defense, GaussianNoise(noise_std=noise_std, train_noise_std=train_noise_std))
    defense.secure = secure
    return defense
