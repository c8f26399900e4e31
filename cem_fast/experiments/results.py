"""results.json: its runs, cells and rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from cem_fast._support import typed_json
from cem_fast._support.text import shell_line
from cem_fast.config import RunConfig
from cem_fast.experiments.names import name
from cem_fast.experiments.records import SCHEMA, Cell, GridRecord, Record, Results
from cem_fast.experiments.saved_run import DESCRIPTION, read_measurements

RESULTS = "results.json"
MARK = f'{{\n "schema": {SCHEMA},\n "command": '.encode()  # start of the results.json of a grid
Role = Literal["undefended", "off", "on"]
R = TypeVar("R", Record, GridRecord, "Measured")


class Spread(NamedTuple):
    """Mean of a figure over the runs of a cell, and its standard deviation (0 for a single run).

    Example:
        >>> from cem_fast.experiments.results import Spread
        >>> Spread(0.9, 0.01).mean
        0.9
    """

    mean: float
    deviation: float


@dataclass(frozen=True)
class Measured:
    """One run of results.json with its measurements per image.

    Args:
        record: the run.
        measurements: per victim ``mse.<attack> [N]`` and ``groups [N]``, per test image ``correct [T]`` (share of the noise draws in which
            it was classified correctly) and ``correct.groups [T]``.

    Example:
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> record = Record("faces", RunConfig(), 0.9, 80, {"ridge": outcome}, Leakage(None, None, None), {"total": 1.0})
        >>> Measured(record.at(None), {"mse.ridge": torch.full((80,), 0.01)}).errors.shape
        torch.Size([80])
    """

    record: GridRecord
    measurements: Mapping[str, Tensor]

    @property
    def cell(self) -> Cell:
        """Everything that the runs of one cell share."""
        return self.record.cell

    @property
    def errors(self) -> Tensor:
        """``[N]`` error of the strongest attack on every victim."""
        return self.measurements[f"mse.{self.record.strongest}"].double()


@dataclass(frozen=True)
class Row:
    """One cell of a grid, for tables and figures. Figures are those of the strongest attack of each run.

    Attributes:
        runs: the runs, which differ in seed and fold only.
        role: ``undefended``, ``off`` (without CEM) or ``on`` (with CEM).
        name: ``noise + CEM``, with every setting that tells it from the other rows.
        short_name: the name without the noise level, for tables that have a column for it.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured, make_rows
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> record = Record("faces", RunConfig(), 0.9, 80, {"ridge": outcome}, Leakage(None, None, None), {"total": 1.0})
        >>> (row,) = make_rows([Measured(record.at(None), {})])
        >>> row.name, row.role, row.mse
        ('noise', 'off', Spread(mean=0.01, deviation=0.0))
    """

    runs: tuple[Measured, ...]
    role: Role
    name: str
    short_name: str

    @property
    def record(self) -> GridRecord:
        """The first run, for everything that the runs share."""
        return self.runs[0].record

    @property
    def data(self) -> str:
        """Name of the data set."""
        return self.record.data

    @property
    def config(self) -> RunConfig:
        """The settings; seed and fold are those of the first run."""
        return self.record.config

    @property
    def label(self) -> str:
        """``noise + CEM``."""
        return self.record.label

    @property
    def noise_std(self) -> float:
        """Standard deviation of the Gaussian noise that is added last to the released features."""
        return self.config.noise_std

    @property
    def num_runs(self) -> int:
        """Number of runs."""
        return len(self.runs)

    @property
    def accuracy(self) -> Spread:
        """Accuracy on released features."""
        return _spread(run.record.accuracy for run in self.runs)

    @property
    def mse(self) -> Spread:
        """Mean squared error of the strongest attack."""
        return self._of_strongest("mse")

    @property
    def psnr(self) -> Spread:
        """Peak signal-to-noise ratio of the strongest attack, in dB."""
        return self._of_strongest("psnr")

    @property
    def ssim(self) -> Spread:
        """Structural similarity of the strongest attack's reconstructions."""
        return self._of_strongest("ssim")

    @property
    def recognized(self) -> Spread:
        """Share of the strongest attack's reconstructions that are recognized."""
        return self._of_strongest("recognized")

    def attack(self, name: str, figure: str) -> Spread | None:
        """A figure of one attack; None if a run does not have it.

        Args:
            name: the attack.
            figure: a numeric attribute of :class:`cem_fast.experiments.records.Outcome`.
        """
        outcomes = [run.record.attacks.get(name) for run in self.runs]
        return _spread_of(None if each is None else getattr(each, figure) for each in outcomes)

    def seconds(self, name: str) -> Spread | None:
        """Seconds of one attack, with its repetition at half the budget; None if a run does not have it.

        Args:
            name: the attack.
        """
        return _spread_of(run.record.seconds.get(f"attack_{name}") for run in self.runs)

    def inferred(self, name: str) -> Spread | None:
        """Share of the victims of which an attacker reads something right from the features; None if a run does not have it.

        Args:
            name: what is read, such as ``label``.
        """
        rates = [run.record.inferred.get(name) for run in self.runs]
        return _spread_of(None if rate is None else rate.share for rate in rates)

    def leakage(self, figure: str) -> Spread | None:
        """A figure of the leakage; None without Gaussian noise.

        Args:
            figure: an attribute of :class:`cem_fast.experiments.records.Leakage`.
        """
        return _spread_of(getattr(run.record.leakage, figure) for run in self.runs)

    def _of_strongest(self, figure: str) -> Spread:
        records = [run.record for run in self.runs]
        return _spread(getattr(each.attacks[each.strongest], figure) for each in records if each.strongest)


