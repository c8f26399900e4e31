"""Gains as results.json holds them."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Pair:
    """Relative rise of the strongest attack's error with CEM at the same noise; see :func:`cem_fast.experiments.gains.pairs`.

    Attributes:
        data: name of the data set.
        defense: name of the defense.
        noise_std: standard deviation of the noise.
        cem_weight: weight of the CEM loss, ``lambda`` in the file.
        run: index of the first run of the cell with CEM.
        gain: relative rise of the error.
        interval: its 95% interval.

    Example:
        >>> from cem_fast.experiments.gain_records import Pair
        >>> Pair("faces", "noise", 0.1, 0.5, run=2, gain=0.9, interval=(0.8, 1.0)).gain
        0.9
    """

    data: str
    defense: str
    noise_std: float
    cem_weight: float = field(metadata={"json": "lambda"})
    run: int
    gain: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class FrontierEntry:
    """Relative rise of the strongest attack's error over plain noise at equal accuracy; see :func:`cem_fast.experiments.gains.frontier`.

    Attributes:
        data: name of the data set.
        defense: name of the defense.
        noise_std: standard deviation of the noise.
        cem_weight: weight of the CEM loss, ``lambda`` in the file.
        run: index of the first run of the cell.
        accuracy: accuracy of the cell.
        gain: relative rise of the error.
        interval: its 95% interval.
        name: name of the cell in tables; None in files of earlier versions, which have entries for cells with CEM alone.
        baseline: indices of the runs of plain noise that the cell is compared to; empty in files of earlier versions.

    Example:
        >>> from cem_fast.experiments.gain_records import FrontierEntry
        >>> FrontierEntry("faces", "noise", 0.1, 0.5, run=2, accuracy=0.9, gain=0.1, interval=(0.0, 0.2)).accuracy
        0.9
    """

    data: str
    defense: str
    noise_std: float
    cem_weight: float = field(metadata={"json": "lambda"})
    run: int
    accuracy: float
    gain: float
    interval: tuple[float, float]
    name: str | None = field(default=None, metadata={"later": True})
    baseline: tuple[int, ...] = field(default=(), metadata={"later": True})
