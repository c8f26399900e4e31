"""Progress of a grid: bars on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cem_fast import data
from cem_fast.config import RunConfig
from cem_fast.data.stored import StoredImages
from cem_fast.experiments.build import load_data
from cem_fast.experiments.names import differing
from cem_fast.experiments.records import Record
from cem_fast.experiments.watch import Watch

if TYPE_CHECKING:
    from rich.console import Console

    from cem_fast.data import Splits

SHOWN = 10  # names of classes that are printed


def describe(config: RunConfig, among: Iterable[RunConfig] = ()) -> str:
    """Name a run, such as ``faces / noise + CEM at noise 0.1, bottleneck = D64, seed 0, fold 1``.

    Args:
        config: settings of the run.
        among: settings of other runs; settings that tell the run from them are named.
    """
    noise = f" at noise {config.noise_std:g}" if config.noise_std > 0 else ""
    own = "".join(f", {words}" for words in differing(config, among, shown=["noise_std", "attacks"]))
    return f"{Path(config.data).name} / {config.label}{noise}{own}, seed {config.seed}, fold {config.fold}"


def outcome(record: Record) -> str:
    """Summarize the result of a run: accuracy, strongest attack, seconds."""
    text = f"accuracy {record.accuracy:.1%}"
    if record.strongest:
        text += f", attack MSE {record.attacks[record.strongest].mse:.5f} ({record.strongest})"
    return f"{text}, {record.seconds['total']:.0f} s"


def about(splits: Splits) -> str:
    """Describe images in one line: names of classes, size, and bytes where they do not fit into memory."""
    names, (channels, height, width) = splits.class_names, splits.image_shape
    listed = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
    images = splits.train.images
    apart = f", read from disk ({images.nbytes / 1e9:.1f} GB in memory)" if isinstance(images, StoredImages) else ""
    return f"{splits.name}: {len(names)} classes ({listed}), images of {channels}x{height}x{width}{apart}"


class Lines(Watch):
    """One line at the start and one at the end of every run."""

    def __init__(self, console: Console, plan: Sequence[RunConfig] = ()):
        self.console, self.plan = console, plan
        self.named: set[str] = set()  # folders of images whose classes have been named

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def started(self, index: int, total: int, config: RunConfig) -> None:
        if config.data not in {*data.names(), *self.named}:
            self.named.add(config.data)
            self._print(about(load_data(config)))
        self._print(f"[{index + 1}/{total}] {describe(config, self.plan)}: started")

    def finished(self, index: int, total: int, config: RunConfig, record: Record, *, reused: bool) -> None:
        found = "found on disk, " if reused else ""
        self._print(f"[{index + 1}/{total}] {describe(config, self.plan)}: {found}{outcome(record)}")

    def repeated(self, index: int, total: int, config: RunConfig, reason: str) -> None:
        self._print(f"[{index + 1}/{total}] {describe(config, self.plan)}: once more, since {reason}")

    def failed(self, index: int, total: int, config: RunConfig, reason: str, *, again: bool) -> None:
        what = "once more, since" if again else "failed:"
        self._print(f"[{index + 1}/{total}] {describe(config, self.plan)}: {what} {reason}")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class Bars(Lines):
    """The same lines, with a bar for the grid and one for the stage of every active run below them."""

    def __init__(self, console: Console, plan: Sequence[RunConfig] = ()):
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        super().__init__(console, plan)
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=32),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left:"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.grid = self.bars.add_task("runs", total=None)
        self.done = 0
        self.images: dict[str, Any] = {}  # bar of every folder that is being decoded
        self.current: dict[int, tuple[str, Any]] = {}  # stage and bar of every active run

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def loading(self, name: str, done: int, total: int) -> None:
        if name not in self.images:
            self.images[name] = self.bars.add_task(f"images of {Path(name).name}", total=total)
        self.bars.update(self.images[name], completed=done, total=total)
        if done == total:
            self.bars.remove_task(self.images.pop(name))

    def started(self, index: int, total: int, config: RunConfig) -> None:
        super().started(index, total, config)
        self.bars.update(self.grid, total=total, completed=self.done)

    def stage(self, index: int, name: str, done: int, total: int) -> None:
        stage, bar = self.current.get(index, ("", None))
        if bar is None:
            bar = self.bars.add_task("", total=total)
        if name != stage:
            self.bars.reset(bar, total=total, description=f"run {index + 1}: {name}")
        self.current[index] = name, bar
        self.bars.update(bar, completed=done)

    def finished(self, index: int, total: int, config: RunConfig, record: Record, *, reused: bool) -> None:
        super().finished(index, total, config, record, reused=reused)
        self._ended(index, total)

    def failed(self, index: int, total: int, config: RunConfig, reason: str, *, again: bool) -> None:
        super().failed(index, total, config, reason, again=again)
        self._ended(index, total, runs=not again)

    def _ended(self, index: int, total: int, runs: int = 1) -> None:
        if index in self.current:
            self.bars.remove_task(self.current.pop(index)[1])
        self.done += runs
        self.bars.update(self.grid, total=total, completed=self.done)


@contextmanager
def counted(console: Console, *, of_bytes: bool = False) -> Iterator[Callable[[str, int, int | None], None]]:
    """Show the progress of named items: a bar each on a terminal, a line at the start of each elsewhere.

    Args:
        console: the console.
        of_bytes: whether bytes are counted.

    Yields:
        A function to call with an item's name, the count so far, and the total, which is None while unknown.
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counts = (DownloadColumn(), TransferSpeedColumn()) if of_bytes else (MofNCompleteColumn(),)
    bars = Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), *counts, TimeRemainingColumn(), console=console
    )
    known: dict[str, Any] = {}

    def count(name: str, done: int, total: int | None) -> None:
        if name not in known:
            known[name] = bars.add_task(name, total=total)
            if not console.is_terminal:
                console.print(name, markup=False, highlight=False, soft_wrap=True)
        bars.update(known[name], completed=done, total=total)

    if not console.is_terminal:
        yield count
        return
    with bars:
        yield count
