"""Reports of the recorded runs in Markdown and PNG, generated from the CSV file only."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cem_fast.benchmarks import table, training
from cem_fast.benchmarks.peers import OURS
from cem_fast.benchmarks.table import OK, WRONG, Recorded, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "bench.md"
PLOTS = ("operations.png", "scaling.png", "fitting.png", "roofline.png")
BEGIN, END = "<!-- bench: begin (written by cem-fast bench) -->", "<!-- bench: end -->"
OPERATION = {
    "cem_paper": "CEMLoss, Eq. 5-7",
    "cem_official": "CEMLoss, released variant",
    "mixture_log_prob": "mixture_log_prob",
    "component_statistics": "component_statistics",
    "kmeans": "k-means, 5 iterations",
    "seeding": "greedy k-means++, 1 iteration",
    "em": "EM, 5 iterations",
}


def ms(value: float | None) -> str:
    """Milliseconds with three significant digits.

    Example:
        >>> from cem_fast.benchmarks.report import ms
        >>> ms(0.3124), ms(1240.3)
        ('0.312 ms', '1,240 ms')
    """
    if value is None:
        return ""
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{digits}f} ms"


def span(row: Row) -> str:
    """Median with the 20th and 80th percentile."""
    return f"{ms(row.p50_ms)} ({ms(row.p20_ms)} to {ms(row.p80_ms)})"


def title(row: Row) -> str:
    """Operation and shape of a row: ``cem_paper N=128 D=512 C=10 K=5 diag``."""
    shape = " ".join(f"{name}={getattr(row, name)}" for name in "NDCK" if getattr(row, name) is not None)
    kind = [row.covariance] if row.covariance == "diag" else []
    kind += [row.dtype] if row.dtype not in ("", "float32") else []
    return " ".join([row.op, *([shape] if shape else []), *kind])


def write(folder: Path, readme: Path | None) -> list[Path]:
    """Writes page and plots of the last complete runs next to the table, and the section of a Markdown file.

    Args:
        folder: folder of the table.
        readme: a Markdown file with the two markers, if any.

    Returns:
        The files written. Without a complete run, page and plots show the last run, and the section has no results.

    Raises:
        ValueError: the Markdown file lacks the markers.
    """
    runs = table.read(folder / table.FILE)
    page = folder / PAGE
    page.write_text("\n".join(_page(runs)) + "\n")
    written = [page, *_plots(runs, folder)]
    if readme is not None:
        text = readme.read_text()
        where = Path(os.path.relpath(folder, readme.parent)).as_posix()
        readme.write_text(replaced(text, section(runs, where), readme))
        written.append(readme)
    return written


def replaced(text: str, new: str, path: Path) -> str:
    """The text with a new section between the markers.

    Args:
        text: text with one pair of markers.
        new: the new section.
        path: file named in the error message.

    Raises:
        ValueError: the text lacks the markers.

    Example:
        >>> from pathlib import Path
        >>> from cem_fast.benchmarks.report import BEGIN, END, replaced
        >>> print(replaced(f"before {BEGIN} old {END} after", "new", Path("README.md")))
        before <!-- bench: begin (written by cem-fast bench) -->
        new
        <!-- bench: end --> after
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"{path} must have one section between {BEGIN!r} and {END!r}")
    return pattern.sub(lambda _: f"{BEGIN}\n{new}\n{END}", text)


def shown(runs: Sequence[Recorded], device: str) -> Recorded | None:
    """The last complete run of a device, which reports show."""
    found = [recorded for recorded in runs if recorded.complete and recorded.run.device == device]
    return found[-1] if found else None


# ---- the section of a Markdown file


