"""The paper's figures from the results of a grid: a picture, and its table as CSV."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from cem_fast._support.files import check_target, write_atomically
from cem_fast._support.lookup import lookup
from cem_fast.experiments.results import load_runs, make_rows, read
from cem_fast.report.charts import COLORS, canvas
from cem_fast.report.figures import cost, leakage, sweeps, utility

_FIGURES = {"leakage": leakage, "sweeps": sweeps, "utility": utility, "cost": cost}


def names() -> tuple[str, ...]:
    """Names of the figures.

    Example:
        >>> from cem_fast.report import figures
        >>> figures.names()
        ('leakage', 'sweeps', 'utility', 'cost')
    """
    return tuple(_FIGURES)


def check(name: str, target: str | Path) -> None:
    """Fails early if a figure could not be written later. Creates nothing.

    Args:
        name: one of :func:`names`.
        target: folder for the figure; it need not exist.

    Raises:
        ValueError: the name is unknown, the folder cannot be written to, or holds another program's file of that name.

    Example:
        >>> import tempfile
        >>> from cem_fast.report import figures
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     figures.check("leakage", folder)
    """
    figure = lookup("figure", name, _FIGURES)
    first_columns = ",".join(figure.COLUMNS[:5])  # those of every version
    check_target(target, {f"{name}.csv": first_columns.encode(), f"{name}.png": b"cem_fast"})


def write(name: str, folder: str | Path, target: str | Path) -> tuple[Path, Path]:
    """Draws a figure of a finished grid.

    Args:
        name: one of :func:`names`.
        folder: holds ``results.json`` and the runs that it names.
        target: folder for ``<name>.csv`` and ``<name>.png``; created if needed.

    Returns:
        The table and the picture.

    Raises:
        FileNotFoundError: there is no results.json, or a run that it names is missing.
        ValueError: see :func:`check`; also if a file is damaged, or the grid has nothing that the figure shows.

    Example:
        >>> import json
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments.records import Baseline, Results
        >>> from cem_fast.experiments.run import run
        >>> from cem_fast.report import figures
        >>> images = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> train, test = (Part(half, torch.arange(8) % 2, torch.arange(8)) for half in images.split(8))
        >>> splits = Splits("tiny", train, test, train, 2, ("a", "b"))
        >>> config = RunConfig(cem_components=1, epochs=1, attacks=("nearest",))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = run(config, f"{folder}/run", splits=splits).at("run")
        ...     results = Results("", None, {}, {"tiny": Baseline(0.1, 0.1)}, (record,), (), ())
        ...     _ = (Path(folder) / "results.json").write_text(json.dumps(results.to_json()))
        ...     table, picture = figures.write("leakage", folder, folder)
        ...     table.read_text().splitlines()[0]
        'data,cell,role,runs,noise_std,lambda,heldout_nats,heldout_se,plugin_nats,dimension,mse,mse_deviation'
    """
    check(name, target)
    figure, folder, target = _FIGURES[name], Path(folder), Path(target)
    table = figure.table(make_rows(load_runs(folder, read(folder))), folder)
    if not table:
        raise ValueError(f"{folder} has nothing for the figure {name}: {figure.NEEDS}")
    width, height = figure.size(table)
    with canvas(width, height, COLORS["light"]) as picture:
        figure.draw(picture, table, COLORS["light"])
        stream = io.BytesIO()
        picture.savefig(stream, format="png", dpi=150, metadata={"Software": "cem_fast"})
    target.mkdir(parents=True, exist_ok=True)
    paths = target / f"{name}.csv", target / f"{name}.png"
    for path, content in zip(paths, (_csv(figure.COLUMNS, table), stream.getvalue())):
        write_atomically(path, content)
    return paths


def _csv(columns: tuple[str, ...], table: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for line in table:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in line.items()})
    return text.getvalue().encode()
