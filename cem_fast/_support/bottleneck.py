"""Notation of bottlenecks; without torch, so that settings are checked before it is imported."""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

_CONVOLUTION = r"(?:K(?P<kernel>[0-9]{1,4}))?C(?P<channels>[0-9]{1,4})S(?P<stride>[0-9]{1,4})"
GRAMMAR = re.compile(rf"(?P<linear>noRELU_)?{_CONVOLUTION}")
DENSE_GRAMMAR = re.compile(
    r"(?P<linear>noRELU_)?D(?P<numbers>[0-9]{1,4})"
    rf"(?:P(?P<pool>[0-9]{{1,4}})|{_CONVOLUTION})?(?:R(?P<rank>[0-9]{{1,4}}))?(?:G(?P<groups>[0-9]{{1,4}}))?"
)
EXAMPLES = ("C8S1", "K5C8S2", "noRELU_K3C8S1", "D64", "D64P4", "D64R16", "D64G4", "D64K5C8S4")


@dataclass(frozen=True)
class Bottleneck:
    """Shape of the two convolutions of a bottleneck.

    Args:
        channels: channels of the released features.
        stride: stride of the convolution on the device, and of the transposed one in the cloud.
        kernel: side of both windows in pixels, odd.
        relu: whether a ReLU follows each convolution without a Sigmoid.

    Source:
        Xia et al., CVPR 2025, and Li et al., "ResSFL: a resistance transfer framework for defending model inversion attack in split
        federated learning", CVPR 2022 (the notation).

    Example:
        >>> from cem_fast import models
        >>> models.Bottleneck(channels=8)
        Bottleneck(channels=8, stride=1, kernel=3, relu=True)
    """

    channels: int
    stride: int = 1
    kernel: int = 3
    relu: bool = True

    @staticmethod
    def parse(text: int | str) -> Bottleneck | DenseBottleneck | None:
        """Parse the notation of a bottleneck.

        Args:
            text: a number of channels, ``[noRELU_][Kk]CcSs`` or ``[noRELU_]Dr[Pp|[Kk]CcSs][Rk][Gg]``. ``noRELU_C8S1`` and ``K5C8S2`` have
                8 channels, a stride of 1 and 2, and a window of 3 and 5 pixels; 8 means ``C8S1``. For ``D64``, see
                :class:`cem_fast.models.DenseBottleneck`.

        Returns:
            The bottleneck; None for 0 channels.

        Raises:
            ValueError: the text is none of these, or a number is out of range.

        Example:
            >>> from cem_fast.models import Bottleneck
            >>> Bottleneck.parse("noRELU_K5C8S2")
            Bottleneck(channels=8, stride=2, kernel=5, relu=False)
            >>> Bottleneck.parse("D64P4")
            DenseBottleneck(numbers=64, pool=4, convolution=None, rank=None, groups=1, relu=True)
        """
        if isinstance(text, int):
            if text < 0:
                raise ValueError(f"bottleneck must be a number of channels or 0, got {text}")
            return Bottleneck(text) if text else None
        if found := GRAMMAR.fullmatch(text):
            return _convolution(found, text)
        if found := DENSE_GRAMMAR.fullmatch(text):
            return _dense(found, text)
        raise ValueError(
            "bottleneck must be a number of channels, 0 for none, [noRELU_][Kk]CcSs as in noRELU_K3C8S1, or "
            f"[noRELU_]Dr[Pp|[Kk]CcSs][Rk][Gg] as in D64P4, got {text!r}; the nearest is {_nearest(text)!r}"
        )


@dataclass(frozen=True)
class DenseBottleneck:
    """Shape of a dense bottleneck: the device sends ``numbers`` numbers, each a weighted sum over all channels and positions.

    Args:
        numbers: numbers that the device sends, ``Dr``.
        pool: side of the average pool in front, ``Pp``; 1 for none.
        convolution: convolution in front, ``[Kk]CcSs``, whose stride replaces a pool; None for none.
        rank: rank of the weights on the device, ``Rk``; None for full rank.
        groups: squares of positions with weights and an equal share of the numbers of their own, ``Gg``; a square number.
        relu: whether a ReLU follows in the cloud, and the convolution in front.

    Source:
        Dosovitskiy and Brox, "Inverting visual representations with convolutional networks", CVPR 2016, find images harder to rebuild from
        the fully connected layers of a network than from its convolutions.

    Example:
        >>> from cem_fast import models
        >>> models.DenseBottleneck(numbers=64, groups=4)
        DenseBottleneck(numbers=64, pool=1, convolution=None, rank=None, groups=4, relu=True)
    """

    numbers: int
    pool: int = 1
    convolution: Bottleneck | None = None
    rank: int | None = None
    groups: int = 1
    relu: bool = True

    @property
    def shrinkage(self) -> int:
        """Factor by which the sides of the features shrink in front of the weighted sums.

        Example:
            >>> from cem_fast.models import Bottleneck
            >>> Bottleneck.parse("D64K5C8S4").shrinkage
            4
        """
        return self.convolution.stride if self.convolution else self.pool


def _convolution(found: re.Match[str], text: str) -> Bottleneck:
    channels, stride, kernel = int(found["channels"]), int(found["stride"]), int(found["kernel"] or 3)
    if not channels or not stride:
        raise ValueError(f"bottleneck must have at least 1 channel and a stride of at least 1, got {text!r}")
    if not kernel % 2 or kernel < stride:
        raise ValueError(f"bottleneck must have an odd window no smaller than its stride, got {text!r}")
    return Bottleneck(channels, stride, kernel, relu=not found["linear"])


def _dense(found: re.Match[str], text: str) -> DenseBottleneck:
    numbers, pool, groups = int(found["numbers"]), int(found["pool"] or 1), int(found["groups"] or 1)
    rank = None if found["rank"] is None else int(found["rank"])
    if not numbers or not pool:
        raise ValueError(f"bottleneck must send at least 1 number, and have a pool of at least 1, got {text!r}")
    if not groups or math.isqrt(groups) ** 2 != groups or numbers % groups:
        raise ValueError(f"bottleneck must have a square number of groups that divides its numbers, got {text!r}")
    if rank is not None and not 1 <= rank <= numbers // groups:
        raise ValueError(
            f"bottleneck must have a rank from 1 to its numbers per group, {numbers // groups}, got {text!r}"
        )
    convolution = _convolution(found, text) if found["channels"] else None
    return DenseBottleneck(numbers, pool, convolution, rank, groups, relu=not found["linear"])


def _nearest(text: str) -> str:
    """A valid notation: the same letters and numbers in order if that is one, and otherwise the most similar example."""
    if text.isdecimal():
        return f"C{text}S1"
    numbers = {letter.upper(): number for letter, number in re.findall(r"([A-Za-z])([0-9]{1,4})", text)}
    for order in ("KCS", "DPRG", "DKCSRG"):
        if {order[0], *numbers} <= {*order}:
            guess = "".join(letter + numbers[letter] for letter in order if letter in numbers)
            if (GRAMMAR.fullmatch(guess) or DENSE_GRAMMAR.fullmatch(guess)) and len(guess) > 1:
                return ("noRELU_" if "relu" in text.lower() else "") + guess
    of_that_letter = [example for example in EXAMPLES if example[0] == text[:1].upper()]
    return (of_that_letter or difflib.get_close_matches(text, EXAMPLES, n=1, cutoff=0.0))[0]
