"""Training, measuring and attacking: one run, and a grid of runs with the results.json that sums them up."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cem_fast import attacks, bounds, data, defenses, metrics, training
from cem_fast._support.files import write_atomically
from cem_fast._support.lookup import lookup
from cem_fast._support.ranks import Ranks
from cem_fast._support.seeding import seeded
from cem_fast.attacks.base import Attack, Observe
from cem_fast.config import LATER, GridConfig, RunConfig
from cem_fast.data import Part, Splits
from cem_fast.defenses import Defense
from cem_fast.experiments import gains, provenance, saved_run
from cem_fast.experiments.gains import Measured
from cem_fast.loss import CEMLoss
from cem_fast.metrics import recognition
from cem_fast.models.split import SplitModel
from cem_fast.schedule import CEMSchedule
from cem_fast.training import resume as snapshot
from cem_fast.training.resume import Snapshot

RESULTS = "results.json"
RUNS = "runs"
MARK = f'{{\n "schema": {saved_run.SCHEMA},\n "command": '.encode()  # what the results.json of a grid begins with
NUM_PICTURES = 6
NUM_WATCHED = 12  # epochs of a training run after which accuracy and leakage are measured for the curves of the report
LEAKAGE_COMPONENTS = 5  # of every class, in the mixture that leakage is estimated with

Watcher = Callable[[str, int, int], None]  # stage, steps done, steps in all


class Watch:
    """Hears how a grid goes on; the base class keeps quiet."""

    def started(self, index: int, total: int, config: RunConfig) -> None:
        """Run ``index`` (from 0) of ``total`` starts."""

    def stage(self, index: int, name: str, done: int, total: int) -> None:
        """Run ``index`` has done ``done`` of ``total`` steps of a stage."""

    def finished(self, index: int, total: int, config: RunConfig, record: dict[str, Any], *, reused: bool) -> None:
        """Run ``index`` of ``total`` has a result, found on disk if ``reused``."""

    def failed(self, index: int, total: int, config: RunConfig, reason: str, *, again: bool) -> None:
        """Run ``index`` of ``total`` has ended without a result; it is tried once more now if ``again``."""


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
        saved_run.build_parts(config, image_shape=splits.image_shape, num_classes=splits.num_classes)
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
    saved_run.check_target(folder, {RESULTS: MARK, **runs})
    saved_run.check_target(Path(folder) / RUNS, {})
    path, planned = Path(folder) / RESULTS, [config.to_json() for config in plan]
    try:
        held = [record["config"] for record in json.loads(path.read_bytes())["runs"]]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # nothing there, or nothing that can be read any more
        return
    if others := sum({**LATER, **config} not in planned for config in held):
        raise ValueError(
            f"{path} holds the results of {others} runs that this grid does not plan: give it a --name or --folder of its own"
        )


def check_run_folder(folder: str | Path, config: RunConfig) -> None:
    """Raises before anything is trained if a single run cannot go to a folder, or would take the place of another.

    Args:
        folder: where the run is to go; it need not exist.
        config: its settings.

    Raises:
        ValueError: the folder cannot be written to, or holds somebody else's files or a run of other settings, finished or interrupted.
    """
    saved_run.check_target(folder, {saved_run.DESCRIPTION: saved_run.MARK})
    wanted, held = config.to_json(), Snapshot(folder, {}).owner()
    with suppress(FileNotFoundError, ValueError):  # nothing there, or nothing that can be read any more
        held = saved_run.entry(Path(folder), saved_run.read_description(folder), dict, "config")
    held = {key: value for key, value in {**LATER, **held}.items() if key in wanted}
    if held != LATER and held != wanted:
        raise ValueError(
            f"{folder} holds a run of other settings, which would be lost: give this one a --folder of its own "
            f"({snapshot.difference(held, wanted)})"
        )


def is_finished(config: RunConfig, folder: str | Path) -> bool:
    """Whether a folder holds the finished run of these settings."""
    try:
        return {**LATER, **saved_run.read_description(folder)["config"]} == config.to_json()
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # nothing there, or nothing that can be read any more
        return False


def load_data(name_or_path: str, fold: int, image_size: int | None, protocol: str = "inference") -> Splits:
    """The splits of one fold, read once for the runs that share it; every seed sees the same split."""
    return _loaded(name_or_path, fold, image_size, protocol, data.data_root())


@lru_cache(maxsize=4)
def _loaded(name_or_path: str, fold: int, image_size: int | None, protocol: str, root: Path) -> Splits:
    return data.load(name_or_path, fold=fold, image_size=image_size, root=root).under(protocol)


def run(
    config: RunConfig,
    folder: str | Path,
    *,
    splits: Splits | None = None,
    device: str | torch.device = "cpu",
    attack: bool = True,
    on_stage: Watcher | None = None,
    resume: bool = False,
    process_group: Any = None,
) -> dict[str, Any] | None:
    """Trains one model, measures its accuracy and leakage, attacks it, and saves everything.

    Until then, the folder holds the training as it was after the latest epoch. Leakage is estimated with a mixture of five spherical
    components a class (fewer where a class has fewer images) for every run, whatever the mixture is that CEM trains with.

    Besides the weights, the folder gets per test image ``correct [T]`` (share of noise draws classified correctly) and ``correct.groups
    [T]`` (resampling unit), per victim ``mse.<attack> [N]`` and ``groups [N]``, and for a few victims, chosen by class before any attack,
    ``pictures.index [P]``, ``pictures.original``, ``pictures.class_mean`` and ``pictures.<attack>``, each ``[P, C, H, W]``.

    Args:
        config: every setting.
        folder: where to save the run.
        splits: the images; None loads ``config.data``.
        device: where to compute.
        attack: whether to run ``config.attacks``.
        on_stage: hears the stage, the steps done and the steps in all.
        resume: whether to go on from the training in the folder, if there is one; the result has the bits of an undisturbed run on as many
            threads and processes, but for ``seconds``, which do not count what came before.
        process_group: torch.distributed group of processes that train together, each called with the same arguments; only the first
            one measures, attacks and writes. None for a single process.

    Returns:
        The run's entry in results.json, but for ``checkpoint``; None from all processes but the first.

    Raises:
        FileNotFoundError: the data set is missing.
        ValueError: a setting does not fit, the folder cannot be written to, or the training in it is damaged or another one; nothing was
            trained.
    """
    on_stage = on_stage or partial(Watch().stage, 0)
    ranks = Ranks(process_group)
    if not ranks.rank:
        saved_run.check_target(folder, {saved_run.DESCRIPTION: saved_run.MARK})
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    if splits is None:
        splits = load_data(config.data, config.fold, config.image_size, config.protocol)
    splits = splits.under(config.protocol)
    if len(splits.test) < 2:
        raise ValueError(f"the test part must hold at least 2 images, got {len(splits.test)}")
    torch.manual_seed(config.seed)
    model, defense, loss = saved_run.build_parts(
        config, image_shape=splits.image_shape, num_classes=splits.num_classes, process_group=process_group
    )
    for module in (model, defense, loss):
        if module is not None:
            module.to(device)

    with _timed(seconds, "train"):
        curves = _Curves(config, model, defense, splits, on_stage)
        schedule = CEMSchedule(config.cem_weight, kind=config.cem_schedule)
        cem = {"cem": loss, "schedule": schedule} if config.cem_weight > 0 else {}
        history = training.train(
            model,
            splits,
            defense,
            config=config,
            **cem,
            on_epoch=curves,
            snapshot=_snapshot(config, folder, splits, ranks=ranks, beside=curves.points, resume=resume),
            process_group=process_group,
        )
    if ranks.rank:
        return None
    defense.eval()

    on_stage("measuring", 0, 2)
    with _timed(seconds, "accuracy"):
        correct = training.correctness(model, defense, splits.test, draws=config.noise_draws, seed=config.seed)
    on_stage("measuring", 1, 2)
    with _timed(seconds, "leakage"):
        # Fitted from scratch, with CEM or without: training's own mixture has a head start and belongs to an earlier encoder.
        loss = _fitted(saved_run.build_loss(config, num_classes=splits.num_classes), config, model, defense, splits)
        leakage = _leakage(_measuring(config, model, defense, splits), model, defense, splits, seed=config.seed)

    victims = splits.victims
    measurements = {"correct": correct, "correct.groups": splits.test.groups.clone(), "groups": victims.groups}
    attacked = {}
    if attack:
        chosen = choose_pictures(victims)
        measurements |= {
            "pictures.index": chosen,
            "pictures.original": victims.images[chosen],
            "pictures.class_mean": data.class_means(splits)[victims.labels[chosen]],
        }
        observe = training.observer(model, defense)
        for name in config.attacks:
            with _timed(seconds, f"attack_{name}"):
                attacked[name], errors, rebuilt = attack_model(
                    name, model, defense, splits, config, observe=observe, on_stage=on_stage
                )
            measurements |= {f"mse.{name}": errors, f"pictures.{name}": rebuilt[chosen]}
    seconds["total"] = time.perf_counter() - started

    record = {
        "data": splits.name,
        "protocol": config.protocol,
        "model": config.model,
        "cut": config.cut,
        "defense": config.defense,
        "cem": config.cem_weight > 0,
        "config": config.to_json(),
        "seed": config.seed,
        "fold": config.fold,
        "accuracy": _mean(correct),
        "num_test": len(splits.test),
        "attacks": attacked,
        "leakage": leakage,
        "seconds": {stage: round(value, 3) for stage, value in seconds.items()},
    }
    saved_run.save_run(
        folder,
        config=config,
        model=model,
        defense=defense,
        loss=loss,
        measurements=measurements,
        description={
            "image_shape": list(splits.image_shape),
            "num_classes": splits.num_classes,
            "data": {
                "name": splits.name,
                "credit": splits.credit,
                "unit": splits.unit,
                "num_train": len(splits.train),
                "num_attacker": len(splits.attacker),
                "num_victims": len(victims),
                "num_leaked": splits.num_leaked,
            },
            "baseline": data.baselines(splits),
            "recognition": {
                "clean": _recognizer(splits).rate(victims.images, victims.labels),
                "chance": recognition.chance(victims.labels),
            },
            "identity": identity(splits),
            "history": [entry.to_json() for entry in history],
            "curves": curves.points,
            "record": record,
        },
    )
    return record


def run_cell(
    config: RunConfig, folder: Path, *, device: str | torch.device, fresh: bool, on_stage: Watcher
) -> dict[str, Any] | None:
    """Does one run of a grid, from where it was interrupted if this code left it so, with these images; from the start if ``fresh``."""
    splits = load_data(config.data, config.fold, config.image_size, config.protocol)
    resume = not fresh and _snapshot(config, folder, splits, ranks=Ranks(), beside=[], resume=True).fits()
    return run(config, folder, device=device, on_stage=on_stage, resume=resume)


def reason(error: Exception) -> str:
    """Why a run has failed, in one line.

    Raises:
        OSError: the error itself if it is one: whatever keeps results from being written would meet every other run as well.
    """
    if isinstance(error, OSError):
        raise error
    return " ".join(str(error).split()) or type(error).__name__


def attack_model(
    name: str,
    model: SplitModel,
    defense: Defense,
    splits: Splits,
    config: RunConfig,
    *,
    observe: Observe | None = None,
    on_stage: Watcher | None = None,
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Attacks a trained model once, and once more with half the budget where the attack has one.

    Args:
        name: one of ``attacks.names()``.
        model: the trained network, in eval mode.
        defense: its defense, in eval mode.
        splits: the images; the attack learns from ``splits.attacker`` and is measured on ``splits.victims``.
        config: the settings that begin with ``attack_``, and ``seed``, are used.
        observe: the network's observer; attacks that are given the same one share the networks that they start from.
        on_stage: hears the stage, the steps done and the steps in all.

    Returns:
        The attack's entry in results.json, its error on every victim ``[N]`` and what it rebuilt ``[N, C, H, W]``.
    """
    on_stage = on_stage or partial(Watch().stage, 0)
    observe = observe or training.observer(model, defense)
    truth = splits.victims.images
    full = build_attack(name, config, splits)
    half = full.half_budget()
    on_stage(f"attack: {name}", 0, 3)
    rebuilt = _invert(full, observe, splits, model.device, seed=config.seed)
    on_stage(f"attack: {name}", 2, 3)
    at_half = None
    if half is not None:
        at_half = _mean(metrics.mse(_invert(half, observe, splits, model.device, seed=config.seed), truth))
    on_stage(f"attack: {name}", 3, 3)
    errors = metrics.mse(rebuilt, truth)
    entry = {
        "mse": _mean(errors),
        "psnr": _mean(metrics.psnr(rebuilt, truth)),
        "ssim": _mean(metrics.ssim(rebuilt, truth)),
        "ssim_paper": _mean(metrics.ssim_paper(rebuilt, truth)),
        "recognized": _recognizer(splits).rate(rebuilt, splits.victims.labels),
        "mse_half_budget": at_half,
        "knowledge": full.knowledge,
        "budget": full.budget,
    }
    return entry, errors, rebuilt


