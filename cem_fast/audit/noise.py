"""The least noise with which a limit holds."""

from __future__ import annotations

from collections.abc import Callable

from cem_fast.audit.limits import Limit
from cem_fast.audit.records import Audit

DOUBLINGS, HALVINGS, CONFIRMATIONS = 24, 8, 24
LEAST = 1e-6  # noise that is told from none, in units of the start
STEP = 1.05  # between confirmations


def find_noise(audited: Callable[[float, bool], Audit], limit: str, *, start: float) -> Audit:
    """Finds the least noise by bisection on cheap attacks, and confirms it by all attacks in steps of 5%.

    Args:
        audited: audits at a noise level; with all attacks if its second argument is true, with cheap ones otherwise.
        limit: the limit, which must be among those of the audit, as the last one.
        start: a noise level to start from, such as the standard deviation of the features.

    Returns:
        The confirmed audit.

    Raises:
        ValueError: the limit holds at no noise that was tried.

    Example:
        >>> from dataclasses import replace
        >>> from cem_fast.audit import Audit, Judged, find_noise
        >>> empty = Audit(True, (), {}, (), {}, None, None, {}, {}, None, 0.0, 1, 0, {})
        >>> def audited(noise, every):
        ...     return replace(empty, limits=(Judged("mse >= 1", noise >= 0.3, noise, (noise, noise), "ridge"),), noise_std=noise)
        >>> 0.3 <= find_noise(audited, "mse >= 1", start=1.0).noise_std < 0.32
        True
    """
    Limit.parse(limit)

    def holds(noise: float) -> bool:
        return audited(noise, False).limits[-1].holds

    low, high = 0.0, start
    for _ in range(DOUBLINGS):
        if holds(high):
            break
        high *= 2
    else:
        raise ValueError(f"the limit {limit!r} holds at no noise up to {high:.3g}")
    if holds(0.0):
        high, low = 0.0, LEAST * start
    else:
        low = high / 2
        while low > LEAST * start and holds(low):
            low, high = low / 2, low
    for _ in range(HALVINGS if high else 0):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if holds(middle) else (middle, high)
    for _ in range(CONFIRMATIONS):
        found = audited(high, True)
        if found.limits[-1].holds:
            return found
        high = max(STEP * high, low)
    raise ValueError(f"the limit {limit!r} does not hold under the strongest attack at noise {high:.3g}")
