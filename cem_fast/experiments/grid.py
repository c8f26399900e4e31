"""A grid of runs, and the results.json that sums them up."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cem_fast import attacks, defenses
from cem_fast._support.files import check_target, write_atomically
from cem_fast._support.lookup import lookup
from cem_fast.config import LATER, GridConfig, RunConfig
from cem_fast.experiments import gains, provenance, saved_run, workers
from cem_fast.experiments.build import build_attack, build_parts, load_data
from cem_fast.experiments.results import MARK, RESULTS, Measured
from cem_fast.experiments.run import run_cell
from cem_fast.experiments.watch import Watch

RUNS = "runs"


def check(plan: list[RunConfig]) -> None:
    """Raises before anything is trained what would otherwise surface hours later.

    Args:
        plan: the runs to come.

    Raises:
        FileNotFoundError: a data set is missing.
        ValueError: a setting names something unknown, is out of range, or does not fit the data.
    """
    names: dict[str, str] = {}
    for config in plan:
        lookup("defense", config.defense, dict.fromkeys(defenses.names()))
        for attack in config.attacks:
            lookup("attack", attack, dict.fromkeys(attacks.names()))
        splits = load_data(config.data, config.fold, config.image_size, config.protocol)
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
        splits = load_data(config.data, config.fold, config.image_size, config.protocol)
        build_parts(config, image_shape=splits.image_shape, num_classes=splits.num_classes)
        for attack in config.attacks:
            build_attack(attack, config, splits)


def check_folder(folder: str | Path, plan: list[RunConfig]) -> None:
    """Raises before anything is trained if a grid's results cannot go to a folder, or would take the place of others.

    Args:
        folder: where ``results.json`` and the runs are to go; it need not exist.
        plan: the runs to come.

    Raises:
        ValueError: the folder cannot be written to, or holds somebody else's files or the results of runs that are not planned.
    """
    runs = {f"{run_path(config)}/{saved_run.DESCRIPTION}": saved_run.MARK for config in plan}
    check_target(folder, {RESULTS: MARK, **runs})
    check_target(Path(folder) / RUNS, {})
    path, planned = Path(folder) / RESULTS, [config.to_json() for config in plan]
    try:
        held = [record["config"] for record in json.loads(path.read_bytes())["runs"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # nothing there, or nothing that can be read any more
        return
    if others := sum({**LATER, **config} not in planned for config in held):
        raise ValueError(
            f"{path} holds the results of {others} runs that this grid does not plan: give it a --name or --folder of its own"
        )


def evaluate(
    grid: GridConfig,
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    jobs: int = 1,
    fresh: bool = False,
    command: str | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Runs a grid; results.json holds every planned run that has a result, also while it goes on and after an interruption.

    A finished run of the same settings, images and code is not repeated unless ``fresh``; even then its old result stays until the new
    one takes its place, so that an interrupted grid loses nothing. A run that was interrupted goes on after its latest epoch. A run that
    fails is left to the next call, with its reason under ``failed``, and the others are done; one whose process is killed is tried once
    more before that. On as many jobs and cores, the results do not depend on any of this.

    Args:
        grid: the runs.
        folder: gets ``results.json`` and the folder ``runs`` with one folder a run.
        device: where to compute.
        jobs: runs at a time; more than one run on processes of their own, which share the cores.
        fresh: whether to repeat finished runs.
        command: how to get these results again; None for the command that is running.
        watch: hears how it goes on.

    Returns:
        What results.json holds.

    Raises:
        FileNotFoundError: a data set is missing.
        ValueError: a setting does not fit, or the results cannot go to the folder (see :func:`check_folder`); nothing was written.
        OSError: something cannot be read or written; finished runs are kept.
    """
    plan, watch = grid.runs(), watch or Watch()
    check(plan)
    check_folder(folder, plan)
    folder = Path(folder)
    made_with = {
        "command": command or provenance.command_line(),
        "git": provenance.commit(),
        "versions": provenance.versions(),
    }
    identities = {
        config: provenance.identity(load_data(config.data, config.fold, config.image_size, config.protocol))
        for config in plan
    }
    found = {config: _finished(folder, config, identities[config]) for config in plan}
    results = _Results(folder, made_with)
    tasks = []
    for index, config in enumerate(plan):
        if fresh or found[config] is None:
            tasks.append((index, config, folder / run_path(config)))
        else:
            watch.finished(index, len(plan), config, found[config].record, reused=True)
    failed: dict[RunConfig, str] = {}
    try:
        for kind, index, details in _run_all(tasks, jobs=min(jobs, len(plan)), device=device, fresh=fresh, watch=watch):
            if kind == "started":
                watch.started(index, len(plan), plan[index])
            elif kind == "stage":
                watch.stage(index, *details)
            elif kind == "finished":
                found[plan[index]] = _finished(folder, plan[index], identities[plan[index]])
                results.save_if_cheap(found.values(), failed)
                watch.finished(index, len(plan), plan[index], found[plan[index]].record, reused=False)
            else:
                if kind == "failed":
                    failed[plan[index]] = details[0]
                watch.failed(index, len(plan), plan[index], details[0], again=kind == "again")
    finally:
        results.save(found.values(), failed)
    return results.content


