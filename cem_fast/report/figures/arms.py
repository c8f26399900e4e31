"""Curves over one setting: cells that differ in it only, without CEM and with it."""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cem_fast.config import RunConfig
from cem_fast.experiments.names import differing, name
from cem_fast.experiments.records import WITHOUT_CEM
from cem_fast.experiments.results import Row
from cem_fast.report.charts import MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SETTINGS = {
    "noise_std": "standard deviation of the noise, σ",
    "lambda": "weight of CEM, λ",
    "cut": "stages on the device",
}
LEAST = 3  # values that make a curve
NEEDS = f"it needs attacked cells that differ in one of {', '.join(SETTINGS)} alone, with at least {LEAST} values of it"
COLUMNS = ("panel", "data", "model", "defense", "setting", "value", "arm", "role", "runs")


def lines(rows: Sequence[Row]) -> list[tuple[dict[str, Any], Row]]:
    """Every point of every curve, by panel, arm and rising value: its place (``COLUMNS``), and the cell.

    Over the noise and the cut, one arm is without CEM, and there is one for each setting of CEM. Over the weight of CEM, an arm starts
    without it.

    Args:
        rows: the cells.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured, make_rows
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> rest = 0.9, 80, {"ridge": outcome}, Leakage(40.0, 42.0, 0.5), {"total": 1.0}
        >>> from cem_fast.report.figures import arms
        >>> configs = [RunConfig(noise_std=level) for level in (0.1, 0.2, 0.3)]
        >>> found = arms.lines(make_rows([Measured(Record("faces", each, *rest).at(None), {}) for each in configs]))
        >>> [(place["arm"], place["value"]) for place, _ in found]
        [('noise', 0.1), ('noise', 0.2), ('noise', 0.3)]
    """
    found: list[tuple[dict[str, Any], Row]] = []
    panel = 0
    for setting in SETTINGS:
        groups = _grouped(rows, partial(_settings, of_cem=False, but=setting))
        for group in groups:
            off = [row for row in group if row.role != "on"]
            on = _grouped((row for row in group if row.role == "on"), partial(_settings, of_cem=True, but=setting))
            arms = [[*off, *arm] for arm in on] if setting == "lambda" else [off, *on]
            arms = [arm for arm in arms if len(arm) >= LEAST]
            panel += bool(arms)
            heading = _heading(group[0], [each[0] for each in groups if len(each) >= LEAST], setting)
            for arm in arms:
                title = name(arm[-1].record, [row.record for row in group], shown=[setting])
                for row in sorted(arm, key=partial(_value, setting=setting)):
                    found.append((_place(row, panel, setting, title) | {"defense": heading}, row))
    return found


def _heading(row: Row, others: Iterable[Row], setting: str) -> str:
    """The defense of a panel, with every setting that tells it from the other panels of the setting, those of CEM apart."""

    def bare(config: RunConfig) -> RunConfig:
        return replace(config, **WITHOUT_CEM)

    among = [bare(each.config) for each in others]
    return ", ".join([row.config.defense, *differing(bare(row.config), among, shown=[setting, "model"])])


def size(table: Sequence[Mapping[str, Any]], measures: Mapping[str, tuple[str, float]]) -> tuple[float, float]:
    """Width and height of the picture in inches: a block of rows per data set, a row per measure, a column per panel.

    Args:
        table: lines with the columns ``COLUMNS``.
        measures: column -> its title, and the factor to multiply it by.

    Example:
        >>> from cem_fast.report.figures import arms
        >>> arms.size([{"data": "faces", "panel": 1}], {"accuracy": ("accuracy, %", 100.0)})
        (5.0, 2.9)
    """
    blocks = _blocks(table)
    return 0.8 + 4.2 * max(map(len, blocks)), (0.6 + 2.3 * len(measures)) * len(blocks)


