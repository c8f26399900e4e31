"""Progress callbacks of runs and grids."""

from __future__ import annotations

from collections.abc import Callable

from cem_fast.config import RunConfig
from cem_fast.experiments.records import Record

Watcher = Callable[[str, int, int], None]
"""Called with the name of a stage, the steps done, and the steps in total."""


class Watch:
    """Callbacks of a grid in progress. The base class ignores all of them.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.watch import Watch
        >>> class Titles(Watch):
        ...     def started(self, index, total, config):
        ...         print(f"{index + 1} of {total}: {config.label}")
        >>> Titles().started(0, 2, RunConfig(cem_weight=0.5))
        1 of 2: noise + CEM
    """

    def started(self, index: int, total: int, config: RunConfig) -> None:
        """Run ``index`` (from 0) of ``total`` starts."""

    def loading(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` files of the images ``name`` are decoded, before any run."""

    def stage(self, index: int, name: str, done: int, total: int) -> None:
        """Run ``index`` has done ``done`` of ``total`` steps of a stage."""

    def finished(self, index: int, total: int, config: RunConfig, record: Record, *, reused: bool) -> None:
        """Run ``index`` of ``total`` has a result, read from disk if ``reused``."""

    def repeated(self, index: int, total: int, config: RunConfig, reason: str) -> None:
        """Run ``index`` of ``total`` is on disk, but is repeated. The reason names what has changed, such as the code."""

    def failed(self, index: int, total: int, config: RunConfig, reason: str, *, again: bool) -> None:
        """Run ``index`` of ``total`` ended without a result. It is retried at once if ``again``."""


def ignore(stage: str, done: int, total: int) -> None:
    """Does nothing: the default ``Watcher``.

    Example:
        >>> from cem_fast.experiments import watch
        >>> watch.ignore("training", 0, 10)
    """
