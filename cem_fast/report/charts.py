"""Pictures of the report as data URIs: images as PNGs, charts by matplotlib, once for light and once for dark pages."""

from __future__ import annotations

import base64
import io
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from cem_fast.experiments.gains import envelope
from cem_fast.experiments.records import Baseline, Point, Record
from cem_fast.experiments.results import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinguishable with every kind of color vision; the blue is lighter on dark pages.
COLORS = {
    "light": {
        "undefended": "#D55E00",
        "off": "#0072B2",
        "on": "#009E73",
        "text": "#33383f",
        "faint": "#8b929c",
        "grid": "#e6e8ec",
    },
    "dark": {
        "undefended": "#E58A3C",
        "off": "#56B4E9",
        "on": "#2DC7A0",
        "text": "#d6dae0",
        "faint": "#8d96a3",
        "grid": "#333a44",
    },
}
MARKERS = {"undefended": "s", "off": "o", "on": "D"}
LINE = 11  # points between two lines of small text


@dataclass(frozen=True)
class Chart:
    """One chart, drawn for light and for dark pages, both as data URIs.

    Example:
        >>> from cem_fast.report.charts import Chart
        >>> Chart(light="data:image/png;base64,", dark="data:image/png;base64,").light
        'data:image/png;base64,'
    """

    light: str
    dark: str


def picture(image: Tensor) -> str:
    """Encodes an image as a PNG data URI.

    Args:
        image: ``[C, H, W]`` in [0, 1], C = 1 or 3.

    Example:
        >>> import torch
        >>> from cem_fast.report import charts
        >>> charts.picture(torch.zeros(1, 4, 4))[:22]
        'data:image/png;base64,'
    """
    from PIL import Image

    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    stream = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(stream, format="PNG", optimize=True)
    return _data_uri(stream.getvalue())


