"""results.json: its runs, cells and rows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from cem_fast.experiments import saved_run

RESULTS = "results.json"
MARK = f'{{\n "schema": {saved_run.SCHEMA},\n "command": '.encode()  # start of the results.json of a grid
SYMBOLS = {
    "noise_std": "σ",
    "lambda": "λ",
    "cem_components": "K",
}  # how tables and figures call a setting, in this order


@dataclass(frozen=True)
class Measured:
    """One run's entry in results.json together with what it measured per image.

    Args:
        record: the entry.
        measurements: per victim ``mse.<attack> [N]`` and ``groups [N]``, per test image ``correct [T]`` (share of the noise draws in which
            it was classified correctly) and ``correct.groups [T]``.
    """

    record: Mapping[str, Any]
    measurements: Mapping[str, Tensor]

    @property
    def strongest(self) -> str | None:
        """The attack with the lowest mean error; None for a run that was not attacked."""
        attacks = self.record["attacks"]
        return min(attacks, key=lambda name: attacks[name]["mse"], default=None)

    @property
    def errors(self) -> Tensor:
        """``[N]`` error of the strongest attack on every victim."""
        return self.measurements[f"mse.{self.strongest}"].double()

    @property
    def repeat(self) -> tuple[int, int]:
        """What the runs of one cell differ in."""
        return self.record["seed"], self.record["fold"]

    @property
    def cell(self) -> str:
        """Every setting that the runs of one cell share."""
        settings = {key: value for key, value in self.record["config"].items() if key not in ("seed", "fold")}
        return json.dumps([self.record["data"], settings], sort_keys=True)

    @property
    def without_cem(self) -> str:
        """Settings of the cell without those of CEM, which the run shares with those it is compared to."""
        settings = {
            key: value
            for key, value in self.record["config"].items()
            if key not in ("seed", "fold", "lambda") and not key.startswith("cem_")
        }
        return json.dumps([self.record["data"], settings], sort_keys=True)


def cells(runs: Sequence[Measured]) -> dict[str, list[Measured]]:
    """Groups runs that differ in seed and fold alone, in the order in which they come."""
    grouped = defaultdict(list)
    for run in runs:
        grouped[run.cell].append(run)
    return dict(grouped)


class Spread(NamedTuple):
    """Mean of a figure over the runs of a cell, and its standard deviation (0 for a single run)."""

    mean: float
    deviation: float


@dataclass(frozen=True)
class Row:
    """One cell of the grid, for the tables; every figure is that of the strongest attack of each run."""

    runs: list[Measured]

    @property
    def data(self) -> str:
        return self.runs[0].record["data"]

    @property
    def label(self) -> str:
        """``noise + CEM``."""
        return self.runs[0].record["defense"] + (" + CEM" if self.runs[0].record["cem"] else "")

    @property
    def noise_std(self) -> float:
        """Standard deviation of the Gaussian noise that is added last to the released features."""
        return self.runs[0].record["config"]["noise_std"]

    @property
    def undefended(self) -> bool:
        """Whether nothing at all is done to the features, beyond sending few of them."""
        return self.label in ("none", "bottleneck") and self.noise_std == 0

    @property
    def num_runs(self) -> int:
        return len(self.runs)

    @property
    def accuracy(self) -> Spread:
        return _spread(run.record["accuracy"] for run in self.runs)

    @property
    def mse(self) -> Spread:
        return self._of_strongest("mse")

    @property
    def psnr(self) -> Spread:
        return self._of_strongest("psnr")

    @property
    def ssim(self) -> Spread:
        return self._of_strongest("ssim")

    @property
    def recognized(self) -> Spread:
        return self._of_strongest("recognized")

    def attack(self, name: str, figure: str) -> Spread | None:
        """A figure of one attack; None if a run has none."""
        values = [run.record["attacks"].get(name, {}).get(figure) for run in self.runs]
        return None if None in values else _spread(values)

    def leakage(self, figure: str) -> Spread | None:
        """A figure of the leakage; None where no Gaussian noise is added."""
        values = [run.record["leakage"][figure] for run in self.runs]
        return None if None in values else _spread(values)

    def _of_strongest(self, figure: str) -> Spread:
        return _spread(run.record["attacks"][run.strongest][figure] for run in self.runs)


def make_rows(runs: Sequence[Measured]) -> list[Row]:
    """One row per cell of attacked runs: by data set and defense as they come, then by noise level and weight of CEM."""
    found = [Row(cell) for cell in cells([run for run in runs if run.strongest]).values()]
    records = [run.record for run in runs]
    data = list(dict.fromkeys(record["data"] for record in records))
    defenses = list(dict.fromkeys(record["defense"] for record in records))

    def place(row: Row) -> tuple[float, ...]:
        record = row.runs[0].record
        config = record["config"]
        return data.index(row.data), defenses.index(record["defense"]), config["noise_std"], config["lambda"]

    return sorted(found, key=place)


def cell_name(row: Row, among: Sequence[Row], *, shown: Collection[str] = ()) -> str:
    """``noise + CEM``, with every setting in which another row that would be called the same differs.

    Args:
        row: the row to name.
        among: the rows beside it.
        shown: settings that need not be said, since they stand beside the name.
    """
    config = row.runs[0].record["config"]
    alike = [each.runs[0].record["config"] for each in among if each.label == row.label and each.data == row.data]
    said = [key for key in config if key not in ("data", "seed", "fold", *shown)]
    differing = [key for key in said if any(other[key] != config[key] for other in alike)]
    first = [key for key in SYMBOLS if key in differing]
    return ", ".join([row.label, *(_said(key, config[key]) for key in dict.fromkeys([*first, *differing]))])


def _said(key: str, value: Any) -> str:
    """A setting in as few words as tell it from others: ``K = 5``, ``without labels``, ``variant = official``."""
    if key == "cem_by_class":
        return "by class" if value else "without labels"
    if key == "cem_covariance":
        return value
    return f"{SYMBOLS.get(key, key.removeprefix('cem_'))} = {f'{value:g}' if isinstance(value, float) else value}"


def load_runs(folder: str | Path, results: dict[str, Any]) -> list[Measured]:
    """The runs of a results.json together with what they measured per image.

    Args:
        folder: the folder of results.json.
        results: its content.
    """
    return [Measured(r, saved_run.read_measurements(Path(folder) / r["checkpoint"])) for r in results["runs"]]


def _spread(values: Iterable[float]) -> Spread:
    found = np.array(list(values), dtype=float)
    return Spread(float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else 0.0)
