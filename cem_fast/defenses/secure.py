"""Draws of the operating system's secure generator, for messages that must resist a strong adversary."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

BITS = 53  # of a float64's significand
GRID = 20  # bits of a scale of Laplace noise on its grid


def uniform(shape: Sequence[int], dtype: torch.dtype = torch.float64) -> Tensor:
    """Uniform draws on the open interval (0, 1), ``(k + 1/2) / 2^53`` with k of 53 secure bits.

    Args:
        shape: the shape.
        dtype: floating-point type, which the draws are rounded to; they stay below 1.

    Example:
        >>> from cem_fast.defenses import secure
        >>> draws = secure.uniform((1000,))
        >>> bool((draws > 0).all() and (draws < 1).all())
        True
    """
    bits = (_words(shape) & (2**BITS - 1)).double()
    return ((bits + 0.5) * 2.0**-BITS).to(dtype).clamp(max=1 - torch.finfo(dtype).eps / 2)


def normal(shape: Sequence[int]) -> Tensor:
    """Standard normal draws, ``(g1 + g2 + g3 + g4) / 2`` of four independent ones.

    A single draw takes few of the floating-point values near it, and reveals the number it was added to. A sum of four draws leaves an
    attacker an infeasible search.

    Args:
        shape: the shape.

    Returns:
        float64.

    Source:
        Mironov, "On significance of the least significant bits for differential privacy", CCS 2012; Holohan and Braghin, "Secure random
        sampling in differential privacy", ESORICS 2021, the defense that Opacus uses.

    Example:
        >>> from cem_fast.defenses import secure
        >>> 0.9 < float(secure.normal((4000,)).std()) < 1.1
        True
    """
    return torch.special.ndtri(uniform((4, *shape))).sum(0) / 2


def laplace(values: Tensor, scale: float) -> Tensor:
    """Values with Laplace noise, on a grid that is the same for all values.

    ``g (trunc(values / g) + floor(s E1 / g) - floor(s E2 / g))`` with E of a standard exponential distribution and g a power of two of some
    ``s / 2^20``. Sums on the grid are exact, so that no low bit reveals a value. Truncation toward zero keeps the norm of values from
    growing, and with it the sensitivity.

    Args:
        values: floating point, without a gradient.
        scale: mean magnitude of the noise, s.

    Returns:
        The shape, dtype and device of ``values``.

    Raises:
        ValueError: ``values`` needs a gradient, which the grid has not.

    Source:
        Ghosh, Roughgarden and Sundararajan, "Universally utility-maximizing privacy mechanisms", STOC 2009 (the geometric mechanism);
        Mironov, "On significance of the least significant bits for differential privacy", CCS 2012 (the attack); Google's Differential
        Privacy Team, "Secure noise generation", 2020 (the grid).

    Example:
        >>> import torch
        >>> from cem_fast.defenses import secure
        >>> noisy = secure.laplace(torch.zeros(10_000), scale=1.0)
        >>> 0.9 < float(noisy.abs().mean()) < 1.1, bool((noisy * 2**20 == (noisy * 2**20).round()).all())
        (True, True)
    """
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError("secure Laplace noise has no gradient: release features under torch.no_grad()")
    grid = 2.0 ** (math.floor(math.log2(scale)) - GRID)
    first, second = torch.floor(-torch.log(_fine_uniform((2, *values.shape))) * (scale / grid))
    return (((values.double().cpu() / grid).trunc() + (first - second)) * grid).to(values)


def _fine_uniform(shape: Sequence[int]) -> Tensor:
    """Uniform draws of 63 bits, whose relative precision is that of a float64 down to ``2^-10``."""
    return ((_words(shape) & (2**63 - 1)).double() + 0.5) * 2.0**-63


def _words(shape: Sequence[int]) -> Tensor:
    """Random words of 64 bits, int64."""
    count = math.prod(shape)
    return torch.frombuffer(bytearray(os.urandom(8 * max(count, 1))), dtype=torch.int64)[:count].view(tuple(shape))
