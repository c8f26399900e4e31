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
    """A line per point of a curve, with means over runs and standard deviations."""
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
