"""The table of results: one line per contender, case and direction, appended to a CSV file."""

from __future__ import annotations

import csv
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from cem_fast.benchmarks.timing import Quantiles

FILE = "bench.csv"
# Statuses of a row; only "ok" has times.
OK, WRONG, FAILED, MISSING, SKIPPED, INTERPRETED = "ok", "wrong", "failed", "missing", "skipped", "interpreted"
LAST = "end"  # direction of the ceilings measured last; marks a complete run
BAND = 0.05  # smaller relative changes of the median count as noise


@dataclass(frozen=True)
class Run:
    """Facts shared by all rows of a run.

    Args:
        run: start time, ISO 8601; identifies the run.
        mode: ``full``, ``quick``, or ``part`` if groups were selected.
        command: the command line.
        commit: commit of the code, with ``-dirty`` after local changes; empty outside a repository.
        cem_fast: version of this library.
        torch: version of torch.
        triton: version of triton.
        numpy: version of numpy.
        python: version of Python.
        backend: the backend in use on the device.
        device: ``cpu`` or ``cuda``.
        processor: name of the processor or GPU.
        threads: number of threads and their cores.
        malloc: settings of the allocator.
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
    """One contender in one case and direction; times are empty unless the status is ``ok``.

    Args:
        group: part of the suite: ``ceilings``, ``operations``, ``scaling``, ``fitting``, ``training`` or ``startup``.
        op: the operation.
        contender: name of the contender.
        version: version of its distribution.
        N: number of rows.
        D: number of features.
        C: number of classes.
        K: components per class.
        covariance: ``spherical``, ``diag``, ``tied`` or ``full``.
        dtype: dtype of the features.
        axis: N, D, C or K if the row belongs to a scaling curve.
        direction: ``forward``, ``backward``, ``both``, ``fit``, ...
        status: ``ok``, or why there are no times.
        note: details of the status.
        error: relative error against float64.
        allowed: largest relative error of a correct result.
        first_ms: the first call, compilation included, in milliseconds.
        p20_ms: 20th percentile of later calls.
        p50_ms: median of later calls.
        p80_ms: 80th percentile of later calls.
        rounds: number of later calls.
        peak_mib: peak memory that a call adds.
        share: share of the roofline.
        bound: the limiting resource, ``memory`` or ``arithmetic``.
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
        """Key of the comparison: all but the contender and its results."""
        shape = (self.N, self.D, self.C, self.K)
        return (self.group, self.op, *shape, self.covariance, self.dtype, self.axis, self.direction)

    @property
    def times(self) -> Quantiles:
        """Times of a timed row.

        Raises:
            ValueError: the row was not timed.
        """
        if self.p20_ms is None or self.p50_ms is None or self.p80_ms is None:
            raise ValueError(f"{self.contender} has no times: {self.status}")
        return Quantiles(self.p20_ms, self.p50_ms, self.p80_ms, self.rounds or 0)

    def with_times(self, times: Quantiles) -> Row:
        """The same row with times."""
        return replace(self, p20_ms=times.p20, p50_ms=times.p50, p80_ms=times.p80, rounds=times.rounds)


class Recorded(typing.NamedTuple):
    """A run and its rows in the order of measurement."""

    run: Run
    rows: list[Row]

    @property
    def complete(self) -> bool:
        """Whether the run covers all groups and was not interrupted."""
        return self.run.mode != "part" and any(row.group == "ceilings" and row.direction == LAST for row in self.rows)


HEADER = [field.name for field in (*fields(Run), *fields(Row))]


def append(folder: Path, run: Run, rows: Iterable[Row]) -> None:
    """Appends rows to the table of a folder.

    Raises:
        ValueError: the existing table has other columns.

    Example:
        >>> import dataclasses, tempfile
        >>> from pathlib import Path
        >>> from cem_fast.benchmarks import table
        >>> run = table.Run(**dict.fromkeys((field.name for field in dataclasses.fields(table.Run)), ""))
        >>> row = table.Row("operations", "cem_paper", "cem_fast", p50_ms=1.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table.append(Path(folder), run, [row])
        ...     (recorded,) = table.read(Path(folder, table.FILE))
        >>> recorded.rows == [row]
        True
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
    """Runs of a table, oldest first.

    Raises:
        FileNotFoundError: the table does not exist.
        ValueError: the table has other columns or an invalid value.
    """
    _require_columns(path)
    found: list[Recorded] = []
    with _opened(path) as file:
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
    """A row whose time differs from the same row of an earlier run by more than the noise."""

    row: Row
    before: Row

    @property
    def factor(self) -> float:
        """Ratio of the medians, new to old."""
        return self.row.times.p50 / self.before.times.p50


def changes(new: Sequence[Row], old: Sequence[Row]) -> tuple[list[Change], int]:
    """Compares two runs.

    A time has changed if the ranges from the 20th to the 80th percentile are disjoint and the medians differ by more than
    ``BAND``. Everything else is noise.

    Returns:
        The changes, largest slowdown first, and the number of rows compared.

    Example:
        >>> from dataclasses import replace
        >>> from cem_fast.benchmarks import table
        >>> old = table.Row("operations", "cem_paper", "cem_fast", p20_ms=0.9, p50_ms=1.0, p80_ms=1.1, rounds=5)
        >>> new = replace(old, p20_ms=1.9, p50_ms=2.0, p80_ms=2.1)
        >>> (change,), compared = table.changes([new], [old])
        >>> change.factor, compared
        (2.0, 1)
    """
    before = {(row.contender, *row.case): row for row in old if _is_time(row)}
    found, compared = [], 0
    for row in new:
        earlier = before.get((row.contender, *row.case))
        if earlier is None or not _is_time(row):
            continue
        compared += 1
        change = Change(row, earlier)
        apart = row.times.p20 > earlier.times.p80 or row.times.p80 < earlier.times.p20
        if apart and abs(change.factor - 1) > BAND:
            found.append(change)
    return sorted(found, key=lambda change: -change.factor), compared


def _is_time(row: Row) -> bool:
    """Whether the row has a positive time; differences of two times may be negative."""
    return row.p50_ms is not None and row.p50_ms > 0


@contextmanager
def _opened(path: Path) -> Iterator[typing.TextIO]:
    """Opens a table; what is no text or no table is a ValueError that names the file."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            yield file
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no table of benchmarks: {error}") from None


def _require_columns(path: Path) -> None:
    with _opened(path) as file:
        columns = next(csv.reader(file), [])
    if columns != HEADER:
        other = sorted(set(columns) ^ set(HEADER)) or ["their order"]
        raise ValueError(f"{path} must have the columns of this version's table, got differences in {', '.join(other)}")


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
