"""No defense: full-width features leave the device, unchanged."""

from __future__ import annotations

from cem_fast.defenses.base import Defense


class NoDefense(Defense):
    """Releases the features of the device's last stage, without a bottleneck: the baseline of every defense.

    Example:
        >>> from cem_fast import defenses
        >>> defenses.NoDefense().uses_bottleneck
        False
    """

    uses_bottleneck = False
    keeps_range = True
