"""Fig. 4: accuracy and the strongest attack's error over the noise, the weight of CEM and the cut."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from cem_fast.experiments.results import Row
from cem_fast.report.figures import arms

NEEDS = arms.NEEDS
COLUMNS = (*arms.COLUMNS, "accuracy", "accuracy_deviation", "mse", "mse_deviation")
MEASURES = {"accuracy": ("accuracy, %", 100.0), "mse": ("MSE of the strongest attack", 1.0)}
size, draw = partial(arms.size, measures=MEASURES), partial(arms.draw, measures=MEASURES)


def table(rows: Sequence[Row], folder: Path) -> list[dict[str, Any]]:
    """A line per point of a curve, with means over runs and standard deviations.

    Args:
        rows: the cells.
        folder: folder of the grid.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured, make_rows
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> rest = 0.9, 80, {"ridge": outcome}, Leakage(40.0, 42.0, 0.5), {"total": 1.0}
        >>> from pathlib import Path
        >>> from cem_fast.report.figures import sweeps
        >>> configs = [RunConfig(noise_std=level) for level in (0.1, 0.2, 0.3)]
        >>> rows = make_rows([Measured(Record("faces", each, *rest).at(None), {}) for each in configs])
        >>> [line["mse"] for line in sweeps.table(rows, Path())]
        [0.01, 0.01, 0.01]
    """
    return [
        {
            **place,
            "accuracy": row.accuracy.mean,
            "accuracy_deviation": row.accuracy.deviation,
            "mse": row.mse.mean,
            "mse_deviation": row.mse.deviation,
        }
        for place, row in arms.lines(rows)
    ]