def read(folder: str | Path) -> Results:
    """Reads the results.json of a grid.

    Args:
        folder: folder of the grid.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: there is no results.json.
        ValueError: it is not JSON, of another schema, or an entry is missing or of another type.

    Example:
        >>> import json
        >>> import tempfile
        >>> from pathlib import Path
        >>> from cem_fast.experiments import results
        >>> from cem_fast.experiments.records import Results
        >>> empty = Results("cem-fast demo", None, {}, {}, (), (), ())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "results.json").write_text(json.dumps(empty.to_json()))
        ...     results.read(folder).command
        'cem-fast demo'
    """
    path = Path(folder) / RESULTS
    try:
        return read_file(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no results here; run cem-fast evaluate or cem-fast demo first") from None


def read_file(path: str | Path) -> Results:
    """Reads a results.json, whose runs need not be there.

    Args:
        path: the file.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, of another schema, or an entry is missing or of another type.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from cem_fast.experiments import results
        >>> from cem_fast.experiments.records import Results
        >>> empty = Results("cem-fast demo", None, {}, {}, (), (), ())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "results.json"
        ...     _ = path.write_text(json.dumps(empty.to_json()))
        ...     results.read_file(path) == empty
        True
    """
    return typed_json.read(Results, typed_json.load_document(path, f"results of schema {SCHEMA}", SCHEMA), path)


def read_settings(folder: str | Path) -> list[dict[str, Any]]:
    """Reads only the settings of the runs of a results.json, also those of a newer version.

    Args:
        folder: folder of the grid.

    Returns:
        The settings of every run as they are in the file.

    Raises:
        FileNotFoundError: there is no results.json.
        ValueError: it is not JSON, or an entry is missing or of another type.

    Example:
        >>> import json, tempfile
        >>> from pathlib import Path
        >>> from cem_fast.experiments import results
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "results.json").write_text(json.dumps({"runs": [{"config": {"epochs": 3}}]}))
        ...     results.read_settings(folder)
        [{'epochs': 3}]
    """
    path = Path(folder) / RESULTS
    document = typed_json.read(dict[str, Any], typed_json.load(path), path)
    runs = typed_json.read(tuple[dict[str, Any], ...], document.get("runs"), path, "runs")
    return [
        typed_json.read(dict[str, Any], run.get("config"), path, "runs", str(i), "config") for i, run in enumerate(runs)
    ]


def load_runs(folder: str | Path, results: Results) -> list[Measured]:
    """Loads the runs of a results.json with their measurements per image.

    Args:
        folder: folder of results.json.
        results: its content.

    Returns:
        The runs, in the order of results.json.

    Raises:
        FileNotFoundError: the files of a run are missing or were not kept.
        ValueError: a file is damaged.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments.records import Baseline, Results
        >>> from cem_fast.experiments.results import load_runs
        >>> from cem_fast.experiments.run import run
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0, epochs=1, attacks=("nearest",))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = run(config, f"{folder}/run", splits=splits).at("run")
        ...     results = Results("", None, {}, {"tiny": Baseline(0.1, 0.1)}, (record,), (), ())
        ...     (measured,) = load_runs(folder, results)
        >>> measured.errors.shape
        torch.Size([8])
    """
    if lost := sum(run.checkpoint is None for run in results.runs):
        raise FileNotFoundError(
            f"{Path(folder) / RESULTS}: the files of {lost} of its {len(results.runs)} runs were not kept; to have them again: "
            f"{shell_line(results.command)}"
        )
    return [measured(folder, run) for run in results.runs]


def measured(folder: str | Path, record: GridRecord) -> Measured:
    """Loads the measurements of one run.

    Args:
        folder: folder of results.json.
        record: the run.

    Returns:
        The run with its measurements.

    Raises:
        FileNotFoundError: the folder of the run is missing.
        ValueError: a file is damaged, or lacks the measurements of an attack.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments.results import measured
        >>> from cem_fast.experiments.run import run
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0, epochs=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = run(config, f"{folder}/run", splits=splits, attack=False)
        ...     found = measured(folder, record.at("run"))
        >>> found.measurements["correct"].shape
        torch.Size([8])
    """
    path = Path(folder) / str(record.checkpoint)
    tensors = read_measurements(path)
    needed = ["correct", "correct.groups", "groups"]
    if record.attacks:
        needed += ["pictures.original", "pictures.class_mean"]
        needed += [f"{kind}.{attack}" for attack in record.attacks for kind in ("mse", "pictures")]
    if missing := [key for key in needed if key not in tensors]:
        raise ValueError(f"{path / DESCRIPTION}: the measurements lack {', '.join(missing)}")
    for key in needed:
        _require_measurement(path / DESCRIPTION, key, tensors)
    return Measured(record, tensors)


def _require_measurement(file: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Requires finite numbers of the right kind and shape in a tensor of measurements."""
    value, pictures, groups = tensors[name], name.startswith("pictures."), name.endswith("groups")
    like = "pictures.original" if pictures else "correct.groups" if name.startswith("correct") else "groups"
    shape = tensors[like].shape
    sound = value.dtype == torch.int64 if groups else value.is_floating_point() and bool(value.isfinite().all())
    sound = sound and value.shape == shape and value.numel() > 0
    if not (sound and (len(shape) == 4 and shape[1] in (1, 3) if pictures else len(shape) == 1)):
        raise ValueError(
            f"{file}: {name} of the measurements must be {'integers' if groups else 'finite numbers'} of the shape of {like}, "
            f"{list(shape)}, got {value.dtype} {list(value.shape)}"
        )


def cells(runs: Iterable[R]) -> list[list[R]]:
    """Groups runs that differ in seed and fold only, in the order in which they come.

    Args:
        runs: records, or runs with their measurements.

    Returns:
        The runs of every cell.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Record
        >>> from cem_fast.experiments.results import cells
        >>> configs = [RunConfig(seed=0), RunConfig(seed=1), RunConfig(cem_weight=0.5)]
        >>> runs = [Record("faces", each, 0.9, 80, {}, Leakage(None, None, None), {"total": 1.0}) for each in configs]
        >>> [len(cell) for cell in cells(runs)]
        [2, 1]
    """
    grouped: dict[Cell, list[R]] = {}
    for run in runs:
        grouped.setdefault(run.cell, []).append(run)
    return list(grouped.values())


def make_rows(runs: Sequence[Measured]) -> list[Row]:
    """Makes one row per cell of attacked runs.

    Args:
        runs: runs of one or several data sets.

    Returns:
        The rows: by data set and defense as they come, then by noise level and weight of CEM.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured, make_rows
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> rest = 0.9, 80, {"ridge": outcome}, Leakage(None, None, None), {"total": 1.0}
        >>> configs = [RunConfig(noise_std=0.2), RunConfig(noise_std=0.1), RunConfig(cem_weight=0.5)]
        >>> [row.name for row in make_rows([Measured(Record("faces", each, *rest).at(None), {}) for each in configs])]
        ['noise, σ = 0.1', 'noise + CEM', 'noise, σ = 0.2']
    """
    found = cells(run for run in runs if run.record.strongest)
    first = [cell[0].record for cell in found]
    rows = [
        Row(tuple(cell), _role(record), name(record, first), name(record, first, shown=["noise_std"]))
        for cell, record in zip(found, first)
    ]
    data = list(dict.fromkeys(run.record.data for run in runs))
    defenses = list(dict.fromkeys(run.record.config.defense for run in runs))

    def place(row: Row) -> tuple[float, ...]:
        config = row.config
        return data.index(row.data), defenses.index(config.defense), config.noise_std, config.cem_weight

    return sorted(rows, key=place)


def _role(record: Record) -> Role:
    if record.cem:
        return "on"
    config = record.config
    return "undefended" if config.defense in ("none", "bottleneck") and config.noise_std == 0 else "off"


def _spread(values: Iterable[float]) -> Spread:
    found = np.array(list(values), dtype=float)
    return Spread(float(found.mean()), float(found.std(ddof=1)) if len(found) > 1 else 0.0)


def _spread_of(values: Iterable[float | None]) -> Spread | None:
    """None if a value is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return _spread(known) if len(known) == len(found) else None
