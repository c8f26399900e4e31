"""Standard draws of the operating system's secure generator, for messages that must resist a strong adversary."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from cem_fast.deploy.draws import NORMAL, Draws, RandomInput

BITS = 53  # of a float64's significand


def uniform(shape: Sequence[int]) -> Tensor:
    """Uniform draws on the open interval (0, 1), ``(k + 1/2) / 2^53`` with k of 53 secure bits.

    Args:
        shape: the shape.

    Returns:
        float64.

    Example:
        >>> from cem_fast.deploy import secure
        >>> draws = secure.uniform((1000,))
        >>> bool((draws > 0).all() and (draws < 1).all())
        True
    """
    count = math.prod(shape)
    whole = torch.frombuffer(bytearray(os.urandom(8 * max(count, 1))), dtype=torch.int64)[:count]
    bits = (whole & (2**BITS - 1)).double()
    return ((bits + 0.5) * 2.0**-BITS).clamp(max=1 - 2.0**-BITS).view(tuple(shape))


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
        >>> from cem_fast.deploy import secure
        >>> 0.9 < float(secure.normal((4000,)).std()) < 1.1
        True
    """
    return torch.special.ndtri(uniform((4, *shape))).sum(0) / 2


def draw(inputs: Sequence[RandomInput], count: int) -> list[Tensor]:
    """Draws for the random inputs of a device half.

    Args:
        inputs: the random inputs of the manifest.
        count: messages in the batch.

    Returns:
        float32 ``[count, *shape]`` each.

    Example:
        >>> from cem_fast.deploy import secure
        >>> from cem_fast.deploy.draws import RandomInput
        >>> secure.draw([RandomInput("noise", "normal", (4,))], 2)[0].shape
        torch.Size([2, 4])
    """
    found = []
    for each in inputs:
        shape = (count, *each.shape)
        drawn = normal(shape) if each.distribution == NORMAL else uniform(shape).clamp(max=1 - 2.0**-24)  # below 1
        found.append(drawn.float())
    return found


class SecureDraws(Draws):
    """Lets the random functions of torch inside the block draw by the system's secure generator, on a device that runs PyTorch.

    Never use it in evaluations, which need a seed.

    Example:
        >>> import torch
        >>> from cem_fast import defenses
        >>> from cem_fast.deploy.secure import SecureDraws
        >>> defense = defenses.GaussianNoise(noise_std=0.1)
        >>> def released():
        ...     torch.manual_seed(0)
        ...     with SecureDraws():
        ...         return defense.release(torch.zeros(4))
        >>> torch.equal(released(), released())
        False
    """

    def standard(self, distribution: str, like: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            drawn = normal(like.shape) if distribution == NORMAL else uniform(like.shape).clamp(max=1 - 2.0**-24)
            return drawn.to(like)
