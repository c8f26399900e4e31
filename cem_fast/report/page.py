"""results.json and the folders of its runs to one self-contained HTML page."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cem_fast import bounds, cost
from cem_fast._support.files import check_target, write_atomically
from cem_fast._support.text import one_line, shell_line
from cem_fast.config import UNWRITTEN
from cem_fast.experiments import gains
from cem_fast.experiments.build import build_networks
from cem_fast.experiments.gain_records import FrontierEntry, Pair
from cem_fast.experiments.records import Baseline, Description, Point, Record, Results
from cem_fast.experiments.results import RESULTS, Measured, Row, load_runs, make_rows, read
from cem_fast.experiments.saved_run import read_description
from cem_fast.report import charts

PAGE = "report.html"
MARK = b"<title>cem_fast: "
MOST_SHOWN = 4  # cells of a data set that are all shown at the top
_VICTIMS = {  # what is under attack, and the note next to its pictures
    "inference": ("test images", "test images, unseen in training"),
    "train": ("training images", "training images, which the attacker does not hold"),
}


@dataclass(frozen=True)
class Strip:
    """One row of the picture grid: reconstructions of the chosen images, and the figures of their cell.

    Example:
        >>> from cem_fast.report.page import Strip
        >>> Strip("Original", "test images", "truth", images=[]).mse is None
        True
    """

    title: str
    note: str
    role: str
    images: list[str]
    row: Row | None = None
    mse: float | None = None


@dataclass(frozen=True)
class Gain:
    """A gain with the cells that it compares.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured, make_rows
        >>> from cem_fast.report.page import Gain
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> rest = 0.9, 80, {"ridge": outcome}, Leakage(None, None, None), {"total": 1.0}
        >>> runs = [Measured(Record("faces", RunConfig(cem_weight=w), *rest).at(None), {}) for w in (0.0, 0.5)]
        >>> off, on = make_rows(runs)
        >>> Gain(on, off, gain=0.9, low=0.8, high=1.0).verdict
        'higher'
    """

    on: Row
    off: Row | None
    gain: float
    low: float
    high: float
    accuracy: float | None = None

    @property
    def verdict(self) -> str:
        """``higher``, ``lower``, or ``unclear`` if the interval includes zero."""
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "unclear"


def write(folder: str | Path) -> Path:
    """Renders the report of a finished grid.

    Args:
        folder: holds ``results.json`` and the runs that it names.

    Returns:
        The page, ``report.html`` in that folder; an old one is replaced in one step.

    Raises:
        FileNotFoundError: there is no results.json, or a run that it names is missing.
        ValueError: a file is damaged, or the folder holds another program's ``report.html``.

    Example:
        >>> import json
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments.records import Baseline, Results
        >>> from cem_fast.experiments.run import run
        >>> from cem_fast.report import page
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0, epochs=1, attacks=("nearest",))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = run(config, f"{folder}/run", splits=splits).at("run")
        ...     results = Results("", None, {}, {"tiny": Baseline(0.1, 0.1)}, (record,), (), ())
        ...     _ = (Path(folder) / "results.json").write_text(json.dumps(results.to_json()))
        ...     page.write(folder).name
        'report.html'
    """
    check_target(folder, {PAGE: MARK})
    folder = Path(folder)
    results = read(folder)
    page = folder / PAGE
    write_atomically(page, render(results, load_runs(folder, results), folder).encode())
    return page


def render(results: Results, runs: Sequence[Measured], folder: Path) -> str:
    """Returns the page.

    Args:
        results: content of results.json.
        runs: its runs with their measurements per image.
        folder: the folder that holds them.

    Raises:
        FileNotFoundError: a run is missing.
        ValueError: a file is damaged, or a data set has no attacked run.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments.records import Baseline, Results
        >>> from cem_fast.experiments.results import load_runs
        >>> from cem_fast.experiments.run import run
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0, epochs=1, attacks=("nearest",))
        >>> from cem_fast.report import page
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = run(config, f"{folder}/run", splits=splits).at("run")
        ...     results = Results("", None, {}, {"tiny": Baseline(0.1, 0.1)}, (record,), (), ())
        ...     page.render(results, load_runs(folder, results), Path(folder)).splitlines()[0]
        '<!doctype html>'
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
    environment.filters |= {"shell": shlex.quote, "python": repr}
    rows = make_rows(runs)
    if bare := sorted({*results.baseline} - {row.data for row in rows}):
        raise ValueError(f"{folder / RESULTS}: no attacked runs on {', '.join(bare)}")
    where = f"path/to/{folder.name}" if folder.is_absolute() else folder.as_posix()
    sections = [_section(results, name, rows, runs, folder) for name in results.baseline]
    return environment.get_template("page.html").render(
        results=results,
        sections=sections,
        headline=next((section for section in sections if section["lead"]), None)
        or next((section for section in sections if section["pairs"]), None),
        settings=_shared_settings(results.runs),
        command=shell_line(results.command),
        example=f"{where}/{results.runs[-1].checkpoint}",
        seconds=sum(run.seconds["total"] for run in results.runs),
    )


