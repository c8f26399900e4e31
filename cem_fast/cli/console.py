"""Output for people: the console, lines, and the table of a grid's results."""

from __future__ import annotations

import io
import shlex
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cem_fast._support.text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from cem_fast.cli.progress import Lines
    from cem_fast.config import GridConfig, RunConfig
    from cem_fast.deploy import Manifest
    from cem_fast.experiments.gain_records import FrontierEntry, Pair
    from cem_fast.experiments.records import Results
    from cem_fast.experiments.results import Measured, Row
    from cem_fast.tune import Tuned

LONGEST_ERROR = 2000  # characters


def make() -> Console:
    """The console of this process; brackets and colons of names are not read as markup.

    Returns:
        A console as wide as the terminal, or 118 columns in a pipe.
    """
    from rich.console import Console

    class Safe(Console):
        """A console that escapes control characters of names and messages, also in tables."""

        def render_str(self, text: str, **options: Any) -> Text:
            return super().render_str(printable(text), **options)

    return Safe(markup=False, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 118)


def watch(console: Console, plan: Sequence[RunConfig] = ()) -> Lines:
    """The progress of a grid: bars on a terminal, lines elsewhere.

    Args:
        console: where to.
        plan: the runs, each of which is named by the settings in which others differ.
    """
    from cem_fast.cli.progress import Bars, Lines

    return (Bars if console.is_terminal else Lines)(console, plan)


def say(console: Console, text: str) -> None:
    """Print a line as it is, without wrapping."""
    console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


def fail(message: str) -> None:
    """Print an error in one line, shortened if it is very long."""
    text = printable(" ".join(message[:LONGEST_ERROR].split()))
    print(f"cem-fast: {text}{' ...' if len(message) > LONGEST_ERROR else ''}", file=sys.stderr)


def replace_what_cannot_be_printed() -> None:
    """Print a question mark instead of an error for characters that the encoding of standard output lacks."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def escape_warnings() -> None:
    """Print warnings about settings and data in one line, and escape the control characters of names, from now on."""
    default = warnings.formatwarning

    def one_line(message: Warning | str, category: type[Warning], *args: Any, **options: Any) -> str:
        if category is UserWarning:
            return printable(f"cem-fast: {message}\n")
        return printable(default(message, category, *args, **options))

    warnings.formatwarning = one_line


def show_results(console: Console, results: Results, runs: list[Measured]) -> None:
    """Print the table of a grid's results, and the gains of CEM.

    Args:
        console: where to.
        results: contents of results.json.
        runs: its runs.
    """
    from rich import box
    from rich.table import Table

    from cem_fast.experiments.results import make_rows

    sign = "+-" if console.options.ascii_only else "±"
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"the strongest attack of every run: mean over runs {sign} their standard deviation",
        title_justify="left",
    )
    for column in ("data", "defense", "noise", "runs", "accuracy, %", "attack MSE", "/ class mean", "PSNR", "SSIM"):
        table.add_column(
            column,
            justify="left" if column in ("data", "defense") else "right",
            no_wrap=console.width >= 100 and column != "defense",
        )
    rows = make_rows(runs)
    for row in rows:
        class_mean = results.baseline[row.data].class_mean_mse
        table.add_row(
            row.data,
            row.short_name,
            f"{row.noise_std:g}",
            str(row.num_runs),
            f"{100 * row.accuracy.mean:.1f} {sign} {100 * row.accuracy.deviation:.1f}",
            f"{row.mse.mean:.5f} {sign} {row.mse.deviation:.5f}",
            f"{row.mse.mean / class_mean:.0%}",
            f"{row.psnr.mean:.2f}",
            f"{row.ssim.mean:.3f}",
        )
    for data, baseline in results.baseline.items():
        controls = {"class mean, the label alone": baseline.class_mean_mse, "mean image": baseline.mean_image_mse}
        for title, error in controls.items():
            share = f"{error / baseline.class_mean_mse:.0%}"
            table.add_row(data, title, "", "", "", f"{error:.5f}", share, "", "", style="dim")
    console.print(table)
    _show_gains(console, results, {row.record.cell: row for row in rows})


def show_plan(config: RunConfig | GridConfig, plan: list[RunConfig], folder: str, *, attack: bool = True) -> int:
    """Print the settings and the planned runs, with counts of images instead of times, which depend on the machine."""
    from dataclasses import asdict

    import yaml

    from cem_fast.attacks.budgets import budgeted
    from cem_fast.cli.progress import describe
    from cem_fast.experiments.build import load_data

    shown = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(config).items()}
    print(yaml.safe_dump(shown, sort_keys=False), end="")
    trained = attacked = 0
    for index, run in enumerate(plan):
        splits = load_data(run)
        trained += run.epochs * len(splits.train)
        if attack and {"decoder", "ensemble", "optimization", "gan"} & set(run.attacks):
            epochs = run.attack_epochs or budgeted(run.attack_budget, {})["epochs"]
            attacked += (epochs + epochs // 2) * len(splits.attacker)
        sizes = f"{len(splits.train)} training, {len(splits.test)} test images"
        print(f"[{index + 1}/{len(plan)}] {printable(describe(run, plan))}: {sizes}")
    attacks = f" and {attacked:,} for the decoder attacks" if attack else ""
    print(f"in all {trained:,} images to train on{attacks}, counting every epoch; nothing was run")
    print(f"the results would go to {printable(folder)}")
    return 0


def show_export(console: Console, manifest: Manifest, folder: str) -> None:
    """Print the cost of exported halves and the noise of their messages.

    Args:
        console: where to.
        manifest: their description.
        folder: where they are.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("device half", "parameters", "multiplications", "ms on this CPU", "bytes a message"):
        table.add_column(column, justify="left" if column == "device half" else "right")
    for name, cost in (("exported", manifest.cost), ("without a defense", manifest.undefended)):
        if cost is not None:
            counts = (cost.parameters, cost.multiplications)
            table.add_row(
                name, *(f"{each:,}" for each in counts), f"{cost.milliseconds:.3f}", f"{cost.message_bytes:,}"
            )
    console.print(table)
    noise = manifest.noise
    names = ", ".join(f"{each.name} ({each.distribution})" for each in manifest.random_inputs)
    where = {"input": f"from the inputs {names}", "graph": "from torch's generator", "none": "none"}[noise.source]
    say(console, f"noise: {where}; variance {noise.variance:.4g}, verified on {manifest.file('device')}")
    say(console, f"halves: {folder}/{manifest.file('device')} and {folder}/{manifest.file('cloud')}")


