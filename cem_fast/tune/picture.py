"""The picture of a search: accuracy against error, with plain noise as the line to beat."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cem_fast.experiments.gains import envelope
from cem_fast.report.charts import COLORS, MARKERS, canvas

if TYPE_CHECKING:
    from cem_fast.tune.search import Trial, Tuned

SMALLEST, LARGEST = 12.0, 160.0  # areas of points, in points squared


def draw(tuned: Tuned) -> bytes:
    """Draws the search and the confirmation as a PNG.

    Args:
        tuned: result of the search.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.tune import Targets, Tuned, picture
        >>> picture.draw(Tuned(Targets(), RunConfig(), (), ()))[1:4]
        b'PNG'
    """
    colors = COLORS["light"]
    panels = [
        ("search, cheap attacks", tuned.plain, tuned.trials),
        ("confirmation, all attacks", tuned.confirmed_plain, tuned.confirmed),
    ]
    most = max((trial.message_bytes or 1 for trial in (*tuned.trials, *tuned.confirmed)), default=1)
    with canvas(10.0, 4.2, colors) as figure:
        for axes, (title, plain, trials) in zip(figure.subplots(1, 2, squeeze=False)[0], panels):
            line, points = _points(plain), _points(trials)
            if len(line):
                axes.plot(
                    *envelope(100 * line[:, 0], line[:, 1]),
                    color=colors["off"],
                    marker=MARKERS["off"],
                    label="plain noise",
                )
            if len(points):
                areas = SMALLEST + (LARGEST - SMALLEST) * points[:, 2] / most
                axes.scatter(
                    100 * points[:, 0],
                    points[:, 1],
                    s=areas,
                    color=colors["on"],
                    alpha=0.6,
                    label="trials, by bytes sent",
                )
            axes.set_title(title, fontsize=10, loc="left", color=colors["text"])
            axes.set_xlabel("accuracy, %")
            axes.set_ylabel("MSE of the strongest attack")
            axes.grid(color=colors["grid"], linewidth=0.8)
            if len(line) or len(points):
                axes.legend(frameon=False, fontsize=9, labelcolor=colors["text"])
        if tuned.best is not None:
            best = tuned.confirmed[tuned.best]
            style: dict[str, Any] = {"facecolors": "none", "edgecolors": colors["undefended"], "linewidths": 2}
            figure.axes[1].scatter([100 * (best.accuracy or 0)], [best.mse or 0], s=1.5 * LARGEST, **style)
        stream = io.BytesIO()
        figure.savefig(stream, format="png", dpi=150, metadata={"Software": "cem_fast"})
    return stream.getvalue()


def _points(trials: Sequence[Trial]) -> np.ndarray:
    """Accuracy, error and bytes of the trials that are done, ``[N, 3]``."""
    found = [(t.accuracy, t.mse, t.message_bytes or 1) for t in trials if t.accuracy is not None and t.mse is not None]
    return np.array(found, dtype=float).reshape(-1, 3)
