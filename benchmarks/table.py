"""The table of results: one line for each contender of each race, appended to a CSV file and never rewritten."""

from __future__ import annotations

import csv
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FILE = "bench.csv"
# What a row's status can be: only "ok" has times.
OK, WRONG, FAILED, MISSING, SKIPPED, INTERPRETED = "ok", "wrong", "failed", "missing", "skipped", "interpreted"
LAST = "end"  # direction of the ceilings that are measured when all else is done: the mark of a run that ended
# A median that moves by less says nothing even where the quantiles lie apart.
BAND = 0.05


@dataclass(frozen=True)
class Run:
    """What all rows of one run share.

    Args:
        run: when it began, ISO 8601, which also names it.
        mode: ``full``, ``quick``, or ``part`` where groups were chosen.
        command: what was typed.
        commit: of the code, ``-dirty`` after it if files changed since; empty outside a repository.
        cem_fast, torch, triton, numpy, python: versions.
        backend: what serves tensors on the device.
        device: ``cpu`` or ``cuda``.
        processor: name of the processor or GPU.
        threads: how many, and where they are pinned.
        malloc: the allocator's tuning.
    """

    run: str
    mode: str
    command: str
    commit: str
    cem_fast: str
    torch: str
    triton: str
    numpy: str
    python: str
    backend: str
    device: str
    processor: str
    threads: str
    malloc: str


@dataclass(frozen=True)
class Row:
    """One contender in one race; times in milliseconds, empty unless the status is ``ok``.

    Args:
        group: which part of the suite: ``ceilings``, ``operations``, ``scaling``, ``fitting``, ``training`` or ``startup``.
        op: the operation.
        contender, version: who, and the version of the distribution.
        N, D, C, K, covariance, dtype: the case.
        axis: N, D, C or K where the row belongs to a scaling curve.
        direction: ``forward``, ``backward``, ``both``, ``fit``, ...
        status, note: whether it was timed, and if not, why.
        error, allowed: relative to the float64 truth.
        first_ms: the first call, with all compilation.
        p20_ms, p50_ms, p80_ms, rounds: of the calls after it.
        peak_mib: memory that a call adds.
        share, bound: of the time that memory or arithmetic alone would take.
    """

    group: str
    op: str
    contender: str
    version: str = ""
    N: int | None = None
    D: int | None = None
    C: int | None = None
    K: int | None = None
    covariance: str = ""
    dtype: str = ""
    axis: str = ""
    direction: str = ""
    status: str = OK
    note: str = ""
    error: float | None = None
    allowed: float | None = None
    first_ms: float | None = None
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    rounds: int | None = None
    peak_mib: float | None = None
    share: float | None = None
    bound: str = ""

    @property
    def case(self) -> tuple[Any, ...]:
        """Which race the row belongs to."""
        shape = (self.N, self.D, self.C, self.K)
        return (self.group, self.op, *shape, self.covariance, self.dtype, self.axis, self.direction)


class Recorded(typing.NamedTuple):
    """A run and its rows, in the order in which they were measured."""

    run: Run
    rows: list[Row]

    @property
    def complete(self) -> bool:
        """Whether every group was asked for and measured to the end."""
        return self.run.mode != "part" and any(row.group == "ceilings" and row.direction == LAST for row in self.rows)


HEADER = [field.name for field in (*fields(Run), *fields(Row))]


def append(folder: Path, run: Run, rows: Iterable[Row]) -> None:
    """Appends rows to the folder's table.

    Raises:
        ValueError: the table there has other columns.
    """
    path = folder / FILE
    new = not path.exists()
    if not new:
        _require_columns(path)
    folder.mkdir(parents=True, exist_ok=True)
    with open(path, "a", newline="") as file:
        writer = csv.DictWriter(file, HEADER, lineterminator="\n")
        if new:
            writer.writeheader()
        for row in rows:
            writer.writerow({key: _text(value) for key, value in (asdict(run) | asdict(row)).items()})


def read(path: Path) -> list[Recorded]:
    """The runs of a table, oldest first.

    Raises:
        FileNotFoundError: there is no such table.
        ValueError: it has other columns, or a value that is none of its column.
    """
    _require_columns(path)
    found: list[Recorded] = []
    with open(path, newline="") as file:
        for line, values in enumerate(csv.DictReader(file), 2):
            try:
                run, row = (_parsed(kind, values) for kind in (Run, Row))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
            if not found or found[-1].run != run:
                found.append(Recorded(run, []))
            found[-1].rows.append(row)
    return found


class Change(typing.NamedTuple):
    """A contender's median beside the one of an earlier run; outside the noise of both."""

    row: Row
    before: Row

    @property
    def factor(self) -> float:
        return self.row.p50_ms / self.before.p50_ms  # type: ignore[operator]


def changes(new: Sequence[Row], old: Sequence[Row]) -> tuple[list[Change], int]:
    """Compares two runs.

    A time has changed where the ranges from the 20th to the 80th percentile lie apart and the medians differ by more than
    ``BAND``; all else is noise.

    Returns:
        The changes, the worst first, and how many rows could be compared.
    """
    before = {(row.contender, *row.case): row for row in old if _is_time(row)}
    found, compared = [], 0
    for row in new:
        earlier = before.get((row.contender, *row.case))
        if earlier is None or not _is_time(row):
            continue
        compared += 1
        change = Change(row, earlier)
        apart = row.p20_ms > earlier.p80_ms or row.p80_ms < earlier.p20_ms  # type: ignore[operator]
        if apart and abs(change.factor - 1) > BAND:
            found.append(change)
    return sorted(found, key=lambda change: -change.factor), compared


def _is_time(row: Row) -> bool:
    """Not a difference of two, which may be about zero."""
    return row.p50_ms is not None and row.p50_ms > 0


def _require_columns(path: Path) -> None:
    with open(path, newline="") as file:
        columns = next(csv.reader(file), [])
    if columns != HEADER:
        other = sorted(set(columns) ^ set(HEADER)) or ["their order"]
        raise ValueError(f"{path} must have the columns of this version's table, got others: {', '.join(other)}")


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _parsed(kind: type, values: dict[str, str]) -> Any:
    hints = typing.get_type_hints(kind)
    found: dict[str, Any] = {}
    for field in fields(kind):
        text, hint = values[field.name], hints[field.name]
        if hint is str:
            found[field.name] = text
        else:
            number = next(option for option in typing.get_args(hint) if option is not type(None))
            found[field.name] = number(text) if text else None
    return kind(**found)