def errors(rows: Sequence[Row], baseline: Baseline) -> Chart:
    """Draws the strongest attack's error on every run of every cell, and the two controls.

    Args:
        rows: the cells of a data set.
        baseline: the controls.

    Returns:
        The chart.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured, make_rows
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> rest = 0.9, 80, {"ridge": outcome}, Leakage(40.0, 42.0, 0.5), {"total": 1.0}
        >>> from cem_fast.experiments.records import Baseline
        >>> from cem_fast.report import charts
        >>> rows = make_rows([Measured(Record("faces", RunConfig(), *rest).at(None), {})])
        >>> charts.errors(rows, Baseline(0.02, 0.015)).dark[:22]
        'data:image/png;base64,'
    """

    def draw(panels: Sequence[Axes], colors: Mapping[str, str]) -> None:
        axes, labels = panels[0], []
        for height, row in enumerate(reversed(rows)):
            kind, values = row.role, [_error(run.record) for run in row.runs]
            axes.plot(
                [0, row.mse.mean], [height, height], color=colors[kind], linewidth=2, alpha=0.35, solid_capstyle="butt"
            )
            axes.plot(
                values,
                [height] * len(values),
                MARKERS[kind],
                color=colors[kind],
                markersize=5,
                alpha=0.55,
                markeredgewidth=0,
            )
            axes.plot(row.mse.mean, height, "|", color=colors[kind], markersize=20, markeredgewidth=2.5)
            labels.append(row.name)
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        answers = sorted(((baseline.class_mean_mse, "class mean"), (baseline.mean_image_mse, "mean image")))
        for (error, text), side in zip(answers, ("right", "left")):  # of their lines, which may be close together
            axes.axvline(error, color=colors["faint"], linewidth=1.2, linestyle=(0, (4, 3)))
            axes.annotate(text, (error, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
                          ha=side, va="bottom", fontsize=9, color=colors["faint"])  # fmt: skip
        axes.set_xlim(0, 1.15 * max(baseline.mean_image_mse, *(row.mse.mean for row in rows)))
        # long names of rows leave little width: a label at the right end stays inside the picture
        axes.set_xlabel(
            "mean squared error of the strongest attack (pixels in [0, 1]); higher is more private", loc="right"
        )
        axes.grid(axis="x", color=colors["grid"], linewidth=0.8)
        axes.tick_params(axis="y", length=0)

    return _chart(draw, width=8.2, height=1.35 + 0.46 * len(rows))


def curves(tracks: Sequence[tuple[Row, Sequence[Sequence[Point]]]]) -> Chart | None:
    """Draws accuracy and plug-in information over the epochs, a thin line per run and a thick one for their mean.

    Args:
        tracks: rows, each with the measurements of its runs.

    Returns:
        The chart; None without measurements.

    Example:
        >>> from cem_fast.report import charts
        >>> charts.curves([]) is None
        True
    """
    points = [point for _, runs in tracks for run in runs for point in run]
    if not points:
        return None
    informative = any(point.plugin_nats is not None for point in points)
    panels = [("accuracy", "accuracy on test images, %", 100)]
    if informative:
        panels.append(("plugin_nats", "information in the features, nats (estimate)", 1))

    def draw(axes: Sequence[Axes], colors: Mapping[str, str]) -> None:
        for panel, (key, title, scale) in zip(axes, panels):
            for row, runs in tracks:
                lines = [
                    [(p.epoch, scale * getattr(p, key)) for p in run if getattr(p, key) is not None] for run in runs
                ]
                _track(panel, row, [line for line in lines if line], colors)
            panel.set_title(title, fontsize=10, loc="left", color=colors["text"])
            panel.set_xlabel("epoch")
            panel.set_ylim(bottom=0)
            panel.set_xlim(left=0)
            panel.grid(axis="y", color=colors["grid"], linewidth=0.8)
        axes[0].legend(frameon=False, fontsize=9, labelcolor=colors["text"], loc="lower right")

    return _chart(draw, width=8.2 if informative else 4.6, height=3.1, panels=len(panels))


def _track(panel: Axes, row: Row, lines: Sequence[Sequence[tuple[int, float]]], colors: Mapping[str, str]) -> None:
    """A thin line per run, and a thick one for their mean."""
    if not lines:
        return
    color = colors[row.role]
    for line in lines:
        panel.plot(*zip(*line), linewidth=0.9, alpha=0.4, color=color)
    epochs = [epoch for epoch, _ in lines[0]]
    mean = np.mean([[value for _, value in line] for line in lines], axis=0)
    panel.plot(epochs, mean, linewidth=2.2, marker=MARKERS[row.role], markersize=4, label=row.name, color=color)


def tradeoff(rows: Sequence[Row], curve: Sequence[Row]) -> Chart:
    """Draws accuracy against the strongest attack's error: the curve of plain noise, and the cells that are compared to it.

    Args:
        rows: the cells to draw, those of the curve included.
        curve: the cells of plain noise.

    Returns:
        The chart.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured, make_rows
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> rest = 0.9, 80, {"ridge": outcome}, Leakage(40.0, 42.0, 0.5), {"total": 1.0}
        >>> from cem_fast.report import charts
        >>> configs = [RunConfig(noise_std=0.1), RunConfig(noise_std=0.2), RunConfig(cem_weight=0.5)]
        >>> rows = make_rows([Measured(Record("faces", each, *rest).at(None), {}) for each in configs])
        >>> charts.tradeoff(rows, [row for row in rows if row.role == "off"]).light[:22]
        'data:image/png;base64,'
    """

    def draw(panels: Sequence[Axes], colors: Mapping[str, str]) -> None:
        axes = panels[0]
        accuracies, mses = envelope(np.array([r.accuracy.mean for r in curve]), np.array([r.mse.mean for r in curve]))
        axes.plot(100 * accuracies, mses, color=colors["off"], linewidth=1.6, alpha=0.7, zorder=1)
        for row in rows:
            kind = row.role
            axes.errorbar(
                100 * row.accuracy.mean, row.mse.mean, xerr=100 * row.accuracy.deviation, yerr=row.mse.deviation,
                fmt=MARKERS[kind], color=colors[kind], markersize=6, elinewidth=0.9, alpha=0.95,
            )  # fmt: skip
        axes.set_xlabel("accuracy on test images, %")
        axes.set_ylabel("MSE of the strongest attack")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.12)
        axes.grid(color=colors["grid"], linewidth=0.8)
        lowest = -math.inf  # in points; names of cells with nearly the same error are written one above the other
        for row in sorted(rows, key=lambda row: row.mse.mean):
            point = (100 * row.accuracy.mean, row.mse.mean)
            name, right, up = row.name, -8.0, -5.0
            if row not in curve:
                height = axes.transData.transform(point)[1] * 72 / axes.figure.dpi
                lowest = max(height + 5, lowest)
                right, up = 8.0, lowest - height
                lowest += LINE
            elif row.role == "off":
                name = f"σ = {row.noise_std:g}"
            sides = ("left", "baseline") if right > 0 else ("right", "top")
            axes.annotate(
                name, point, (right, up), textcoords="offset points", fontsize=9, color=colors[row.role],
                ha=sides[0], va=sides[1],
            )  # fmt: skip

    return _chart(draw, width=7.2, height=3.8)


def _error(record: Record) -> float:
    """Error of the strongest attack on a run."""
    return min(outcome.mse for outcome in record.attacks.values())


def _chart(
    draw: Callable[[Sequence[Axes], Mapping[str, str]], None], *, width: float, height: float, panels: int = 1
) -> Chart:
    drawn = {}
    for theme, colors in COLORS.items():
        with canvas(width, height, colors) as figure:
            draw(figure.subplots(1, panels, squeeze=False)[0], colors)
            stream = io.BytesIO()
            figure.savefig(stream, format="png", dpi=170, transparent=True)
        drawn[theme] = _data_uri(stream.getvalue())
    return Chart(**drawn)


@contextmanager
def canvas(width: float, height: float, colors: Mapping[str, str]) -> Iterator[Figure]:
    """An empty picture in the style of the report.

    Args:
        width: in inches.
        height: in inches.
        colors: one of the themes of ``COLORS``.

    Yields:
        The picture. The style applies inside the block.

    Example:
        >>> from cem_fast.report import charts
        >>> with charts.canvas(4.0, 3.0, charts.COLORS["light"]) as figure:
        ...     axes = figure.subplots()
        >>> figure.get_size_inches().tolist()
        [4.0, 3.0]
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": colors["text"],
        "axes.labelcolor": colors["text"],
        "axes.edgecolor": colors["faint"],
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "xtick.color": colors["faint"],
        "ytick.color": colors["faint"],
        "xtick.labelcolor": colors["text"],
        "ytick.labelcolor": colors["text"],
    }
    # Not a figure of pyplot: it keeps no global state and looks for no display.
    with rc_context(style), warnings.catch_warnings():
        # of a name longer than the picture; the layout is then matplotlib's default
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure


def _data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