def section(runs: Sequence[Recorded], where: str) -> str:
    """A table of cem_fast and its fastest competitor per case, on the CPU and the GPU, and a list of further results.

    Args:
        runs: the runs of a table.
        where: path of its folder in links.
    """
    cpu, cuda = shown(runs, "cpu"), shown(runs, "cuda")
    main = [recorded for recorded in (cpu, cuda) if recorded is not None]
    if not main:
        return "No complete run yet: `make bench` fills this in."
    lines = []
    for recorded in main:
        lines += [_origin(recorded), ""]
    lines += [
        "| operation | CPU | fastest other | speedup | share of ceiling | GPU | fastest other | speedup | share of ceiling |",
        "|---|--:|---|--:|--:|--:|---|--:|--:|",
    ]
    for case in dict.fromkeys(row.case for recorded in main for row in _main_rows(recorded)):
        cells = [_cells(recorded, case) for recorded in (cpu, cuda)]
        label = next(row for recorded in main for row in _main_rows(recorded) if row.case == case)
        lines.append(f"| {_label(label)} | {' | '.join(' | '.join(four) for four in cells)} |")
    lines.append("")
    if cuda is None:
        lines += [
            "No GPU results yet: `cem-fast bench --device cuda` adds them.",
            "",
        ]
    if cpu is not None:
        lines += [f"- {fact}" for fact in (*_facts(cpu, where), _counts(cpu, where))]
    lines += ["", f"![Time of every contender relative to cem_fast]({where}/{PLOTS[0]})"]
    return "\n".join(lines).rstrip()


def _origin(recorded: Recorded) -> str:
    run = recorded.run
    commit = f", commit {run.commit[:12]}{'-dirty' if run.commit.endswith('-dirty') else ''}" if run.commit else ""
    quick = ", a quick run: few shapes, few rounds" if run.mode == "quick" else ""
    return (
        f"Measured by `{run.command}` on {run.run[:10]} ({run.processor}, threads: {run.threads}; torch {run.torch}{commit}{quick}). "
        "Times are medians of interleaved calls, forward plus backward. All contenders get the same inputs and pass the same error "
        "check against float64. Share of ceiling: the time that memory traffic or arithmetic alone would take at the rates measured "
        "in the same run, relative to the measured time; above 100%, data came from a cache. Eq. 5-7: the loss of the paper. Released "
        "variant: the loss of its authors' code. Segmented GEMM: torch matrix products over rows grouped by class."
    )


def _main_rows(recorded: Recorded) -> list[Row]:
    """Rows of cem_fast outside scaling curves, in the direction of a training step or a fit."""
    return [
        row
        for row in recorded.rows
        if row.contender == OURS and row.op in OPERATION and not row.axis and row.direction in ("both", "fit", "")
    ]


def _label(row: Row) -> str:
    kind = "" if row.covariance == "spherical" else f" {row.covariance}"
    dtype = f", {row.dtype}" if row.dtype != "float32" else ""
    return f"{OPERATION[row.op]}{kind}{dtype}: {row.N:,} x {row.D:,}, C = {row.C:,}, K = {row.K:,}"


def _cells(recorded: Recorded | None, case: tuple) -> tuple[str, str, str, str]:
    rows = [] if recorded is None else [row for row in recorded.rows if row.case == case]
    ours = next((row for row in rows if row.contender == OURS), None)
    if ours is None:
        return "", "", "", ""
    if ours.status != OK or ours.p50_ms is None:
        return f"**{ours.status}**", "", "", ""
    share = "" if ours.share is None else f"{ours.share:.0%}"
    fastest = _fastest_other(rows)
    if fastest is None:
        return ms(ours.p50_ms), "", "", share
    speedup = f"{fastest.times.p50 / ours.p50_ms:.1f}x"
    return ms(ours.p50_ms), f"{fastest.contender} {ms(fastest.p50_ms)}", speedup, share


def _fastest_other(of_case: Sequence[Row]) -> Row | None:
    """The fastest contender of a case other than cem_fast; None if none was timed."""
    others = [r for r in of_case if not r.contender.startswith(OURS) and r.status == OK and r.p50_ms is not None]
    return min(others, key=lambda row: row.times.p50, default=None)


