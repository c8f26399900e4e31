"""A grid of runs, and the results.json that sums them up."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from cem_fast import attacks, defenses
from cem_fast._support.files import check_target, write_atomically
from cem_fast._support.lookup import lookup
from cem_fast.config import LATER, RunConfig
from cem_fast.experiments import cluster as clusters
from cem_fast.experiments import gains, provenance, saved_run, workers
from cem_fast.experiments.build import build_attack, build_parts, load_data
from cem_fast.experiments.cluster import Cluster
from cem_fast.experiments.records import Baseline, Failure, Identity, Results
from cem_fast.experiments.results import MARK, RESULTS, Measured, measured, read_settings
from cem_fast.experiments.run import require_seeded, run_cell
from cem_fast.experiments.watch import Watch

RUNS = "runs"


class Plan(Protocol):
    """Planned runs, such as a :class:`cem_fast.config.GridConfig`.

    Example:
        >>> from cem_fast.config import GridConfig
        >>> from cem_fast.experiments import grid
        >>> plan: grid.Plan = GridConfig(seeds=(0,))
        >>> len(plan.runs())
        3
    """

    def runs(self) -> list[RunConfig]:
        """The planned runs without duplicates."""


class MadeWith(NamedTuple):
    """What results were made with.

    Example:
        >>> from cem_fast.experiments import grid
        >>> grid.MadeWith("cem-fast demo", git=None, versions={"python": "3.11"}).command
        'cem-fast demo'
    """

    command: str
    git: str | None
    versions: dict[str, str | None]


def check(plan: list[RunConfig], watch: Watch | None = None) -> None:
    """Fails early if the settings of a plan would fail later. Trains nothing.

    Args:
        plan: the planned runs.
        watch: callbacks for the progress of loading the images.

    Raises:
        FileNotFoundError: a data set is missing.
        ValueError: a setting is unknown, out of range, or does not fit the data.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import grid
        >>> grid.check([RunConfig(image_size=16, defense="nois")])
        Traceback (most recent call last):
        ValueError: unknown defense 'nois': expected one of ...
    """
    names: dict[str, str] = {}
    watch = watch or Watch()
    for config in plan:
        lookup("defense", config.defense, dict.fromkeys(defenses.names()))
        for attack in config.attacks:
            lookup("attack", attack, dict.fromkeys(attacks.names()))
        on_step = partial(watch.loading, config.data)
        splits = load_data(config, on_step=on_step)
        if splits.fixed and config.fold != plan[0].fold:
            raise ValueError(
                f"folds must list one value for {config.data!r}, whose test part is the same in all of them, got {plan[0].fold} "
                f"and {config.fold}"
            )
        if names.setdefault(splits.name, config.data) != config.data:
            raise ValueError(
                f"data must have different names, got two called {splits.name!r}: {names[splits.name]}, {config.data}"
            )
    for config in {
        replace(config, data=config.data, seed=0, fold=plan[0].fold, cem_weight=0.0): None for config in plan
    }:
        splits = load_data(config)
        build_parts(config, image_shape=splits.image_shape, num_classes=splits.num_classes)
        for attack in config.attacks:
            build_attack(attack, config, splits)


def check_folder(folder: str | Path, plan: list[RunConfig]) -> None:
    """Fails early if a grid could not be saved to a folder, or would replace other results.

    Args:
        folder: where ``results.json`` and the runs will be saved; it need not exist.
        plan: the planned runs.

    Raises:
        ValueError: the folder cannot be written to, or holds another program's files or the results of runs that are not planned.

    Example:
        >>> import tempfile
        >>> from cem_fast.config import GridConfig
        >>> from cem_fast.experiments import grid
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     grid.check_folder(folder, GridConfig().runs())
    """
    runs = {f"{run_path(config)}/{saved_run.DESCRIPTION}": saved_run.MARK for config in plan}
    check_target(folder, {RESULTS: MARK, **runs})
    check_target(Path(folder) / RUNS, {})
    planned = [config.to_json() for config in plan]
    try:
        held = read_settings(folder)
    except (FileNotFoundError, ValueError):  # absent or unreadable
        return
    if others := sum({**LATER, **config} not in planned for config in held):
        raise ValueError(
            f"{Path(folder) / RESULTS} holds the results of {others} runs that this grid does not plan: "
            "give it a --name or --folder of its own"
        )


def evaluate(
    grid: Plan,
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    jobs: int = 1,
    fresh: bool = False,
    command: str | None = None,
    watch: Watch | None = None,
    cluster: Cluster | None = None,
) -> Results:
    """Runs a grid and keeps its results.json up to date, also when it is interrupted.

    A finished run of the same settings, images and code is not repeated unless ``fresh``. Even then, its old result stays until the new
    one replaces it. An interrupted run continues after its latest epoch. A failed run is reported under ``failed`` and retried by the next
    call. A run whose process is killed is retried once. With the same number of jobs and cores, results depend on none of this.

    Args:
        grid: the runs.
        folder: gets ``results.json``, and one folder per run in ``runs``.
        device: device to compute on.
        jobs: runs at a time; several runs use processes of their own, which share the cores.
        fresh: whether to repeat finished runs.
        command: command that gets these results again; None for the running one.
        watch: callbacks for progress.
        cluster: the Ray cluster that does the runs, see :func:`cem_fast.experiments.cluster.run_all`; None for this machine.

    Returns:
        Content of results.json.

    Raises:
        FileNotFoundError: a data set is missing.
        ConnectionError: there is no such cluster.
        ValueError: before anything is written: a setting does not fit, or :func:`check_folder` refuses the folder.
        OSError: a file cannot be read or written; finished runs are kept.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from PIL import Image
        >>> from cem_fast.config import GridConfig
        >>> from cem_fast.experiments import grid
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for i in range(20):
        ...         (Path(root) / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        ...         pixels = np.full((16, 16), 10 * i, dtype=np.uint8)
        ...         Image.fromarray(pixels).save(Path(root) / "images" / f"class{i % 2}" / f"{i}.png")
        ...     config = GridConfig(data=(f"{root}/images",), defenses=(), seeds=(0,), epochs=1, attacks=("nearest",))
        ...     results = grid.evaluate(config, Path(root) / "results")
        >>> [run.label for run in results.runs], results.pairs
        (['bottleneck'], ())
    """
    plan, watch = grid.runs(), watch or Watch()
    for config in plan:
        require_seeded(config)
    check(plan, watch)
    check_folder(folder, plan)
    folder = Path(folder)
    made_with = MadeWith(command or provenance.command_line(), provenance.commit(), provenance.versions())
    identities = {config: provenance.identity(load_data(config)) for config in plan}
    saved = {config: _saved(folder, config, identities[config]) for config in plan}
    found = {config: run for config, (run, _) in saved.items()}
    summary = _Summary(folder, made_with)
    tasks = []
    for index, config in enumerate(plan):
        run, reason = saved[config]
        if run is not None and not fresh:
            watch.finished(index, len(plan), config, run.record, reused=True)
            continue
        tasks.append((index, config, folder / run_path(config)))
        if reason and not fresh:
            watch.repeated(index, len(plan), config, reason)
    failed: dict[RunConfig, str] = {}
    try:
        if cluster is None:
            events = _run_all(tasks, jobs=min(jobs, len(plan)), device=device, fresh=fresh, watch=watch)
        else:
            events = clusters.run_all(tasks, cluster=cluster, jobs=jobs, device=device, fresh=fresh)
        for kind, index, details in events:
            if kind == "started":
                watch.started(index, len(plan), plan[index])
            elif kind == "stage":
                watch.stage(index, *details)
            elif kind == "finished":
                if cluster is not None:
                    clusters.becomes_visible(folder / run_path(plan[index]) / saved_run.DESCRIPTION)
                run, reason = _saved(folder, plan[index], identities[plan[index]])
                found[plan[index]] = run
                if run is None:
                    raise OSError(
                        f"{folder / run_path(plan[index])}: this run has finished, but {reason or 'its files are gone'}"
                    )
                summary.save_if_cheap(found.values(), failed)
                watch.finished(index, len(plan), plan[index], run.record, reused=False)
            else:
                if kind == "failed":
                    failed[plan[index]] = details[0]
                watch.failed(index, len(plan), plan[index], details[0], again=kind == "again")
    finally:
        summary.save(found.values(), failed)
    return summary.content


def _run_all(
    tasks: list[tuple[int, RunConfig, Path]], *, jobs: int, device: str | torch.device, fresh: bool, watch: Watch
) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
    """Runs the tasks and yields events: as :func:`cem_fast.experiments.workers.run_all`, but in this process for one job."""
    if jobs > 1:  # also for a single remaining task: results depend on the number of threads
        yield from workers.run_all(tasks, jobs=jobs, device=device, fresh=fresh)
        return
    for index, config, path in tasks:
        yield "started", index, ()
        try:
            run_cell(config, path, device=device, fresh=fresh, on_stage=partial(watch.stage, index))
        except Exception as error:
            yield "failed", index, (workers.reason(error),)
        else:
            yield "finished", index, ()


def summarize(
    runs: Sequence[Measured], folder: str | Path, made_with: MadeWith, failed: Mapping[RunConfig, str] | None = None
) -> Results:
    """Sums up the runs of a grid.

    Args:
        runs: the finished runs.
        folder: folder of the grid.
        made_with: command, commit and versions.
        failed: reasons of the runs that failed.

    Returns:
        Content of results.json.

    Raises:
        FileNotFoundError: the files of a run are missing.
        ValueError: a file is damaged.

    Example:
        >>> from cem_fast.experiments import grid
        >>> grid.summarize([], "runs/none", grid.MadeWith("cem-fast demo", None, {})).command
        'cem-fast demo'
    """
    return Results(
        command=made_with.command,
        git=made_with.git,
        versions=made_with.versions,
        baseline={name: _baseline(name, runs, Path(folder)) for name in dict.fromkeys(run.record.data for run in runs)},
        runs=tuple(run.record for run in runs),
        pairs=tuple(gains.pairs(runs)),
        frontier=tuple(gains.frontier(runs)),
        failed=tuple(Failure(config, reason) for config, reason in (failed or {}).items()),
    )


def _baseline(name: str, runs: Sequence[Measured], folder: Path) -> Baseline:
    """The controls of a data set. Every fold counts in proportion to its victims."""
    folds = {run.record.config.fold: run for run in runs if run.record.data == name}.values()
    found = [saved_run.read_description(folder / str(run.record.checkpoint)).baseline for run in folds]
    sizes = [len(run.measurements["groups"]) for run in folds]

    def mean(values: Iterable[float]) -> float:
        return sum(size * value for size, value in zip(sizes, values)) / sum(sizes)

    return Baseline(mean(each.mean_image_mse for each in found), mean(each.class_mean_mse for each in found))


def run_path(config: RunConfig) -> str:
    """Folder of a run, relative to that of its grid: readable, and different for different settings.

    Args:
        config: settings of the run.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import grid
        >>> grid.run_path(RunConfig(cem_weight=0.5))[:-8]
        'runs/faces-noise-cem-seed0-fold1-'
    """
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()[:8]
    parts = [
        Path(config.data).name,
        config.label.replace(" + ", "-").lower(),
        f"seed{config.seed}",
        f"fold{config.fold}",
    ]
    return f"{RUNS}/{'-'.join(parts)}-{digest}"


class _Summary:
    """results.json of a grid in progress."""

    def __init__(self, folder: Path, made_with: MadeWith):
        self.folder, self.made_with = folder, made_with
        self.content = summarize([], folder, made_with)
        self.cost, self.saved_at = 0.0, 0.0

    def save_if_cheap(self, runs: Iterable[Measured | None], failed: Mapping[RunConfig, str]) -> None:
        """Saves, unless that would slow a large grid down: bootstrapping hundreds of runs takes seconds."""
        if time.monotonic() - self.saved_at > 20 * self.cost:
            self.save(runs, failed)

    def save(self, runs: Iterable[Measured | None], failed: Mapping[RunConfig, str]) -> None:
        """Replaces results.json by a summary of these runs. Leaves it alone if none has finished."""
        start = time.monotonic()
        self.content = summarize([run for run in runs if run], self.folder, self.made_with, failed)
        if not self.content.runs:
            return
        document = json.dumps(self.content.to_json(), indent=1, allow_nan=False) + "\n"
        write_atomically(self.folder / RESULTS, document.encode())
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - start


def _saved(folder: Path, config: RunConfig, wanted: Identity) -> tuple[Measured | None, str]:
    """The finished run of these settings, images and code; or None, and why the run on disk is not it."""
    path = run_path(config)
    try:
        description = saved_run.read_description(folder / path)
        run = measured(folder, description.record.at(path))
    except FileNotFoundError:
        return None, ""
    except ValueError:
        return None, "the run on disk is damaged"
    held = description.identity
    changed = {
        "code": (held.version, held.code) != (wanted.version, wanted.code),
        "images": held.images != wanted.images,
        "settings": run.record.config != config,
        "attacks": set(run.record.attacks) != set(config.attacks),
    }
    if any(changed.values()):
        return None, f"the run on disk is of other {' and '.join(key for key, other in changed.items() if other)}"
    return run, ""
