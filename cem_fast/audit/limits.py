"""Limits on what attacks may reach, and their verdicts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cem_fast._support.lookup import lookup

METRICS = ("mse", "psnr", "ssim", "lpips", "recognized", "label")
OF_LABELS = ("recognized", "label")
GRAMMAR = re.compile(r"\s*(?P<metric>[A-Za-z_]+)\s*(?P<sign>>=|<=)\s*(?P<bound>[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*")
RESAMPLES = 2000


@dataclass(frozen=True)
class Limit:
    """A bound on a metric.

    Args:
        text: the limit as it was typed.
        metric: ``mse``, ``psnr``, ``ssim``, ``lpips``, ``recognized`` or ``label``.
        at_least: whether the bound is a least value.
        bound: the bound.

    Example:
        >>> from cem_fast.audit import Limit
        >>> Limit.parse("mse >= 0.01")
        Limit(text='mse >= 0.01', metric='mse', at_least=True, bound=0.01)
    """

    text: str
    metric: str
    at_least: bool
    bound: float

    @classmethod
    def parse(cls, text: str) -> Limit:
        """Reads a limit: a metric, ``>=`` or ``<=``, and a number.

        Args:
            text: the limit.

        Raises:
            ValueError: the text is no limit, or the metric is unknown.
        """
        found = GRAMMAR.fullmatch(text)
        try:
            bound = float(found["bound"]) if found else math.nan
        except ValueError:
            bound = math.nan
        if found is None or not math.isfinite(bound):
            raise ValueError(f"limit must be a metric, >= or <=, and a number, such as 'mse >= 0.01', got {text!r}")
        metric = found["metric"]
        lookup("metric of a limit", metric, dict.fromkeys(METRICS))
        return cls(text, metric, found["sign"] == ">=", bound)


@dataclass(frozen=True)
class Judged:
    """The verdict on a limit.

    Args:
        limit: the limit as it was typed.
        holds: whether the unsafe end of the interval of every attack keeps it.
        value: mean of the metric under the attack that is worst for the limit.
        interval: its 95% interval over victims.
        attack: name of that attack; ``label`` for the label read from the features.

    Example:
        >>> from cem_fast.audit import Judged
        >>> Judged("mse >= 0.01", True, 0.02, (0.018, 0.022), "ridge").holds
        True
    """

    limit: str
    holds: bool
    value: float
    interval: tuple[float, float]
    attack: str


def judge(limit: Limit, values: Mapping[str, Tensor], *, seed: int) -> Judged:
    """Judges a limit by the attack whose interval has the most unsafe end.

    Args:
        limit: the limit.
        values: the metric of every victim ``[N]``, by attack.
        seed: seed of the bootstrap.

    Source:
        Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979.

    Example:
        >>> import torch
        >>> from cem_fast.audit import Limit
        >>> from cem_fast.audit.limits import judge
        >>> values = {"ridge": torch.full((9,), 0.5), "decoder": torch.full((9,), 0.25)}
        >>> judge(Limit.parse("mse >= 0.3"), values, seed=0)
        Judged(limit='mse >= 0.3', holds=False, value=0.25, interval=(0.25, 0.25), attack='decoder')
    """
    intervals = {name: interval(each, seed=seed) for name, each in values.items()}
    unsafe = {name: low if limit.at_least else -high for name, (low, high) in intervals.items()}
    worst = min(unsafe, key=lambda name: unsafe[name])
    holds = unsafe[worst] >= (limit.bound if limit.at_least else -limit.bound)
    return Judged(limit.text, holds, float(values[worst].double().mean()), intervals[worst], worst)


def interval(values: Tensor, *, seed: int) -> tuple[float, float]:
    """The 95% percentile interval of a mean, by resampling victims.

    Args:
        values: one value per victim, ``[N]``.
        seed: seed of the resamples.

    Example:
        >>> import torch
        >>> from cem_fast.audit.limits import interval
        >>> interval(torch.ones(5), seed=0)
        (1.0, 1.0)
    """
    generator = torch.Generator().manual_seed(seed)
    rows = values.double().cpu()
    means = torch.cat(
        [
            rows[torch.randint(len(rows), (RESAMPLES // 20, len(rows)), generator=generator)].mean(1)
            for _ in range(20)  # some resamples at a time, for many victims
        ]
    )
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
