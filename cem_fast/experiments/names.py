"""Names of runs in tables, figures and progress lines: the defense, and every setting that tells a run from the others."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from cem_fast.config import UNWRITTEN, RunConfig
from cem_fast.experiments.records import Record

SYMBOLS = {
    "noise_std": "σ",
    "lambda": "λ",
    "cem_components": "K",
    "bottleneck": "bottleneck",
    "cut": "cut",
}  # names of settings, in this order
NETWORK = ("model", "cut", "bottleneck")  # compared with all runs, since these decide what a defense works on


def name(record: Record, among: Iterable[Record], *, shown: Collection[str] = ()) -> str:
    """Names a cell: ``noise + CEM``, with every setting that tells it from the others in the table.

    Args:
        record: a run of the cell.
        among: a run of every cell in the same table, this one included.
        shown: settings to leave out, since the table has a column for them.

    Returns:
        The name.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.names import name
        >>> from cem_fast.experiments.records import Leakage, Record
        >>> configs = [RunConfig(cem_weight=0.5), RunConfig(cem_weight=0.5, cem_components=1)]
        >>> runs = [Record("faces", each, 0.9, 80, {}, Leakage(None, None, None), {"total": 1.0}) for each in configs]
        >>> name(runs[1], runs)
        'noise + CEM, K = 1'
    """
    return ", ".join([record.label, *differing(record.config, (each.config for each in among), shown=shown)])


def differing(config: RunConfig, among: Iterable[RunConfig], *, shown: Collection[str] = ()) -> list[str]:
    """Names the settings in which other settings differ from these, seed and fold apart.

    On the same data, the network is compared with that of all others, and the rest with those of the same label.

    Args:
        config: the settings.
        among: the others; these settings may be among them.
        shown: settings to leave out.

    Returns:
        Settings with their values, in words.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.names import differing
        >>> differing(RunConfig(bottleneck="D64"), [RunConfig(), RunConfig(cut=3), RunConfig(defense="dropout", epochs=9)])
        ['bottleneck = D64', 'cut = 2']
    """
    own = _settings(config)
    others = [(_settings(each), each.label == config.label) for each in among if each.data == config.data]
    candidates = [key for key in dict.fromkeys((*SYMBOLS, *own)) if key not in ("data", "seed", "fold", *shown)]
    return [
        _in_words(key, own[key])
        for key in candidates
        if any(other[key] != own[key] for other, alike in others if alike or key in NETWORK)
    ]


def _settings(config: RunConfig) -> dict[str, Any]:
    return {**UNWRITTEN, **config.to_json()}


def _in_words(key: str, value: Any) -> str:
    """A setting in few words: ``K = 5``, ``without labels``, ``variant = official``."""
    if key == "cem_by_class":
        return "by class" if value else "without labels"
    if key == "cem_covariance":
        return value
    return f"{SYMBOLS.get(key, key.removeprefix('cem_'))} = {f'{value:g}' if isinstance(value, float) else value}"
