"""Columns that identify a cell, in the tables of several figures."""

from __future__ import annotations

from typing import Any

from cem_fast.experiments.results import Row

COLUMNS = ("data", "cell", "role", "runs", "noise_std", "lambda")
ROLES = {"undefended": "undefended", "off": "without CEM", "on": "with CEM"}


def entry(row: Row) -> dict[str, Any]:
    """Columns that identify a cell. ``role`` is ``undefended``, ``off`` (without CEM) or ``on``.

    Args:
        row: the cell.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Outcome, Record
        >>> from cem_fast.experiments.results import Measured, make_rows
        >>> outcome = Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form")
        >>> rest = 0.9, 80, {"ridge": outcome}, Leakage(40.0, 42.0, 0.5), {"total": 1.0}
        >>> from cem_fast.report.figures import cell
        >>> (row,) = make_rows([Measured(Record("faces", RunConfig(), *rest).at(None), {})])
        >>> cell.entry(row)
        {'data': 'faces', 'cell': 'noise', 'role': 'off', 'runs': 1, 'noise_std': 0.1, 'lambda': 0.0}
    """
    return {
        "data": row.data,
        "cell": row.name,
        "role": row.role,
        "runs": row.num_runs,
        "noise_std": row.noise_std,
        "lambda": row.config.cem_weight,
    }
