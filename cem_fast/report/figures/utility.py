"""Eq. 4 over the same sweeps: posteriors of the right class and component, next to the accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cem_fast import bounds, training
from cem_fast._support.seeding import seeded
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
            each = torch.stack([_posteriors(folder / str(run.record.checkpoint)) for run in row.runs])
            known[id(row)] = dict(zip(COLUMNS[-2:], each.mean(0).tolist()))
        found.append({**place, "accuracy": row.accuracy.mean, **known[id(row)]})
    return found


@torch.no_grad()
def _posteriors(path: Path) -> Tensor:
    """Posteriors ``[2]`` of the right class and component over the test images, each with as many draws as the accuracy has."""
    run = load_run(path)
    if run.loss is None:
        raise ValueError(f"{path}: no utility without noise")
    part, draws = run.data.test, run.config.noise_draws
    labels = part.labels.repeat(draws) if run.config.cem_by_class else None
    with seeded(run.config.seed, "utility"):
        sent = run.defense.before_noise(training.clean_features(run.model, part.images)).flatten(1)
        found = bounds.utility(run.loss.mixture, sent.repeat(draws, 1), labels, run.config.noise_std)
    return torch.stack([found.label, found.component])
