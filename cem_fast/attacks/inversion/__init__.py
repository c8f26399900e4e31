"""The inversion attack, one stage a file."""

from cem_fast.attacks.inversion.attack import Inversion

__all__ = ["Inversion"]