def build_attack(name: str, config: RunConfig, splits: Splits) -> Attack:
    """Builds an attack, not yet fitted, from a run's settings.

    Args:
        name: one of ``attacks.names()``.
        config: the settings that begin with ``attack_``, and ``seed``, are used.
        splits: the images that it is to be fitted to.

    Raises:
        ValueError: a name is unknown, or a setting is out of range.
    """
    return attacks.build(
        name,
        image_shape=splits.image_shape,
        epochs=config.attack_epochs,
        decoder=config.attack_decoder,
        seed=config.seed,
        dropout=config.attack_dropout,
        loss=config.attack_loss,
        batch_size=config.attack_batch_size,
        gan_epochs=config.attack_gan_epochs,
        steps=config.attack_steps,
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
        config: identity(load_data(config.data, config.fold, config.image_size, config.protocol)) for config in plan
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
        from cem_fast.experiments import workers  # here, because the workers run what this module defines

        yield from workers.run_all(tasks, jobs=jobs, device=device, fresh=fresh)
        return
    for index, config, path in tasks:
        yield "started", index, ()
        try:
            run_cell(config, path, device=device, fresh=fresh, on_stage=partial(watch.stage, index))
        except Exception as error:
            yield "failed", index, (reason(error),)
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


def load_runs(folder: str | Path, results: dict[str, Any]) -> list[Measured]:
    """The runs of a results.json together with what they measured per image.

    Args:
        folder: the folder of results.json.
        results: its content.
    """
    return [Measured(r, saved_run.read_measurements(Path(folder) / r["checkpoint"])) for r in results["runs"]]


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


def identity(splits: Splits) -> dict[str, str]:
    """What a result depends on besides its settings: the version, the code and the images."""
    return {
        "version": provenance.package_version(),
        "code": provenance.source_digest(),
        "images": splits.digest(),
    }


def choose_pictures(part: Part, count: int = NUM_PICTURES) -> Tensor:
    """Indices ``[P]`` of the images to show: the first of each of ``count`` evenly spaced classes, further ones where classes are few."""
    rank = torch.zeros_like(part.labels)
    for label in part.labels.unique():
        of_class = part.labels == label
        rank[of_class] = torch.arange(int(of_class.sum()))
    order = sorted(range(len(part)), key=lambda i: (int(rank[i]), int(part.labels[i])))
    firsts = [i for i in order if rank[i] == 0]
    if len(firsts) > count:
        order = [firsts[round(k * (len(firsts) - 1) / (count - 1))] for k in range(count)]
    return torch.tensor(order[:count])


def _snapshot(
    config: RunConfig,
    folder: str | Path,
    splits: Splits,
    *,
    ranks: Ranks,
    beside: list[dict[str, Any]],
    resume: bool,
) -> Snapshot:
    """The place in a run's folder where its training is kept until it is finished."""
    depends_on = {**config.to_json(), **identity(splits), "processes": ranks.count}
    return Snapshot(folder, depends_on, resume=resume, beside=beside)


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


class _Curves:
    """Measures accuracy and leakage a dozen times during training, for the curves of the report and for nothing else."""

    def __init__(self, config: RunConfig, model: SplitModel, defense: Defense, splits: Splits, on_stage: Watcher):
        self.config, self.model, self.defense, self.splits, self.on_stage = config, model, defense, splits, on_stage
        self.every = max(1, config.epochs // NUM_WATCHED)
        self.points: list[dict[str, Any]] = []
        on_stage("training", 0, config.epochs)

    def __call__(self, entry: training.Epoch) -> None:
        epoch = entry.epoch
        self.on_stage("training", epoch, self.config.epochs)
        if epoch % self.every and epoch != self.config.epochs:
            return
        correct = training.correctness(self.model, self.defense, self.splits.test, draws=1, seed=self.config.seed)
        loss, plugin = _measuring(self.config, self.model, self.defense, self.splits), None
        if loss is not None:
            plugin = float(bounds.plugin_information(loss.mixture, self.defense.noise_std))
        self.points.append({"epoch": epoch, "accuracy": _mean(correct), "plugin_nats": plugin})


def _fitted(
    loss: CEMLoss | None, config: RunConfig, model: SplitModel, defense: Defense, splits: Splits
) -> CEMLoss | None:
    """The loss, its mixture fitted to what training images release before the noise; None stays None."""
    if loss is not None:
        with seeded(config.seed):
            sent = _before_noise(model, defense, splits.train.images)
            labels = splits.train.labels.to(model.device) if loss.mixture.num_classes > 1 else None
            loss.to(model.device).fit(sent, labels)
    return loss


def _measuring(config: RunConfig, model: SplitModel, defense: Defense, splits: Splits) -> CEMLoss | None:
    """A loss with the mixture that leakage is estimated with: of the same kind for every run, so that runs can be compared."""
    fewest = int(torch.bincount(splits.train.labels, minlength=splits.num_classes).min())
    components = min(LEAKAGE_COMPONENTS, max(1, fewest))
    kind = dict(cem_by_class=True, cem_components=components, cem_covariance="spherical", cem_variant="paper")
    loss = saved_run.build_loss(replace(config, **kind), num_classes=splits.num_classes)
    return _fitted(loss, config, model, defense, splits)


@torch.no_grad()
def _before_noise(model: SplitModel, defense: Defense, images: Tensor) -> Tensor:
    """What a defense adds its Gaussian noise to, ``[N, ...]``: the noise hides this, whatever has already been done to it."""
    return defense.before_noise(training.clean_features(model, images))


def _leakage(
    loss: CEMLoss | None, model: SplitModel, defense: Defense, splits: Splits, *, seed: int
) -> dict[str, float | None]:
    """Estimates of the information in released features; None where they leave without noise, since then no bound is finite."""
    if loss is None:
        return dict.fromkeys(("plugin_nats", "heldout_nats", "heldout_se"))
    with seeded(seed, "leakage"):
        sent = _before_noise(model, defense, splits.test.images)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    estimate, error = bounds.heldout_information(loss.mixture, sent, defense.noise_std, generator=generator)
    return {
        "plugin_nats": float(bounds.plugin_information(loss.mixture, defense.noise_std)),
        "heldout_nats": float(estimate),
        "heldout_se": float(error),
    }


@lru_cache(maxsize=1)
def _recognizer(splits: Splits) -> recognition.Recognizer:
    """What names the people of reconstructions, fitted once for all attacks on the same images."""
    return recognition.Recognizer(splits.attacker.images, splits.attacker.labels)


def _invert(attack: Attack, observe: Observe, splits: Splits, device: torch.device, *, seed: int) -> Tensor:
    """What an attack rebuilds of its victims, each seen once with one draw of the noise."""
    known, secret = splits.attacker, splits.victims.images.to(device)
    with seeded(seed):
        attack.fit(observe, known.images.to(device), known.labels.to(device))
        return attack.reconstruct(observe(secret)).detach().cpu()


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


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - start


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