def _lost(rows: Sequence[Row]) -> Iterator[str]:
    """Cases in which another contender is faster than cem_fast by more than the noise."""
    lost = []
    timed = [row for row in rows if row.op in OPERATION and row.status == OK and row.p50_ms is not None]
    for ours in (row for row in timed if row.contender == OURS):
        best = _fastest_other([row for row in timed if row.case == ours.case])
        if best is not None and best.times.p80 < ours.times.p20:
            label = _label(ours) + (f" ({ours.direction})" if ours.direction not in ("both", "fit", "") else "")
            lost.append(f"{label}: {ms(ours.p50_ms)}, {best.contender} {ms(best.p50_ms)}")
    if lost:
        yield f"Another contender is faster in {len(lost)} {'case' if len(lost) == 1 else 'cases'}: {'; '.join(lost)}."


def _facts(recorded: Recorded, where: str) -> Iterator[str]:
    """One sentence per result of the other groups."""
    rows = recorded.rows
    yield from _lost(rows)
    yield from _training(rows)
    refits = [row for row in rows if row.op == "refit" and row.status == OK]
    for row in refits:
        yield f"A refit of {row.N:,} rows of {row.D} features ({row.C} classes, {row.K} components) takes {ms(row.p50_ms)}."
    slopes = _slopes(rows)
    if slopes:
        text = "; ".join(
            f"{op}: {', '.join(f'{axis} {value:.2f}' for axis, value in of.items())}" for op, of in slopes.items()
        )
        yield f"Growth exponents of the fit time over the last decade of each size ([curves]({where}/{PLOTS[2]})): {text}."
    streams = [row for row in rows if row.op == "fit_stream" and row.peak_mib is not None]
    if streams:
        sizes = ", ".join(f"{row.N:,}" for row in streams)
        peaks = ", ".join(f"{row.peak_mib:.0f}" for row in streams)
        yield f"Streamed fits of {sizes} rows of {streams[0].D} features add {peaks} MiB of memory ({streams[0].note})."
    starts = {row.contender: row for row in rows if row.group == "startup" and row.status == OK}
    if starts:
        times = ", ".join(f"{name} {ms(row.p50_ms)}" for name, row in starts.items())
        yield f"New process: {times}."
    first = sorted(row.first_ms for row in rows if row.contender == "torch.compile" and row.first_ms is not None)
    if first:
        yield f"The first call of `torch.compile` takes {ms(first[0])} to {ms(first[-1])} per shape; cem_fast compiles nothing."


def _training(rows: Sequence[Row]) -> Iterator[str]:
    found = {(row.contender, row.direction): row for row in rows if row.group == "training"}
    plain = found.get((training.PLAIN, training.STEP))
    if plain is None or plain.N is None:
        return
    steps = plain.N / training.BATCH
    epoch = steps * plain.times.p50
    for name, who in ((training.OURS, "CEM"), (training.RELEASED, "the released loop")):
        added, refit = found[name, training.ADDED], found[name, training.REFIT]
        extra = steps * added.times.p50 + refit.times.p50
        yield (
            f"Epoch of VGG11 ({plain.N:,} images of 32x32, {plain.note.partition(',')[0]}, {ms(plain.p50_ms)} per step): "
            f"{who} adds {ms(added.p50_ms)} per step ({ms(added.p20_ms)} to {ms(added.p80_ms)}) and a refit of {ms(refit.p50_ms)} on "
            f"the features of the epoch, {extra / epoch:+.1%} in total."
        )
    repeated = found[training.OURS, training.REFIT_OWN_PASS]
    share = repeated.times.p50 / epoch
    yield f"A refit with its own encoder pass takes {ms(repeated.p50_ms)}, {share:.1%} of that epoch."


def _counts(recorded: Recorded, where: str) -> str:
    counts = {status: 0 for status in (OK, "wrong", "failed", "missing", "skipped", "interpreted")}
    for row in recorded.rows:
        counts[row.status] += 1
    text = ", ".join(f"{number} {status}" for status, number in counts.items() if number)
    return f"[All rows]({where}/{PAGE}), with errors, memory and quantiles: {text}."


