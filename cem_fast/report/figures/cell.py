"""What the tables of all figures say of a cell of a grid."""

from __future__ import annotations

from typing import Any

from cem_fast.experiments.results import Row

COLUMNS = ("data", "cell", "role", "runs", "noise_std", "lambda")
ROLES = {"undefended": "undefended", "off": "without CEM", "on": "with CEM"}


def entry(row: Row) -> dict[str, Any]:
    """The columns that say which cell it is; ``role`` is ``undefended``, ``off`` or ``on``, for without CEM and with it."""
    return {
        "data": row.data,
        "cell": row.name,
        "role": row.role,
        "runs": row.num_runs,
        "noise_std": row.noise_std,
        "lambda": row.config.cem_weight,
    }
