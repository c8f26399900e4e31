"""Search of settings that meet a target: a loss of accuracy that is allowed, an error that is wanted, a budget of the device."""

from __future__ import annotations

from cem_fast.tune.search import Targets, Trial, Tuned, tune

__all__ = ["Targets", "Trial", "Tuned", "tune"]