def _section(
    results: Results, name: str, rows: Sequence[Row], runs: Sequence[Measured], folder: Path
) -> dict[str, Any]:
    """Content of the section on one data set."""
    rows = [row for row in rows if row.data == name]
    record = rows[0].record
    description = read_description(folder / str(record.checkpoint))
    baseline = results.baseline[name]
    pairs = [_gain(entry, rows, runs, folder) for entry in results.pairs if entry.data == name]
    frontier = [_gain(entry, rows, runs, folder) for entry in results.frontier if entry.data == name]
    swept = [row for row in rows if not row.record.plain and gains.noise_sweep(runs, row.runs[0])]
    shown = next((pair for pair in pairs if pair.on.config.defense == "noise"), pairs[0] if pairs else None)
    first = results.lead(name)
    lead = None if first is None else _gain(first, rows, runs, folder)
    hero = _shown(rows, shown, lead)
    dimension = torch.Size(description.image_shape).numel()
    half_budget = _half_budget(rows)
    tradeoff = None
    if swept:
        levels = {cell[0].cell for cell in gains.noise_sweep(runs, swept[0].runs[0])}
        curve = [row for row in rows if row.record.cell in levels]
        tradeoff = charts.tradeoff([*curve, *swept], curve)
    return {
        "name": name,
        "rows": rows,
        "bytes": [_message_bytes(row, description, folder) for row in rows],
        "attacks": list(record.attacks),
        "seconds": {attack: _most_seconds(rows, attack) for attack in record.attacks},
        "inferred": {name: rate.chance for name, rate in record.inferred.items()},
        "half_budget": half_budget,
        "unhalved": {attack: outcome.budget for attack, outcome in record.attacks.items() if attack not in half_budget},
        "recognition": description.recognition,
        "knowledge": {attack: outcome.knowledge for attack, outcome in record.attacks.items()},
        "baseline": baseline,
        "pairs": pairs,
        "lead": lead,
        "gains": _gains(rows, pairs, frontier),
        "swept": bool(swept),
        "shown": shown,
        "mean_gain": sum(pair.gain for pair in pairs) / len(pairs) if pairs else None,
        "averaged": _averaged(pairs),
        "hero": _strips(hero, shown, baseline),
        "gallery": _strips(rows, None, baseline) if len(rows) > len(hero) else None,
        "errors": charts.errors(rows, baseline),
        "curves": charts.curves([(row, _points(row, folder)) for row in hero]),
        "tradeoff": tradeoff,
        "bounds": _bounds(rows, dimension),
        "noiseless": [row.name for row in rows if not row.leakage("heldout_nats")],
        "dimension": dimension,
        "image_shape": description.image_shape,
        "num_classes": description.num_classes,
        "num_victims": description.data.num_victims,
        "victims": _VICTIMS[record.config.protocol][0],
        "leaked": _leaked(rows, folder),
        "data": description.data,
        "config": record.config,
    }


def _message_bytes(row: Row, description: Description, folder: Path) -> int:
    """Bytes that the device sends for one image, 4 for each number."""
    try:
        with torch.device("meta"):  # shapes alone
            model, _ = build_networks(
                row.record.config, image_shape=description.image_shape, num_classes=description.num_classes
            )
        return cost.message_bytes(model, description.image_shape)
    except (TypeError, ValueError, RuntimeError) as error:  # torch's own complaint about a size is a RuntimeError
        where = f"{folder / RESULTS}: the settings of {row.name}"
        raise ValueError(f"{where} are of no network: {one_line(str(error))}") from error


def _gain(entry: Pair | FrontierEntry, rows: Sequence[Row], runs: Sequence[Measured], folder: Path) -> Gain:
    """A gain with the cells that it is about."""
    first, where = runs[entry.run].record, f"{folder / RESULTS}: run {entry.run}"
    on = next((row for row in rows if row.record.cell == first.cell), None)
    if on is None:
        raise ValueError(f"{where} is in a gain of {entry.data}, and is not an attacked run on it")
    off = next((row for row in rows if row.role != "on" and row.record.without_cem == first.without_cem), None)
    if off is None and isinstance(entry, Pair):
        raise ValueError(f"{where} is in a pair, but there is no run without CEM of its settings")
    accuracy = entry.accuracy if isinstance(entry, FrontierEntry) else None
    return Gain(on, off, entry.gain, *entry.interval, accuracy)


def _gains(rows: Sequence[Row], pairs: Sequence[Gain], frontier: Sequence[Gain]) -> list[dict[str, Any]]:
    """The gains of every row that has one: at equal accuracy (None if it is not measured) and at the same noise (None without a pair)."""
    found = []
    for row in rows:
        equal, pair = (next((gain for gain in kind if gain.on is row), None) for kind in (frontier, pairs))
        if equal or pair:
            found.append({"row": row, "equal": equal, "pair": pair})
    return found


