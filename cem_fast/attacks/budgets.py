"""Budgets of all attacks, in one place."""

from __future__ import annotations

from typing import Any

from cem_fast._support.lookup import lookup

# Settings of the attacks by budget. "standard" is the budget of the published results.
BUDGETS: dict[str, dict[str, Any]] = {
    "quick": {
        "draws": 2,
        "epochs": 40,
        "gan_epochs": 5,
        "steps": 30,
        "decoder_steps": 300,
        "corrector_steps": 100,
        "inversion_batch": 48,
        "map_steps": 30,
        "stages": 3,
        "flow_steps": 100,
    },
    "standard": {
        "draws": 8,
        "epochs": 160,
        "gan_epochs": 20,
        "steps": 120,
        "decoder_steps": 1000,
        "corrector_steps": 160,
        "inversion_batch": 96,
        "map_steps": 600,
        "stages": 3,
        "flow_steps": 800,
    },
    "thorough": {
        "draws": 8,
        "epochs": 320,
        "gan_epochs": 40,
        "steps": 240,
        "decoder_steps": 2000,
        "corrector_steps": 320,
        "inversion_batch": 96,
        "map_steps": 1200,
        "stages": 3,
        "flow_steps": 1600,
    },
}


def budget_names() -> tuple[str, ...]:
    """Names of the budgets that :func:`cem_fast.attacks.build` accepts.

    Example:
        >>> from cem_fast import attacks
        >>> attacks.budget_names()
        ('quick', 'standard', 'thorough')
    """
    return tuple(BUDGETS)


def budgeted(budget: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a budget, with those that are given in place of its own.

    Args:
        budget: one of :func:`budget_names`.
        settings: settings by name.

    Raises:
        ValueError: the budget is unknown.

    Example:
        >>> from cem_fast.attacks.budgets import budgeted
        >>> budgeted("quick", {"steps": 7})["steps"]
        7
    """
    return lookup("budget", budget, BUDGETS) | settings