def draw(
    picture: Figure,
    table: Sequence[Mapping[str, Any]],
    colors: Mapping[str, str],
    measures: Mapping[str, tuple[str, float]],
) -> None:
    """Draws every measure over the values of the setting, at equal distances.

    Args:
        picture: the figure to draw on.
        table: lines with the columns ``COLUMNS``, those of ``measures``, and where these spread, ``<measure>_deviation``.
        colors: colors of roles and texts.
        measures: column -> its title, and the factor to multiply it by.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from cem_fast.report.charts import COLORS
        >>> from cem_fast.report.figures import arms
        >>> cell = {"data": "faces", "panel": 1, "model": "slim", "defense": "noise", "setting": "noise_std", "arm": "noise"}
        >>> table = [{**cell, "role": "off", "value": level, "accuracy": 1 - level} for level in (0.1, 0.2, 0.3)]
        >>> arms.draw(picture := Figure(), table, COLORS["light"], {"accuracy": ("accuracy, %", 100.0)})
        >>> len(picture.subfigs[0].axes)
        1
    """
    blocks = _blocks(table)
    for part, block in zip(picture.subfigures(len(blocks), squeeze=False)[:, 0], blocks):
        grid = part.subplots(len(measures), max(map(len, blocks)), squeeze=False, sharex="col", sharey="row")
        for axes in grid[:, len(block) :].flat:
            axes.set_visible(False)
        for points, column in zip(block, grid.T):
            _panel(column, points, colors, measures)
        for axes, (text, _) in zip(grid[:, 0], measures.values()):
            axes.set_ylabel(text)


def _blocks(table: Sequence[Mapping[str, Any]]) -> list[list[list[Mapping[str, Any]]]]:
    """The points of every panel, by data set: errors on different images have little in common."""
    blocks: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for line in table:
        blocks.setdefault(line["data"], {}).setdefault(line["panel"], []).append(line)
    return [list(panels.values()) for panels in blocks.values()]


def _panel(
    column: Sequence[Axes],
    points: Sequence[Mapping[str, Any]],
    colors: Mapping[str, str],
    measures: Mapping[str, tuple[str, float]],
) -> None:
    """A sweep, one measure below the other."""
    values = sorted({line["value"] for line in points})
    for axes, (key, (_, scale)) in zip(column, measures.items()):
        for arm in dict.fromkeys(line["arm"] for line in points):
            _curve(axes, [line for line in points if line["arm"] == arm], values, key, scale, colors)
        axes.grid(axis="y", color=colors["grid"], linewidth=0.8)
        axes.margins(x=0.08, y=0.12)
    title = ", ".join(points[0][key] for key in ("data", "model", "defense"))
    column[0].set_title(textwrap.fill(title, 44), fontsize=10, loc="left", color=colors["text"])
    column[-1].set_xticks(range(len(values)), [f"{value:g}" for value in values])
    column[-1].set_xlabel(SETTINGS[points[0]["setting"]])
    column[-1].legend(frameon=False, fontsize=9, labelcolor=colors["text"])


def _curve(
    axes: Axes,
    arm: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    key: str,
    scale: float,
    colors: Mapping[str, str],
) -> None:
    """A line in the color of the arm's last cell, and every cell in its own color, with its deviation over runs."""
    last = arm[-1]["role"]
    places, heights = [values.index(line["value"]) for line in arm], [scale * line[key] for line in arm]
    axes.plot(places, heights, linewidth=1.8, color=colors[last])
    axes.plot([], [], linewidth=1.8, color=colors[last], marker=MARKERS[last], markersize=6, label=arm[-1]["arm"])
    for place, height, line in zip(places, heights, arm):
        style: dict[str, Any] = {
            "fmt": MARKERS[line["role"]],
            "color": colors[line["role"]],
            "markersize": 6,
            "elinewidth": 0.9,
        }
        axes.errorbar(place, height, yerr=scale * line.get(f"{key}_deviation", 0.0) or None, **style)


def _grouped(rows: Iterable[Row], key: Callable[[Row], str]) -> list[list[Row]]:
    groups = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.values())


def _settings(row: Row, *, of_cem: bool, but: str) -> str:
    """The settings of a cell's CEM, or all others, without one of them."""
    settings = {
        key: value
        for key, value in row.record.settings.items()
        if (key == "lambda" or key.startswith("cem_")) == of_cem and key not in (but, "seed", "fold")
    }
    return json.dumps([row.data, settings], sort_keys=True)


def _value(row: Row, setting: str) -> float:
    return row.record.settings[setting]


def _place(row: Row, panel: int, setting: str, arm: str) -> dict[str, Any]:
    return {
        "panel": panel,
        "data": row.data,
        "model": row.config.model,
        "defense": row.config.defense,
        "setting": setting,
        "value": _value(row, setting),
        "arm": arm,
        "role": row.role,
        "runs": row.num_runs,
    }