def _averaged(pairs: Sequence[Gain]) -> str:
    """What a mean over pairs is over, such as ``7 defenses``; ``8 settings`` if some are of one defense."""
    different = len({pair.on.config.defense for pair in pairs}) == len(pairs)
    return f"{len(pairs)} {'defenses' if different else 'settings'}"


def _bounds(rows: Sequence[Row], dimension: int) -> list[dict[str, Any]]:
    """Estimates of the information, a line per row with noise."""
    found = []
    for row in rows:
        heldout = row.leakage("heldout_nats")
        if heldout:
            floor = float(bounds.relative_mse_floor(max(heldout.mean, 0.0), dimension))
            estimates = {"plugin": row.leakage("plugin_nats"), "heldout": heldout, "error": row.leakage("heldout_se")}
            estimates["capacity"] = row.leakage("capacity_nats")
            found.append({"row": row, **estimates, "floor": floor})
    return found


def _most_seconds(rows: Sequence[Row], attack: str) -> float | None:
    """Most seconds that an attack took on a network; None if a run does not have them."""
    spreads = [row.seconds(attack) for row in rows]
    return max((spread.mean for spread in spreads if spread), default=None)


def _half_budget(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Per attack with a budget, the least and the greatest relative excess of its error at half the budget."""
    found: dict[str, tuple[float, float]] = {}
    for attack in rows[0].record.attacks:
        pairs = [(row.attack(attack, "mse_half_budget"), row.attack(attack, "mse")) for row in rows]
        excess = [half.mean / full.mean - 1 for half, full in pairs if half and full and full.mean]
        if excess:
            found[attack] = (min(excess), max(excess))
    return found


def _leaked(rows: Sequence[Row], folder: Path) -> tuple[int, int] | None:
    """How many test images of all folds the attacker holds as well, and how many there are; None if not recorded."""
    folds = {run.record.config.fold: run.record.checkpoint for row in rows for run in row.runs}
    parts = [read_description(folder / str(path)).data for path in folds.values()]
    leaked = [part.num_leaked for part in parts if part.num_leaked is not None]
    if len(leaked) < len(parts):  # runs of earlier versions
        return None
    return sum(leaked), sum(part.num_victims for part in parts)


def _points(row: Row, folder: Path) -> list[tuple[Point, ...]]:
    return [read_description(folder / str(run.record.checkpoint)).curves for run in row.runs]


def _strips(shown: Sequence[Row], pair: Gain | None, baseline: Baseline) -> list[Strip]:
    """The picture grid: the originals, the reconstructions, and the class mean.

    Args:
        shown: the cells to show.
        pair: the pair without and with CEM, next to which an undefended cell is called that.
        baseline: the controls.
    """
    first = shown[-1].runs[0]
    originals = _pictures(first.measurements["pictures.original"])
    strips = [Strip("Original", _VICTIMS[first.record.config.protocol][1], "truth", originals)]
    for row in shown:
        run = next((run for run in row.runs if run.record.repeat == first.record.repeat), row.runs[0])
        title = row.name[0].upper() + row.name[1:]
        note = f"noise σ = {row.noise_std:g}, rebuilt by the attack “{run.record.strongest}”"
        if pair is not None and row is shown[0] and row.role == "undefended":
            title, note = "No defense", f"{row.label} alone, {note}" if row.label != "none" else note
        rebuilt = _pictures(run.measurements[f"pictures.{run.record.strongest}"])
        strips.append(Strip(title, note, row.role, rebuilt, row, row.mse.mean))
    guess = _pictures(first.measurements["pictures.class_mean"])
    strips.append(
        Strip("Class mean", "what the label alone gives away", "control", guess, None, baseline.class_mean_mse)
    )
    return strips


def _shown(rows: Sequence[Row], pair: Gain | None, lead: Gain | None) -> list[Row]:
    """The cells to show first: an undefended one, a pair without and with CEM, and the one that leads after plain noise of its level.

    Few cells are all shown.
    """
    if pair is None or pair.off is None or len(rows) <= MOST_SHOWN:
        return list(rows)
    undefended = [row for row in rows if row.role == "undefended" and row is not pair.off]
    plain = [row for row in rows if lead and row.record.plain and row.noise_std == lead.on.noise_std]
    shown = [*undefended[:1], *plain[:1], pair.off, pair.on, *([lead.on] if lead else [])]
    return list({id(row): row for row in shown}.values())


def _pictures(images: Tensor) -> list[str]:
    return [charts.picture(image) for image in images]


def _shared_settings(records: Sequence[Record]) -> dict[str, Any]:
    """The settings of all runs: one value where they agree, the list of values where they do not."""
    found: dict[str, Any] = {}
    every = [{**UNWRITTEN, **record.settings} for record in records]
    for key in every[0]:
        values = list({json.dumps(each[key]): each[key] for each in every}.values())
        found[key] = values[0] if len(values) == 1 else values
    return found


def _percent(value: float, digits: int = 0) -> str:
    """A signed percentage with a true minus sign."""
    return f"{100 * value:+.{digits}f}%".replace("-", "−")
