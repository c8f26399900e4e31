"""The suite: all cases, then training and startup, between two measurements of the machine's ceilings."""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from cem_fast.benchmarks import cases, machine, peers, report, roofline, startup, streams, table, training
from cem_fast.benchmarks.cases import Case, Problem
from cem_fast.benchmarks.peers import OURS, Built, Peer, Skipped
from cem_fast.benchmarks.table import FAILED, INTERPRETED, MISSING, OK, SKIPPED, WRONG, Row, Run
from cem_fast.benchmarks.timing import Contender, clock_of, race

import cem_fast
from cem_fast._support.lookup import lookup
from cem_fast.experiments import provenance
from cem_fast.ops import backend

if TYPE_CHECKING:
    from rich.console import Console

GROUPS = (*cases.GROUPS, "training", "startup")
BUDGET_S = {True: 0.1, False: 0.4}  # per contender and direction; quick or not
MOST_ROUNDS = {True: 15, False: 51}  # of the fastest contender
SLOW_S = 1.0  # contenders slower than this per call are timed in the last direction only
YARDSTICK = "copy of the features"
SYMBOL = {OK: "", WRONG: "WRONG: ", FAILED: "failed: ", MISSING: "missing: ", SKIPPED: "left out: ", INTERPRETED: ""}


@dataclass
class Entry:
    """A contender of one case, with the peak memory of each direction; no directions if it is not to be timed."""

    row: Row
    peer: Peer | None = None
    built: Built | None = None
    peaks: dict[str, float | None] = field(default_factory=dict)


@machine.older_objects_aside()
def measure(
    case: Case,
    device: torch.device,
    *,
    budget_s: float,
    most_rounds: int = MOST_ROUNDS[False],
    gflop_s: float | None = None,
) -> list[Row]:
    """Compares all peers that support a case. Wrong results are never timed.

    Args:
        case: the case.
        device: where to compute.
        budget_s: timed seconds per contender and direction.
        most_rounds: rounds of the fastest contender.
        gflop_s: measured rate of arithmetic, for the share of the roofline.

    Returns:
        One row per contender and direction, one row for a copy of the features, and one row per peer that was not timed.
    """
    problem = Problem(case, device)
    # caches off: the first call must include compilation
    with torch.compiler.config.patch(force_disable_caches=True):  # type: ignore[attr-defined]
        entries = [_entry(peer, problem) for peer in peers.of(case, device)]
    machine.limit_pools(torch.get_num_threads())
    timed = {(e.row.contender, direction): e for e in entries for direction in e.peaks}
    contenders = [_contender(entry, direction) for (_, direction), entry in timed.items()]
    copied = _copies(problem)
    quantiles = race([*contenders, copied], clock_of(device), budget_s=budget_s, most=most_rounds)
    copy = quantiles[copied.key]
    features = problem.sets[0][0]
    moved = 2 * features.numel() * features.element_size()
    gb_s = moved / copy.p50 / 1e6
    rows = [entry.row for entry in entries if entry.row.status != OK]
    for (name, direction), entry in timed.items():
        took = quantiles[name, direction]
        share, bound = roofline.share(*case.work(direction), took.p50, gb_s, gflop_s)
        row = replace(entry.row, direction=direction, peak_mib=entry.peaks[direction], share=share, bound=bound)
        rows.append(row.with_times(took))
    return [*rows, replace(_row(case, YARDSTICK), direction="copy").with_times(copy)]


def _entry(peer: Peer, problem: Problem) -> Entry:
    """Builds a contender and checks its results against float64."""
    row = _row(problem.case, peer.name, _version(peer.package))
    try:
        start = time.perf_counter()
        built = peer.build(problem)
        _call(built, built.directions[-1], problem.device)
        row = replace(row, first_ms=1e3 * (time.perf_counter() - start))
        error = problem.error(built.results())
        row = replace(row, error=error)
        if not error <= problem.case.allowed:
            return Entry(replace(row, status=WRONG, note=f"off by {error:.1e}, allowed {row.allowed:.0e}"))
        if backend.TRITON == "CPU" and peer.name.startswith(OURS):
            note = "run by Triton's interpreter, not timed"
            return Entry(replace(row, status=INTERPRETED, first_ms=None, note=note))
        start = time.perf_counter()
        _call(built, built.directions[-1], problem.device)
        slow = time.perf_counter() - start > SLOW_S
        directions = built.directions[-1:] if slow else built.directions
        # runs each direction once, so that failures occur here and not during timing
        return Entry(row, peer, built, {direction: _peak(built, direction, problem.device) for direction in directions})
    except Skipped as reason:
        return Entry(replace(row, status=SKIPPED, note=str(reason)))
    except ImportError as reason:
        return Entry(replace(row, status=MISSING, note=_line(reason)))
    except Exception as reason:  # peers and their compilers raise many kinds
        return Entry(replace(row, status=FAILED, note=f"{type(reason).__name__}: {_line(reason)}"))


