"""results.json and the folders of its runs -> one self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cem_fast import bounds
from cem_fast._support.files import check_target, write_atomically
from cem_fast.experiments import gains, saved_run
from cem_fast.experiments.results import RESULTS, Measured, Row, cell_name, load_runs, make_rows
from cem_fast.report import charts

PAGE = "report.html"
MARK = b"<title>cem_fast: "
_VICTIMS = {  # what is under attack, and what is said beside its pictures
    "inference": ("test images", "test images, unseen in training"),
    "train": ("training images", "training images, which the attacker does not hold"),
}


@dataclass(frozen=True)
class Strip:
    """One row of the picture grid: what was rebuilt of every chosen image, and the figures of the cell it comes from."""

    title: str
    note: str
    role: str
    images: list[str]
    row: Row | None = None
    mse: float | None = None


def write(folder: str | Path) -> Path:
    """Renders the report of a finished grid.

    Args:
        folder: holds ``results.json`` and the runs that it names.

    Returns:
        The page, ``report.html`` in that folder; an old one is replaced in one step.

    Raises:
        FileNotFoundError: there is no results.json, or a run that it names is missing.
        ValueError: a file is damaged, or a ``report.html`` is there that is not a report of cem_fast.
    """
    check_target(folder, {PAGE: MARK})
    folder = Path(folder)
    page = folder / PAGE
    write_atomically(page, render(*read(folder), folder).encode())
    return page


def read(folder: str | Path) -> tuple[dict[str, Any], list[Measured]]:
    """Reads a finished grid.

    Args:
        folder: holds ``results.json`` and the runs that it names.

    Returns:
        What results.json holds, and its runs.

    Raises:
        FileNotFoundError: there is no results.json, or a run that it names is missing or was not kept.
        ValueError: a file is damaged.
    """
    path = Path(folder) / RESULTS
    try:
        results = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no results here; run cem-fast evaluate or cem-fast demo first") from None
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not readable as JSON ({error})") from None
    if lost := sum(run["checkpoint"] is None for run in results["runs"]):
        raise FileNotFoundError(
            f"{path}: the files of {lost} of its {len(results['runs'])} runs were not kept; to have them again: {results['command']}"
        )
    return results, load_runs(folder, results)


def render(results: dict[str, Any], runs: Sequence[Measured], folder: Path) -> str:
    """Returns the page.

    Args:
        results: what results.json holds.
        runs: its runs, with what they measured per image.
        folder: the folder that holds them.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("cem_fast.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "mse": lambda value: f"{value:.4f}"}
    rows = make_rows(runs)
    sections = [_section(results, name, rows, runs, folder) for name in results["baseline"]]
    return environment.get_template("page.html").render(
        results=results,
        sections=sections,
        headline=next((section for section in sections if section["pairs"]), None),
        settings=_shared_settings(results["runs"]),
        example=results["runs"][-1]["checkpoint"],
        folder=f"path/to/{folder.name}" if folder.is_absolute() else folder.as_posix(),
    )


def _section(
    results: dict[str, Any], name: str, rows: Sequence[Row], runs: Sequence[Measured], folder: Path
) -> dict[str, Any]:
    """Everything that the page says about one data set."""
    rows = [row for row in rows if row.data == name]
    first = rows[0].runs[0]
    description = saved_run.read_description(folder / first.record["checkpoint"])
    baseline = results["baseline"][name]
    pairs = [_gain(entry, rows, runs) for entry in results["pairs"] if entry["data"] == name]
    frontier = [_gain(entry, rows, runs) for entry in results["frontier"] if entry["data"] == name]
    swept = [row for row in rows if charts.role(row) == "on" and gains.noise_sweep(runs, row.runs[0])]
    shown = next((pair for pair in pairs if pair["defense"] == "noise"), pairs[0] if pairs else None)
    dimension = torch.Size(description["image_shape"]).numel()
    informative = [row for row in rows if row.leakage("heldout_nats")]
    half_budget = _half_budget(rows)
    tradeoff = None
    if swept:
        levels = {cell[0].cell for cell in gains.noise_sweep(runs, swept[0].runs[0])}
        curve = [row for row in rows if row.runs[0].cell in levels]
        tradeoff = charts.tradeoff([*curve, *swept], curve)
    return {
        "name": name,
        "cells": [{"row": row, "name": cell_name(row, rows), "role": charts.role(row)} for row in rows],
        "attacks": list(first.record["attacks"]),
        "half_budget": half_budget,
        "unhalved": {
            attack: entry["budget"] for attack, entry in first.record["attacks"].items() if attack not in half_budget
        },
        "recognition": description["recognition"],
        "knowledge": {attack: entry["knowledge"] for attack, entry in first.record["attacks"].items()},
        "baseline": baseline,
        "pairs": pairs,
        "frontier": frontier,
        "swept": bool(swept),
        "shown": shown,
        "mean_gain": sum(pair["gain"] for pair in pairs) / len(pairs) if pairs else None,
        "hero": _strips(rows, shown, baseline),
        "gallery": _strips(rows, None, baseline) if len(rows) > 3 else None,
        "errors": charts.errors(rows, baseline),
        "curves": charts.curves(
            _shown(rows, shown), lambda run: saved_run.read_description(folder / run.record["checkpoint"])["curves"]
        ),
        "tradeoff": tradeoff,
        "bounds": [
            {
                "name": cell_name(row, rows),
                "role": charts.role(row),
                "plugin": row.leakage("plugin_nats"),
                "heldout": row.leakage("heldout_nats"),
                "error": row.leakage("heldout_se"),
                "floor": float(bounds.relative_mse_floor(max(row.leakage("heldout_nats").mean, 0.0), dimension)),
            }
            for row in informative
        ],
        "noiseless": [cell_name(row, rows) for row in rows if not row.leakage("heldout_nats")],
        "dimension": dimension,
        "image_shape": description["image_shape"],
        "num_classes": description["num_classes"],
        "num_victims": description["data"]["num_victims"],
        "victims": _VICTIMS[first.record["protocol"]][0],
        "leaked": _leaked(rows, folder),
        "data": description["data"],
        "record": first.record,
    }


def _gain(entry: dict[str, Any], rows: Sequence[Row], runs: Sequence[Measured]) -> dict[str, Any]:
    """An entry of ``pairs`` or ``frontier`` with the cells that it is about and what can be said of it."""
    first = runs[entry["run"]]
    on = next(row for row in rows if row.runs[0].cell == first.cell)
    off = next((row for row in rows if charts.role(row) != "on" and row.runs[0].without_cem == first.without_cem), None)
    low, high = entry["interval"]
    verdict = "higher" if low > 0 else "lower" if high < 0 else "unclear"
    return {
        **entry,
        "on": on,
        "off": off,
        "low": low,
        "high": high,
        "verdict": verdict,
        "name": cell_name(on, rows),
    }


def _half_budget(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Per attack with a budget, the least and the greatest relative excess of its error at half the budget."""
    found: dict[str, tuple[float, float]] = {}
    for attack in rows[0].runs[0].record["attacks"]:
        pairs = [(row.attack(attack, "mse_half_budget"), row.attack(attack, "mse")) for row in rows]
        excess = [half.mean / full.mean - 1 for half, full in pairs if half and full]
        if excess:
            found[attack] = (min(excess), max(excess))
    return found


def _leaked(rows: Sequence[Row], folder: Path) -> tuple[int, int] | None:
    """How many of the test images of all folds the attacker holds as well, and how many there are; None if runs do not say."""
    folds = {run.record["fold"]: run.record["checkpoint"] for row in rows for run in row.runs}
    parts = [saved_run.read_description(folder / path)["data"] for path in folds.values()]
    if any("num_leaked" not in part for part in parts):  # runs of earlier versions
        return None
    return sum(part["num_leaked"] for part in parts), sum(part["num_victims"] for part in parts)


def _strips(rows: Sequence[Row], pair: dict[str, Any] | None, baseline: dict[str, float]) -> list[Strip]:
    """The picture grid: the originals, what the attacks rebuilt, and what the label alone gives away.

    Args:
        rows: the cells of a data set.
        pair: the pair to show beside the undefended cell; None shows every cell.
        baseline: the controls.
    """
    shown = _shown(rows, pair)
    first = shown[-1].runs[0]
    originals = _pictures(first.measurements["pictures.original"])
    strips = [Strip("Original", _VICTIMS[first.record["protocol"]][1], "truth", originals)]
    for row in shown:
        run = next((run for run in row.runs if run.repeat == first.repeat), row.runs[0])
        name, role = cell_name(row, rows), charts.role(row)
        title = name[0].upper() + name[1:]
        note = f"noise σ = {row.noise_std:g}, rebuilt by the attack “{run.strongest}”"
        if pair is not None and row is shown[0] and role == "undefended":
            title, note = "No defense", f"{name} alone, {note}" if row.label != "none" else note
        rebuilt = _pictures(run.measurements[f"pictures.{run.strongest}"])
        strips.append(Strip(title, note, role, rebuilt, row, row.mse.mean))
    guess = _pictures(first.measurements["pictures.class_mean"])
    strips.append(
        Strip("Class mean", "what the label alone gives away", "control", guess, None, baseline["class_mean_mse"])
    )
    return strips


def _shown(rows: Sequence[Row], pair: dict[str, Any] | None) -> list[Row]:
    """The cells to show: an undefended one and a pair without and with CEM; all of them where there is no pair."""
    if pair is None:
        return list(rows)
    undefended = [row for row in rows if charts.role(row) == "undefended" and row is not pair["off"]]
    return [*undefended[:1], pair["off"], pair["on"]]


def _pictures(images: Tensor) -> list[str]:
    return [charts.picture(image) for image in images]


def _shared_settings(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The settings of all runs: one value where they agree, the list of values where they do not."""
    found: dict[str, Any] = {}
    for key in records[0]["config"]:
        values = list({json.dumps(record["config"][key]): record["config"][key] for record in records}.values())
        found[key] = values[0] if len(values) == 1 else values
    return found


def _percent(value: float, digits: int = 0) -> str:
    """A signed percentage with a true minus sign."""
    return f"{100 * value:+.{digits}f}%".replace("-", "−")
