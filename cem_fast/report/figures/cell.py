"""What the tables of all figures say of a cell of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cem_fast.experiments.results import Row, cell_name
from cem_fast.report.charts import role

COLUMNS = ("data", "cell", "role", "runs", "noise_std", "lambda")
ROLES = {"undefended": "undefended", "off": "without CEM", "on": "with CEM"}


def entry(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """The columns that say which cell it is; ``role`` is ``undefended``, ``off`` or ``on``, for without CEM and with it."""
    config = row.runs[0].record["config"]
    return {
        "data": row.data,
        "cell": cell_name(row, rows),
        "role": role(row),
        "runs": row.num_runs,
        "noise_std": config["noise_std"],
        "lambda": config["lambda"],
    }
