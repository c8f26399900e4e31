"""Attacks with small budgets, built and fitted for tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cem_fast import attacks, metrics
from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import Attack, Observe
from cem_fast.data import Splits

OF_INVERSION = {"decoder_steps": 20, "corrector_steps": 5, "map_steps": 5, "inversion_batch": 48}


def build(name: str, image_shape: Sequence[int], **changes: Any) -> Any:
    """An attack with a budget of seconds."""
    settings = {
        "epochs": 15,
        "decoder": "slim",
        "seed": 0,
        "gan_epochs": 3,
        "steps": 30,
        "flow_steps": 60,
        **OF_INVERSION,
        **changes,
    }
    return attacks.build(name, image_shape=tuple(image_shape), **settings)


def fitted(name: str, splits: Splits, observe: Observe, **changes: Any) -> Any:
    """An attack with twice that budget, fitted to the attacker's part."""
    attack = build(
        name, splits.image_shape, **{"epochs": 30, "gan_epochs": 4, "steps": 60, "flow_steps": 120, **changes}
    )
    attack.fit(observe, splits.attacker.images, splits.attacker.labels)
    return attack


def error_at_half_budget(full: Attack, splits: Splits, observe: Observe) -> float:
    """Error of an attack with half its budget, relative to its error with all of it."""
    errors = []
    for attack in (full.half_budget(), full):
        with seeded(0):
            attack.fit(observe, splits.attacker.images, splits.attacker.labels)
            rebuilt = attack.reconstruct(observe(splits.test.images))
            errors.append(float(metrics.mse(rebuilt, splits.test.images).mean()))
    return errors[0] / errors[1]