def _call(built: Built, direction: str, device: torch.device) -> None:
    built.prepare(direction)(0)
    built.call(direction)(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _contender(entry: Entry, direction: str) -> Contender:
    assert entry.built is not None
    assert entry.peer is not None
    return Contender(
        (entry.row.contender, direction),
        entry.built.call(direction),
        entry.built.prepare(direction),
        entry.peer.settles,
    )


def _peak(built: Built, direction: str, device: torch.device) -> float | None:
    built.prepare(direction)(0)
    return machine.peak_of(lambda: built.call(direction)(0), device)


def _copies(problem: Problem) -> Contender:
    target = torch.empty_like(problem.sets[0][0])
    return Contender((YARDSTICK, "copy"), lambda buffers: target.copy_(problem.sets[buffers % len(problem.sets)][0]))


def _row(case: Case, contender: str, of_version: str = "") -> Row:
    shape = {name: getattr(case, name) for name in ("N", "D", "C", "K", "covariance", "dtype", "axis")}
    return Row(case.group, case.op, contender, of_version, **shape, allowed=case.allowed)


def _version(package: str | None) -> str:
    if package is None:
        return torch.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:200]


def _ceilings(device: torch.device, when: str, *, budget_s: float) -> tuple[list[Row], float | None]:
    found = roofline.ceilings(device, budget_s=budget_s)
    rows = []
    for ceiling in found:
        row = Row("ceilings", ceiling.name, "machine", direction=when)
        if ceiling.times is None:
            rows.append(replace(row, status=MISSING, note=ceiling.reason))
        else:
            rows.append(replace(row, note=f"{ceiling.rate:.4g} {ceiling.unit}").with_times(ceiling.times))
    return rows, found[-1].rate


def _or_failure(group: str, measured: Callable[[], list[Row]]) -> list[Row]:
    """Rows of a group without peers; a failure becomes a row, so other groups are kept."""
    try:
        return measured()
    except Exception as reason:
        return [Row(group, group, OURS, status=FAILED, note=f"{type(reason).__name__}: {_line(reason)}")]


def rows_of(groups: Sequence[str], device: torch.device, *, quick: bool) -> Iterator[list[Row]]:
    """Measures the groups and yields the rows of each case when it ends."""
    budget_s = BUDGET_S[quick]
    start, gflop_s = _ceilings(device, "start", budget_s=budget_s)
    yield start
    for name, of_group in cases.GROUPS.items():
        if name in groups:
            for case in of_group(quick):
                yield measure(case, device, budget_s=budget_s, most_rounds=MOST_ROUNDS[quick], gflop_s=gflop_s)
    if "fitting" in groups:
        yield _or_failure("fitting", partial(streams.measure, device, quick=quick))
    if "training" in groups:
        yield _or_failure("training", partial(training.measure, device, quick=quick))
    if "startup" in groups:
        yield _or_failure("startup", partial(startup.measure, str(device), quick=quick))
    yield _ceilings(device, table.LAST, budget_s=budget_s)[0]


def run(
    console: Console,
    *,
    device: torch.device,
    groups: Sequence[str],
    quick: bool,
    threads: int,
    command: str,
    folder: Path,
) -> table.Recorded:
    """Measures the groups and appends the rows of each case to the table when it ends.

    Args:
        console: shows results.
        device: where to compute.
        groups: a subset of ``GROUPS``; all of them if empty.
        quick: few shapes and few rounds.
        threads: CPU threads; 0 for torch's default.
        command: the command line, recorded in the table.
        folder: folder of the table.

    Returns:
        The recorded run.

    Raises:
        ValueError: an unknown group, too many threads, or a table with other columns.
    """
    for name in groups:
        lookup("group", name, dict.fromkeys(GROUPS))
    mode = "part" if groups else "quick" if quick else "full"
    with machine.pinned(threads or torch.get_num_threads()) as pinned, _undisturbed():
        this = _this_run(mode, command, device, pinned)
        table.append(folder, this, [])
        _say(console, f"{this.processor}, threads: {this.threads}, malloc {this.malloc}, {this.backend}")
        rows: list[Row] = []
        for found in rows_of(groups or GROUPS, device, quick=quick):
            table.append(folder, this, found)
            rows += found
            for line, wrong in _lines(found):
                console.print(line, style="red" if wrong else None, markup=False, highlight=False, soft_wrap=True)
        _say(console, f"thread pools at the end: {machine.pools()}")
    return table.Recorded(this, rows)


