"""Eq. 4 over the same sweeps: posteriors of the right class and component, next to the accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cem_fast.experiments import leakage
from cem_fast.experiments.results import Row
from cem_fast.experiments.saved_run import load_run
from cem_fast.report.figures import arms

NEEDS = f"{arms.NEEDS}, and noise"
COLUMNS = (*arms.COLUMNS, "accuracy", "class_posterior", "component_posterior")
MEASURES = {
    "accuracy": ("accuracy, %", 100.0),
    "class_posterior": ("posterior of the right class, %", 100.0),
    "component_posterior": ("and component (Eq. 4), %", 100.0),
}
size, draw = partial(arms.size, measures=MEASURES), partial(arms.draw, measures=MEASURES)


def table(rows: Sequence[Row], folder: Path) -> list[dict[str, Any]]:
    """A line per point of a curve: accuracy and posteriors of test images, averaged over runs.

    For the posteriors, see :func:`cem_fast.bounds.utility`.

    Args:
        rows: the cells; those without noise are left out.
        folder: folder of the grid.

    Raises:
        FileNotFoundError: the images are not where they were.
        ValueError: a run is damaged, or its images have changed.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.report.figures import utility
        >>> utility.table([], Path())
        []
    """
    known: dict[int, dict[str, float]] = {}
    found = []
    for place, row in arms.lines([row for row in rows if row.noise_std > 0]):
        if id(row) not in known:  # a cell may be on several curves
            each = torch.stack([leakage.posteriors(load_run(folder / str(run.record.checkpoint))) for run in row.runs])
            known[id(row)] = dict(zip(COLUMNS[-2:], each.mean(0).tolist()))
        found.append({**place, "accuracy": row.accuracy.mean, **known[id(row)]})
    return found