def _slopes(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for op in ("kmeans", "em"):
        for axis in "NDKC":
            curve = sorted(_curve(rows, op, axis, OURS, "fit"))[-2:]
            if len(curve) == 2:
                (n, t), (m, u) = curve
                found.setdefault(op, {})[axis] = math.log(u / t) / math.log(m / n)
    return found


def _curve(rows: Sequence[Row], op: str, axis: str, contender: str, direction: str) -> list[tuple[int, float]]:
    return [
        (getattr(row, axis), row.p50_ms)
        for row in rows
        if (row.op, row.axis, row.contender, row.direction) == (op, axis, contender, direction) and row.p50_ms
    ]


# ---- the page of all rows


def _page(runs: Sequence[Recorded]) -> Iterator[str]:
    found = [recorded for recorded in (shown(runs, "cpu"), shown(runs, "cuda")) if recorded is not None]
    yield "# Benchmark results"
    for recorded in found or runs[-1:]:
        run = recorded.run
        yield ""
        yield f"## {run.device}: {run.processor}"
        yield ""
        yield f"`{run.command}`, {run.run}, {run.mode}"
        yield ""
        for name in ("commit", "cem_fast", "torch", "triton", "numpy", "python", "backend", "threads", "malloc"):
            yield f"- {name}: {getattr(run, name) or 'none'}"
        yield from _ceilings(recorded.rows)
        for group in dict.fromkeys(row.group for row in recorded.rows if row.group != "ceilings"):
            yield ""
            yield f"### {group}"
            rows = [row for row in recorded.rows if row.group == group]
            for heading in dict.fromkeys(title(row) for row in rows):
                yield ""
                yield f"**{heading}**"
                yield ""
                yield "| contender | version | pass | median | 20% to 80% | first call | error | memory, MiB | share of ceiling |"
                yield "|---|---|---|--:|--:|--:|--:|--:|--:|"
                for row in rows:
                    if title(row) == heading:
                        yield _line(row)


def _ceilings(rows: Sequence[Row]) -> Iterator[str]:
    for name in dict.fromkeys(row.op for row in rows if row.group == "ceilings"):
        found = [row for row in rows if row.group == "ceilings" and row.op == name]
        yield f"- {name}: " + "; ".join(f"{row.note} at the {row.direction}" for row in found)


def _line(row: Row) -> str:
    status = "" if row.status == OK else f"**{row.status}**: {row.note}"
    if row.status == WRONG:
        status = f"🟥 {status}"
    between = f"{ms(row.p20_ms)} to {ms(row.p80_ms)}" if row.p50_ms is not None else ""
    cells = (
        row.contender,
        row.version,
        row.direction,
        status or ms(row.p50_ms),
        between,
        ms(row.first_ms),
        "" if row.error is None else f"{row.error:.0e}",
        "" if row.peak_mib is None else f"{row.peak_mib:,.1f}",
        "" if row.share is None else f"{row.share:.0%} of {row.bound}",
    )
    return f"| {' | '.join(cells)} |"


# ---- plots


def _plots(runs: Sequence[Recorded], folder: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    recorded = shown(runs, "cpu") or shown(runs, "cuda") or (runs[-1] if runs else None)
    if recorded is None:
        return []
    written = []
    for name, draw in zip(PLOTS, (_draw_operations, _draw_scaling, _draw_fitting, _draw_roofline)):
        figure = draw(recorded.rows, plt)
        if figure is not None:
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)
            written.append(folder / name)
    return written


def _draw_operations(rows: Sequence[Row], plt: Any) -> Figure | None:
    """Time of each contender relative to cem_fast, one line per case."""
    ours = {
        row.case: row for row in rows if row.contender == OURS and row.op in OPERATION and not row.axis and row.p50_ms
    }
    main = [case for case, row in ours.items() if row.direction in ("both", "fit")]
    if not main:
        return None
    figure, plot = plt.subplots(figsize=(9, 1.2 + 0.42 * len(main)), layout="constrained")
    others = [row for row in rows if row.case in main and row.contender != OURS and row.p50_ms]
    for name in dict.fromkeys(row.contender for row in others):
        points = [
            (row.times.p50 / ours[row.case].times.p50, main.index(row.case)) for row in others if row.contender == name
        ]
        plot.scatter(*zip(*points), label=name, s=36, alpha=0.85)
    plot.axvline(1, color="black", linewidth=1)
    plot.set_xscale("log")
    plot.set_yticks(range(len(main)), [_label(ours[case]) for case in main], fontsize=8)
    plot.invert_yaxis()
    plot.set_xlabel("time relative to cem_fast (right of the line: slower)")
    plot.grid(True, axis="x", which="both", alpha=0.2)
    if others:
        plot.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def _draw_scaling(rows: Sequence[Row], plt: Any) -> Figure | None:
    """Time over N, D, C and K, one row of plots per operation and direction."""
    curves = [row for row in rows if row.group == "scaling" and row.axis and row.p50_ms and row.direction != "copy"]
    if not curves:
        return None
    lines = list(dict.fromkeys((row.op, row.direction) for row in curves))
    axes = list(dict.fromkeys(row.axis for row in curves))
    size = (3.2 * len(axes), 2.4 * len(lines))
    figure, plots = plt.subplots(len(lines), len(axes), figsize=size, squeeze=False, sharey="row", layout="constrained")
    for line, (op, direction) in zip(plots, lines):
        for plot, axis in zip(line, axes):
            for name in dict.fromkeys(row.contender for row in curves):
                points = sorted(_curve(curves, op, axis, name, direction))
                if points:
                    plot.loglog(*zip(*points), marker="o", markersize=4, label=name)
            plot.grid(True, which="both", alpha=0.2)
            plot.set_xlabel(axis)
        line[0].set_ylabel(f"{op}\n{direction}, ms", fontsize=8)
    plots[0][0].legend(fontsize=8)
    return figure


def _draw_fitting(rows: Sequence[Row], plt: Any) -> Figure | None:
    """Time of fits over N, D, C and K."""
    curves = [row for row in rows if row.group == "fitting" and row.axis and row.p50_ms and row.direction == "fit"]
    if not curves:
        return None
    axes = list(dict.fromkeys(row.axis for row in curves))
    figure, plots = plt.subplots(
        1, len(axes), figsize=(3.4 * len(axes), 3), sharey=True, squeeze=False, layout="constrained"
    )
    for plot, axis in zip(plots[0], axes):
        for op, name in dict.fromkeys((row.op, row.contender) for row in curves):
            points = sorted(_curve(curves, op, axis, name, "fit"))
            if points:
                plot.loglog(*zip(*points), marker="o", markersize=4, label=f"{op}, {name}")
        plot.set_xlabel(axis)
        plot.grid(True, which="both", alpha=0.2)
    plots[0][0].set_ylabel("ms")
    plots[0][0].legend(fontsize=8)
    return figure


def _draw_roofline(rows: Sequence[Row], plt: Any) -> Figure | None:
    """Share of the ceiling of each row of cem_fast."""
    ours = [row for row in rows if row.contender == OURS and row.share is not None and not row.axis]
    if not ours:
        return None
    figure, plot = plt.subplots(figsize=(9, 1 + 0.24 * len(ours)), layout="constrained")
    colors = {"memory": "tab:blue", "arithmetic": "tab:orange"}
    for bound, color in colors.items():
        picked = [(index, 100 * (row.share or 0)) for index, row in enumerate(ours) if row.bound == bound]
        if picked:
            plot.barh(*zip(*picked), color=color, label=f"limited by {bound}")
    plot.set_yticks(range(len(ours)), [f"{_label(row)}, {row.direction}" for row in ours], fontsize=7)
    plot.invert_yaxis()
    plot.set_xlabel("share of the ceiling, %")
    plot.legend(fontsize=8)
    plot.grid(True, axis="x", alpha=0.2)
    return figure
