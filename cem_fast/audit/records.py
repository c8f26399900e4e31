"""The result of an audit, as audit.json holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from cem_fast.audit.limits import Judged

SCHEMA = 1


@dataclass(frozen=True)
class Tried:
    """The outcome of one attack.

    Args:
        mse: mean squared error of pixels in [0, 1].
        psnr: peak signal-to-noise ratio in dB.
        ssim: structural similarity.
        recognized: share of reconstructions that a classifier assigns to their own class; None without labels.
        mse_half_budget: error with half the budget; None where it cannot be halved.
        knowledge: what the attacker knows.
        budget: computation of the attack.
        seconds: seconds that it took.
        lpips: perceptual distance; None unless a limit asks for it.

    Example:
        >>> from cem_fast.audit import Tried
        >>> Tried(0.01, 20.0, 0.5, None, None, "holds images", "a closed form", 1.0).mse
        0.01
    """

    mse: float
    psnr: float
    ssim: float
    recognized: float | None
    mse_half_budget: float | None
    knowledge: str
    budget: str
    seconds: float
    lpips: float | None = None


@dataclass(frozen=True)
class Audit:
    """The result of an audit.

    Args:
        passed: whether all limits hold.
        limits: the limits and their verdicts.
        attacks: outcomes by attack.
        not_tried: attacks of the library that were not tried.
        baseline: ``mean_image_mse`` and ``class_mean_mse``: errors of an attacker without features.
        label: share of labels read from the features, and ``chance``; None without labels.
        information: see :func:`cem_fast.audit.estimates.information`; None without noise of the audit.
        data: ``num_classes``, ``num_attacker`` of ``num_available`` images, ``num_victims``, ``num_shared`` (victims that the attacker
            holds), ``image_shape``, ``name`` and ``digest``.
        target: ``name`` and ``digest`` of the encoder.
        accuracy: accuracy of the decoder on released features; None without a decoder or labels.
        noise_std: standard deviation of the Gaussian noise.
        releases: messages of one image that the attacker uses.
        seed: seed of all random choices.
        versions: versions of packages.
        clean_accuracy: accuracy of the decoder on features without noise and defense; None without a decoder or labels.
        pictures: originals and, by attack, reconstructions; not in audit.json.

    Example:
        >>> from cem_fast.audit import Audit
        >>> Audit(True, (), {}, (), {}, None, None, {}, {}, None, 0.1, 1, 0, {}).to_json()["noise_std"]
        0.1
    """

    passed: bool
    limits: tuple[Judged, ...]
    attacks: dict[str, Tried]
    not_tried: tuple[str, ...]
    baseline: dict[str, float]
    label: dict[str, float] | None
    information: dict[str, float | None] | None
    data: dict[str, Any]
    target: dict[str, str]
    accuracy: float | None
    noise_std: float
    releases: int
    seed: int
    versions: dict[str, str | None]
    clean_accuracy: float | None = None
    pictures: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def strongest(self) -> str:
        """Name of the attack with the least error."""
        return min(self.attacks, key=lambda name: self.attacks[name].mse)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of audit.json."""
        found = {name: value for name, value in vars(self).items() if name != "pictures"}
        found["limits"] = [asdict(each) for each in self.limits]
        found["attacks"] = {name: asdict(each) for name, each in self.attacks.items()}
        return {"schema": SCHEMA, **found}
