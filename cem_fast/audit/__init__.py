"""Audit of an encoder: what could be rebuilt from what it releases, and whether that is within limits."""

from cem_fast.audit.audit import audit
from cem_fast.audit.limits import Judged, Limit
from cem_fast.audit.noise import find_noise
from cem_fast.audit.records import Audit, Tried
from cem_fast.audit.targets import Loaded, Pairs, Target, load_target

__all__ = ["Audit", "Judged", "Limit", "Loaded", "Pairs", "Target", "Tried", "audit", "find_noise", "load_target"]