def _run_all(
    tasks: list[tuple[int, RunConfig, Path]], *, jobs: int, device: str | torch.device, fresh: bool, watch: Watch
) -> Iterator[tuple[str, int, tuple[Any, ...]]]:
    """Does the tasks and yields what happens, in this process for one job; see :func:`cem_fast.experiments.workers.run_all`."""
    if jobs > 1:  # even for a single task that is left: results depend on the number of threads
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
    runs: list[Measured], folder: Path, made_with: dict[str, Any], failed: Mapping[RunConfig, str]
) -> dict[str, Any]:
    """Everything that results.json holds.

    Args:
        runs: the finished runs.
        folder: the folder that the runs' ``checkpoint`` is relative to.
        made_with: ``command``, ``git`` and ``versions``.
        failed: the runs that failed, and why.
    """
    baseline: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(measured.record["data"] for measured in runs):
        # every fold counts as often as it has victims
        folds = {m.record["fold"]: m for m in runs if m.record["data"] == name}.values()
        descriptions = [saved_run.read_description(folder / m.record["checkpoint"])["baseline"] for m in folds]
        sizes = [len(m.measurements["groups"]) for m in folds]
        baseline[name] = {
            key: sum(size * each[key] for size, each in zip(sizes, descriptions)) / sum(sizes)
            for key in descriptions[0]
        }
    return {
        "schema": saved_run.SCHEMA,
        **made_with,
        "baseline": baseline,
        "runs": [measured.record for measured in runs],
        "pairs": gains.pairs(runs),
        "frontier": gains.frontier(runs),
        "failed": [{"config": config.to_json(), "reason": reason} for config, reason in failed.items()],
    }


def run_path(config: RunConfig) -> str:
    """Folder of a run inside its grid's: readable, and different for different settings."""
    digest = hashlib.sha256(json.dumps(config.to_json(), sort_keys=True).encode()).hexdigest()[:8]
    parts = [
        Path(config.data).name,
        config.label.replace(" + ", "-").lower(),
        f"seed{config.seed}",
        f"fold{config.fold}",
    ]
    return f"{RUNS}/{'-'.join(parts)}-{digest}"


class _Results:
    """results.json of a grid in progress."""

    def __init__(self, folder: Path, made_with: dict[str, Any]):
        self.folder, self.made_with = folder, made_with
        self.content: dict[str, Any] = {}
        self.cost, self.saved_at = 0.0, 0.0

    def save_if_cheap(self, runs: Iterable[Measured | None], failed: Mapping[RunConfig, str]) -> None:
        """Saves, unless that would slow a large grid down: bootstrapping hundreds of runs takes seconds."""
        if time.monotonic() - self.saved_at > 20 * self.cost:
            self.save(runs, failed)

    def save(self, runs: Iterable[Measured | None], failed: Mapping[RunConfig, str]) -> None:
        """Replaces results.json by what these runs say; leaves it alone where none has finished."""
        start = time.monotonic()
        self.content = summarize([measured for measured in runs if measured], self.folder, self.made_with, failed)
        if not self.content["runs"]:
            return
        document = json.dumps(self.content, indent=1, allow_nan=False) + "\n"
        write_atomically(self.folder / RESULTS, document.encode())
        self.saved_at = time.monotonic()
        self.cost = self.saved_at - start


def _finished(folder: Path, config: RunConfig, wanted: dict[str, str]) -> Measured | None:
    """The finished run of these settings, images and code; None where there is none, or where its files are damaged."""
    path = run_path(config)
    try:
        description = saved_run.read_description(folder / path)
        measurements = saved_run.read_measurements(folder / path)
        record = saved_run.entry(folder / path, description, dict, "record")
        attacked = saved_run.entry(folder / path, description, dict, "record", "attacks")
    except (FileNotFoundError, ValueError):
        return None
    if description.get("identity") != wanted or record.get("config") != config.to_json():
        return None
    if set(attacked) != set(config.attacks):
        return None
    return Measured({**record, "checkpoint": path}, measurements)
