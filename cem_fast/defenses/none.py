"""No defense: the cloud sees the full-width features as they are."""

from __future__ import annotations

from cem_fast.defenses.base import Defense


class NoDefense(Defense):
    """Releases the features of the last stage on the device, without a bottleneck: the reference that every defense is held against."""

    uses_bottleneck = False