def _this_run(mode: str, command: str, device: torch.device, pinned: str) -> Run:
    versions = {name: value or "" for name, value in provenance.versions().items()}
    on_cuda = device.type == "cuda"
    return Run(
        run=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        mode=mode,
        command=command,
        commit=provenance.commit() or "",
        **{name: versions[name] for name in ("cem_fast", "torch", "triton", "numpy", "python")},
        backend=cem_fast.backends()[f"on {'CUDA' if on_cuda else 'CPU'} tensors"],
        device=device.type,
        processor=torch.cuda.get_device_name(device) if on_cuda else machine.processor(),
        threads=pinned,
        malloc=os.environ.get(machine.MALLOC, "as the system has it"),
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Full float32 in matrix products, and no warnings except about unused kernels; deprecations of peers are noise."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", message=".*is not used there")
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, bool]]:
    """Lines of a case and whether each is red: one per direction, then one per peer that was not timed."""
    if rows[0].group == "ceilings":
        yield f"ceilings at the {rows[0].direction}: {', '.join(f'{row.op} {row.note}' for row in rows)}", False
        return
    for direction in dict.fromkeys(row.direction for row in rows if row.p50_ms is not None):
        of_direction = [row for row in rows if row.direction == direction and row.p50_ms is not None]
        if direction != "copy":
            times = ", ".join(f"{row.contender} {report.ms(row.p50_ms)}" for row in of_direction)
            yield f"{report.title(of_direction[0])} {direction}: {times}", False
    for row in rows:
        if row.direction == "memory":
            yield f"{report.title(row)}: {row.peak_mib or math.nan:.1f} MiB more, {row.note}", False
    for row in rows:
        if row.status != OK:
            yield f"{report.title(row)}: {row.contender} {SYMBOL[row.status]}{row.note}", row.status == WRONG


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def main(
    console: Console,
    *,
    device: torch.device,
    folder: Path,
    measuring: Callable[..., table.Recorded] | None,
    readme: Path | None,
    compare: Path | None,
) -> int:
    """Measures (or reads the last run of the table), writes the report and compares with an earlier table.

    Args:
        console: shows results.
        device: where to compute.
        folder: folder of the table.
        measuring: ``run`` with its other arguments; None reads the last run.
        readme: a Markdown file whose marked section receives the results.
        compare: an earlier table.

    Returns:
        The exit status: 1 if results of cem_fast are wrong, failed, or slower than in the earlier table.

    Raises:
        FileNotFoundError: a table does not exist.
        ValueError: a table or the Markdown file cannot be used.
    """
    earlier = None if compare is None else _latest(table.read(compare), device, compare)
    if measuring is None:
        recorded = _latest(table.read(folder / table.FILE), device, folder / table.FILE)
    else:
        recorded = measuring(console, device=device, folder=folder)
    for path in report.write(folder, readme):
        _say(console, f"wrote {path}")
    bad = [row for row in recorded.rows if row.contender.startswith(OURS) and row.status in (WRONG, FAILED)]
    for row in bad:
        console.print(f"{report.title(row)}: {row.contender} {row.status}, {row.note}", style="red", soft_wrap=True)
    slower = False if earlier is None else _show_changes(console, recorded, earlier)
    return int(bool(bad) or slower)


def _latest(runs: Sequence[table.Recorded], device: torch.device, path: Path) -> table.Recorded:
    found = [recorded for recorded in runs if recorded.run.device == device.type]
    if not found:
        raise ValueError(f"{path} must have a run on {device.type}, got none")
    return found[-1]


def _show_changes(console: Console, new: table.Recorded, old: table.Recorded) -> bool:
    """Prints the changes; returns whether any time of cem_fast became slower."""
    for name in ("processor", "threads", "malloc", "torch", "mode"):
        a, b = getattr(old.run, name), getattr(new.run, name)
        if a != b:
            _say(console, f"runs differ: {name} was {a!r} and is {b!r}")
    found, compared = table.changes(new.rows, old.rows)
    for change in found:
        (row, before), factor = change, change.factor
        kind = "slower" if factor > 1 else "faster"
        ours = row.contender.startswith(OURS)
        console.print(
            f"{kind} {factor:.2f}x  {report.title(row)} {row.direction}, {row.contender}: {report.span(before)} to {report.span(row)}",
            style="red" if ours and factor > 1 else None,
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    slower = [change for change in found if change.factor > 1]
    of_ours = [change for change in slower if change.row.contender.startswith(OURS)]
    _say(
        console,
        f"of {compared} times compared with {old.run.run}, {len(slower)} are slower ({len(of_ours)} of cem_fast), "
        f"{len(found) - len(slower)} faster, the others within the noise",
    )
    return bool(of_ours)
