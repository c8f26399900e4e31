"""Fig. 3: the strongest attack's error against the uncertainty about an image given its released features."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cem_fast.experiments.results import Row
from cem_fast.experiments.saved_run import read_description
from cem_fast.report.charts import MARKERS
from cem_fast.report.figures import cell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NEEDS = "it needs attacked runs with noise, without which no information is finite"
ESTIMATES = {"heldout_nats": "held-out estimate", "plugin_nats": "plug-in estimate, the one that CEM lowers"}
COLUMNS = (*cell.COLUMNS, "heldout_nats", "heldout_se", "plugin_nats", "dimension", "mse", "mse_deviation")


def table(rows: Sequence[Row], folder: Path) -> list[dict[str, Any]]:
    """A line per cell with noise: both estimates of ``I(z; zhat)`` in nats, ``d`` of the images, and the strongest attack's error.

    Args:
        rows: the cells.
        folder: folder of the grid.

    Raises:
        FileNotFoundError: a run is missing.
        ValueError: a run is damaged.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.report.figures import leakage
        >>> leakage.table([], Path())
        []
    """
    found = []
    for row in rows:
        spreads = {key: row.leakage(key) for key in ("heldout_nats", "heldout_se", "plugin_nats")}
        estimates = {key: spread.mean for key, spread in spreads.items() if spread is not None}
        if not estimates:
            continue
        description = read_description(folder / str(row.record.checkpoint))
        found.append(
            {
                **cell.entry(row),
                **estimates,
                "dimension": math.prod(description.image_shape),
                "mse": row.mse.mean,
                "mse_deviation": row.mse.deviation,
            }
        )
    return found


def size(table: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Width and height of the picture in inches: a row per data set, a column per estimate.

    Args:
        table: result of :func:`table`.

    Example:
        >>> from cem_fast.report.figures import leakage
        >>> leakage.size([{"data": "faces"}])
        (10.0, 4.2)
    """
    return 10.0, 0.5 + 3.7 * len({line["data"] for line in table})


def draw(picture: Figure, table: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    """Draws ``log MSE`` over ``h = (H(x|z) - H(x)) / d``, its best fit, and ``MSE >= c exp(2 h)`` of Theorem 1.

    The entropy of images is unknown, and so is ``c``. The one drawn is the greatest that no cell contradicts.

    Args:
        picture: the figure to draw on.
        table: result of :func:`table`.
        colors: colors of roles and texts.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from cem_fast.report.charts import COLORS
        >>> from cem_fast.report.figures import leakage
        >>> cell = {"data": "faces", "role": "off", "dimension": 256}
        >>> table = [{**cell, "heldout_nats": i, "plugin_nats": i, "mse": 1 / i} for i in (10, 20, 40)]
        >>> leakage.draw(picture := Figure(), table, COLORS["light"])
        >>> len(picture.axes)
        2
    """
    data = list(dict.fromkeys(line["data"] for line in table))
    for name, panels in zip(data, picture.subplots(len(data), len(ESTIMATES), squeeze=False, sharey="row")):
        lines = [line for line in table if line["data"] == name]
        errors = np.array([line["mse"] for line in lines])
        for axes, (key, text) in zip(panels, ESTIMATES.items()):
            left_open = np.array([-line[key] / line["dimension"] for line in lines])
            for role in ("off", "on"):
                here = np.array([line["role"] == role for line in lines])
                style = {"color": colors[role], "markersize": 6, "label": cell.ROLES[role], "zorder": 3}
                axes.plot(left_open[here], errors[here], MARKERS[role], **style)
            axes.set_yscale("log")
            if np.ptp(left_open) > 0:
                _lines(axes, left_open, errors, colors)
            axes.set_title(f"{name}: {text}", fontsize=10, loc="left", color=colors["text"])
            axes.set_xlabel("h: H(x|z) − H(x), nats per pixel")
            axes.yaxis.set_minor_formatter("{x:.3g}")
            axes.yaxis.set_major_formatter("{x:.3g}")
            axes.grid(color=colors["grid"], linewidth=0.8, which="both")
            axes.legend(frameon=False, fontsize=8.5, labelcolor=colors["text"], loc="upper left")
        panels[0].set_ylim(errors.min() / 1.1, errors.max() * 1.35)
        panels[0].set_ylabel("MSE of the strongest attack")


def _lines(axes: Axes, left_open: np.ndarray, errors: np.ndarray, colors: Mapping[str, str]) -> None:
    """The best exponential fit, and the bound of Theorem 1."""
    slope, height = np.polyfit(left_open, np.log(errors), 1)
    linear = np.corrcoef(left_open, np.log(errors))[0, 1]
    of_ranks = np.corrcoef(left_open.argsort().argsort(), errors.argsort().argsort())[0, 1]
    places = np.linspace(left_open.min(), left_open.max(), 50)
    fit = f"MSE ∝ exp({slope:.2g} h), correlation {linear:.2f}, of ranks {of_ranks:.2f}".replace("-", "−")
    axes.plot(places, np.exp(height + slope * places), color=colors["text"], linewidth=1.2, alpha=0.7, label=fit)
    greatest = (errors * np.exp(-2 * left_open)).min()
    style: dict[str, Any] = {"color": colors["faint"], "linewidth": 1.4, "linestyle": (0, (4, 3))}
    axes.plot(places, greatest * np.exp(2 * places), **style, label="Theorem 1: MSE ≥ c exp(2 h)")