def _show_gains(console: Console, results: Results, rows: dict[Any, Row]) -> None:
    """Print the gains, for the rows by their cells."""

    def name(entry: Pair | FrontierEntry) -> str:
        """Name of the row of a gain, such as ``faces / noise + CEM at noise 0.1``."""
        row = rows[results.runs[entry.run].cell]
        return f"{row.data} / {row.short_name} at noise {row.noise_std:g}"

    gains: dict[str, Iterable[Pair | FrontierEntry]] = {
        "at the same noise": results.pairs,
        "over plain noise at equal accuracy": results.frontier,
    }
    for title, entries in gains.items():
        for entry in entries:
            low, high = entry.interval
            interval = f"(95% interval {low:+.0%} to {high:+.0%})"
            say(console, f"{name(entry)}, {title}: strongest attack's MSE {entry.gain:+.0%} {interval}")
    measured = {entry.run for entry in results.frontier}
    for pair in results.pairs:
        if pair.run not in measured:
            say(
                console,
                f"{name(pair)}, over plain noise at equal accuracy: not measured in this grid "
                "(needs --noise-levels that reach its accuracy)",
            )
    for lead in filter(None, map(results.lead, results.baseline)):
        low, high = lead.interval
        say(
            console,
            f"at equal accuracy ({lead.accuracy:.1%}) on {lead.data}: {lead.name or lead.defense} changes the strongest attack's MSE by "
            f"{lead.gain:+.0%} over plain noise (95% interval {low:+.0%} to {high:+.0%})",
        )


def show_tuned(console: Console, tuned: Tuned, folder: str) -> None:
    """Print the confirmed trials of a search next to plain noise, and where the best one is.

    Args:
        console: where to.
        tuned: result of the search.
        folder: where its files are.
    """
    from rich import box
    from rich.table import Table

    from cem_fast.experiments.names import differing

    shown = [*tuned.confirmed_plain, *tuned.confirmed]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("confirmed", "accuracy, %", "attack MSE", "bytes", "multiplications"):
        table.add_column(column, justify="left" if column == "confirmed" else "right")
    for trial in shown:
        if trial.accuracy is not None and trial.mse is not None:
            words = ", ".join([trial.config.label, *differing(trial.config, [each.config for each in shown])])
            table.add_row(
                words,
                f"{100 * trial.accuracy:.1f}",
                f"{trial.mse:.5f}",
                f"{trial.message_bytes:,}",
                f"{trial.device_macs:,}",
            )
    console.print(table)
    if tuned.best is None:
        fail("no confirmed trial meets the targets: allow a larger loss of accuracy or more trials")
    else:
        say(console, f"best: {folder}/best.yaml; train it with cem-fast train --config {shlex.quote(folder)}/best.yaml")
