"""Trials on one fold under cheap attacks; the best of them on another fold under all attacks. No other fold is tested on."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from cem_fast import cost
from cem_fast._support import optional, typed_json
from cem_fast._support.counts import require_count, require_number
from cem_fast._support.files import check_target, write_atomically
from cem_fast.config import SEARCHED, RunConfig
from cem_fast.experiments import grid, results
from cem_fast.experiments.build import build_parts, load_data
from cem_fast.experiments.cluster import Cluster, joined
from cem_fast.experiments.records import Record
from cem_fast.experiments.watch import Watch
from cem_fast.tune import picture

if TYPE_CHECKING:
    import optuna

SEARCH, CONFIRMATION = 0, 3  # folds; the others are for reports
CHEAP = ("ridge", "kernel_ridge")  # attacks of the search
LEVELS = (0.0, 0.1, 0.2, 0.4, 0.7)  # of plain noise, the line to beat
BATCH = 4  # trials that are suggested together, whatever the number of jobs: suggestions depend on it
MOST_CONFIRMED = 5
TUNED, BEST, PICTURE = "tune.json", "best.yaml", "pareto.png"
MARK = b'{\n "schema": 1,\n "targets"'
BEST_MARK = b"# The best settings that cem-fast tune has confirmed.\n"
BOTTLENECKS = ("8", "D16", "D32", "D48", "D64", "D64P2", "D64R16", "D64G4")
WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 1.0)


@dataclass(frozen=True)
class Targets:
    """What the settings have to meet.

    Args:
        max_accuracy_loss: accuracy that may be lost against the most accurate level of plain noise, in [0, 1].
        min_mse: least error of the strongest attack.
        max_bytes: most bytes of a message; None for any.
        max_device_macs: most multiplications of the device for an image; None for any.

    Raises:
        TypeError: a value is no number, or no integer.
        ValueError: a value is out of range.

    Example:
        >>> from cem_fast.tune import Targets
        >>> Targets(max_accuracy_loss=0.02).max_bytes is None
        True
    """

    max_accuracy_loss: float = 0.01
    min_mse: float = 0.0
    max_bytes: int | None = None
    max_device_macs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= require_number("max_accuracy_loss", self.max_accuracy_loss) <= 1:
            raise ValueError(f"max_accuracy_loss must be in [0, 1], got {self.max_accuracy_loss}")
        if not 0 <= require_number("min_mse", self.min_mse) < math.inf:
            raise ValueError(f"min_mse must be at least 0, got {self.min_mse}")
        for key in ("max_bytes", "max_device_macs"):
            if getattr(self, key) is not None:
                require_count(key, getattr(self, key))


@dataclass(frozen=True)
class Trial:
    """One point of the search.

    Attributes:
        config: every setting.
        state: ``done``, ``failed``, ``over budget`` (more bytes or multiplications than allowed) or ``invalid`` (no such network).
        message_bytes: bytes of a message; None for an invalid network.
        device_macs: multiplications of the device for an image; None for an invalid network.
        accuracy: accuracy; None for a trial that is not done.
        mse: error of its strongest attack; None for a trial that is not done.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.tune import Trial
        >>> Trial(RunConfig(), "over budget", message_bytes=2048, device_macs=10).mse is None
        True
    """

    config: RunConfig
    state: str
    message_bytes: int | None = None
    device_macs: int | None = None
    accuracy: float | None = None
    mse: float | None = None


@dataclass(frozen=True)
class Tuned:
    """Content of tune.json.

    Attributes:
        targets: what was asked for.
        config: the settings that are not searched.
        plain: plain noise on the fold of the search.
        trials: the trials on that fold, in order.
        confirmed_plain: plain noise on the fold of the confirmation.
        confirmed: the best trials on that fold, under all attacks.
        best: index of the one among ``confirmed`` with the greatest error that meets the targets; None if none does.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.tune import Targets, Tuned
        >>> Tuned(Targets(), RunConfig(), (), (), (), (), best=None).best is None
        True
    """

    targets: Targets
    config: RunConfig
    plain: tuple[Trial, ...]
    trials: tuple[Trial, ...]
    confirmed_plain: tuple[Trial, ...] = ()
    confirmed: tuple[Trial, ...] = ()
    best: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the document, which starts with its schema."""
        return {"schema": 1, **typed_json.write_fields(self)}


def tune(
    config: RunConfig,
    folder: str | Path,
    targets: Targets,
    *,
    trials: int = 60,
    device: str | torch.device = "cpu",
    jobs: int = 1,
    watch: Watch | None = None,
    cluster: Cluster | None = None,
) -> Tuned:
    """Searches bottleneck, noise, CEM and cut for the greatest error within a loss of accuracy.

    Fold 0 is searched under cheap attacks, by a multi-objective sampler of Optuna (accuracy against error). The Pareto set is trained again
    on fold 3 and attacked by ``config.attacks``. Plain noise is trained on both folds, as the line to beat. Of data with a fixed test
    part, these are folds of the training part. Every trial is a run in the folder. The same call again continues an interrupted search:
    suggestions depend on the earlier results alone, and finished runs are read from disk.

    Args:
        config: the settings that are not searched; its ``attacks`` confirm, its ``fold`` is that of ``best.yaml``, and ``cut`` is tried
            with one stage less and one more.
        folder: gets ``tune.json``, ``pareto.png``, ``best.yaml`` for ``cem-fast train --config``, and the runs.
        targets: what the settings have to meet.
        trials: number of trials.
        device: device to compute on.
        jobs: runs at a time.
        watch: callbacks for progress.
        cluster: the Ray cluster that does the runs; None for this machine.

    Returns:
        Content of tune.json.

    Raises:
        ImportError: optuna is not installed.
        ConnectionError: there is no such cluster.
        FileNotFoundError: the data set is missing.
        ValueError: a setting does not fit or is set by the search, or the folder holds other results.

    Source:
        Akiba et al., "Optuna: a next-generation hyperparameter optimization framework", KDD 2019; Ozaki et al., "Multiobjective
        tree-structured Parzen estimator", JAIR 2022.

    Example:
        >>> from cem_fast import tune
        >>> from cem_fast.config import RunConfig
        >>> tune.tune(RunConfig(), "runs/tune", tune.Targets(), trials=0)
        Traceback (most recent call last):
        ValueError: trials must be at least 1, got 0
    """
    require_count("trials", trials)
    for key in SEARCHED:
        if getattr(config, key) != getattr(RunConfig, key):
            raise ValueError(
                f"{key} must be {getattr(RunConfig, key)!r} here, since the search sets it, got {getattr(config, key)!r}"
            )
    splits = load_data(replace(config, fold=SEARCH))
    folder = Path(folder)
    check_target(folder, {TUNED: MARK, BEST: BEST_MARK, PICTURE: b"cem_fast"})
    shape = {"image_shape": splits.image_shape, "num_classes": splits.num_classes}
    runs = _Runs(folder, {"device": device, "jobs": jobs, "cluster": cluster}, watch or Watch(), shape)
    runs.plan = _held(folder, config)
    with joined(cluster) if cluster else nullcontext():  # once for all batches
        return _searched(config, folder, targets, trials, runs, validation=splits.fixed)


def varied(config: RunConfig) -> list[RunConfig]:
    """Settings that differ in everything that is searched: next to them, the name of a trial gives all of it.

    Args:
        config: the settings that are not searched.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.names import differing
        >>> from cem_fast.tune import search
        >>> differing(RunConfig(bottleneck="D32"), search.varied(RunConfig()), shown=["noise_std"])
        ['bottleneck = D32', 'cut = 2']
    """
    penalties = ((0.0, config.cem_components), (WEIGHTS[1], 1), (WEIGHTS[2], 2))
    networks = ((BOTTLENECKS[1], config.cut), (BOTTLENECKS[2], config.cut + 1))
    return [
        replace(config, defense="noise", bottleneck=bottleneck, cut=cut, cem_weight=weight, cem_components=components)
        for bottleneck, cut in networks
        for weight, components in penalties
    ]


def _searched(
    config: RunConfig, folder: Path, targets: Targets, trials: int, runs: _Runs, *, validation: bool
) -> Tuned:
    searched = replace(config, fold=SEARCH, validation=validation)
    cheap = replace(searched, attacks=CHEAP)
    plain = runs.done(_levels(cheap))
    study = _study(config)
    found: list[Trial] = []
    while len(found) < trials:
        _write(folder, Tuned(targets, config, tuple(plain), tuple(found)))
        asked = [study.ask() for _ in range(min(BATCH, trials - len(found)))]
        tried = runs.done([_suggested(trial, cheap) for trial in asked], targets)
        for trial, result in zip(asked, tried):
            _tell(study, trial, result)
        found += tried
    chosen = [
        replace(trial.config, fold=CONFIRMATION, attacks=config.attacks) for trial in _pareto(plain, found, targets)
    ]
    levels = _levels(replace(searched, fold=CONFIRMATION))
    made = runs.done([*levels, *chosen])  # together, so that no job waits; what is chosen is within the budget
    confirmed_plain, confirmed = made[: len(levels)], made[len(levels) :]
    best = _best(confirmed_plain, confirmed, targets)
    tuned = Tuned(targets, config, tuple(plain), tuple(found), tuple(confirmed_plain), tuple(confirmed), best)
    _write(folder, tuned)
    return tuned


def _held(folder: Path, config: RunConfig) -> list[RunConfig]:
    """The runs of an interrupted search in a folder."""
    if not (folder / TUNED).exists():
        return []
    document = typed_json.load_document(folder / TUNED, "a search of schema 1", schema=1)
    if document.get("config") != config.to_json():
        raise ValueError(f"{folder / TUNED} holds a search of other settings: give this one a --folder of its own")
    try:
        return [record.config for record in results.read(folder).runs]
    except FileNotFoundError:
        return []


class _Runs:
    """The runs of a search, in one grid that grows."""

    def __init__(self, folder: Path, place: dict[str, Any], watch: Watch, shape: dict[str, Any]):
        self.folder, self.place, self.watch, self.shape = folder, place, _New(watch), shape
        self.plan: list[RunConfig] = []

    def runs(self) -> list[RunConfig]:
        return self.plan

    def done(self, configs: Sequence[RunConfig], targets: Targets | None = None) -> list[Trial]:
        """The trials of these settings, trained unless they are on disk, invalid or over the budget."""
        trials = [self._costed(config, targets) for config in configs]
        self.plan += dict.fromkeys(t.config for t in trials if t.state == "done" and t.config not in self.plan)
        made = grid.evaluate(self, self.folder, watch=self.watch, **self.place)
        records: dict[RunConfig, Record] = {record.config: record for record in made.runs}
        return [_measured(trial, records.get(trial.config)) for trial in trials]

    def _costed(self, config: RunConfig, targets: Targets | None) -> Trial:
        try:
            model, _, _ = build_parts(config, **self.shape)
        except ValueError:  # a cut that the network lacks, or a pool that does not divide its features
            return Trial(config, "invalid")
        sent = cost.message_bytes(model, self.shape["image_shape"])
        macs = cost.measure(model, torch.zeros(1, *self.shape["image_shape"]), passes=1)["encoder"].macs
        over = targets is not None and (
            (targets.max_bytes is not None and sent > targets.max_bytes)
            or (targets.max_device_macs is not None and macs > targets.max_device_macs)
        )
        return Trial(config, "over budget" if over else "done", sent, macs)


class _New(Watch):
    """Shows what is trained, and not what an earlier batch has trained."""

    def __init__(self, watch: Watch):
        self.watch = watch

    def started(self, index: int, total: int, config: RunConfig) -> None:
        self.watch.started(index, total, config)

    def stage(self, index: int, name: str, done: int, total: int) -> None:
        self.watch.stage(index, name, done, total)

    def repeated(self, index: int, total: int, config: RunConfig, reason: str) -> None:
        self.watch.repeated(index, total, config, reason)

    def failed(self, index: int, total: int, config: RunConfig, reason: str, *, again: bool) -> None:
        self.watch.failed(index, total, config, reason, again=again)

    def finished(self, index: int, total: int, config: RunConfig, record: Record, *, reused: bool) -> None:
        if not reused:
            self.watch.finished(index, total, config, record, reused=False)


def _levels(config: RunConfig) -> list[RunConfig]:
    """Plain noise on the paper's bottleneck."""
    shared = replace(config, bottleneck=8, cem_weight=0.0, train_noise_std=None)
    return [replace(shared, defense="noise" if level else "bottleneck", noise_std=level) for level in LEVELS]


def _study(config: RunConfig) -> optuna.Study:
    optuna = optional.load("optuna", "cem-fast tune", "optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=config.seed, n_startup_trials=2 * BATCH)
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=sampler)
    # a first guess, so that the search ends no worse
    study.enqueue_trial({"bottleneck": "D64", "noise_std": 0.1, "cem_weight": 0.0, "cut": config.cut})
    return study


def _suggested(trial: optuna.Trial, config: RunConfig) -> RunConfig:
    bottleneck = trial.suggest_categorical("bottleneck", BOTTLENECKS)
    settings: dict[str, Any] = {
        "bottleneck": int(bottleneck) if bottleneck.isdecimal() else bottleneck,
        "noise_std": round(trial.suggest_float("noise_std", 0.05, 0.5, log=True), 3),
        "cem_weight": trial.suggest_categorical("cem_weight", WEIGHTS) if config.epochs > 1 else 0.0,
        "cut": trial.suggest_int("cut", max(1, config.cut - 1), config.cut + 1),
    }
    if settings["cem_weight"]:
        settings["cem_components"] = trial.suggest_int("cem_components", 1, 3)
    return replace(config, defense="noise", **settings)


def _tell(study: optuna.Study, trial: optuna.Trial, result: Trial) -> None:
    from optuna.trial import TrialState

    if result.state == "done":
        study.tell(trial, [float(result.accuracy or 0), float(result.mse or 0)])
    else:
        study.tell(trial, state=TrialState.FAIL)


def _measured(trial: Trial, record: Record | None) -> Trial:
    if trial.state != "done":
        return trial
    if record is None or record.strongest is None:
        return replace(trial, state="failed")
    return replace(trial, accuracy=record.accuracy, mse=record.attacks[record.strongest].mse)


def _needed(plain: Sequence[Trial], targets: Targets) -> float:
    """Accuracy that the targets ask for."""
    return (
        max((trial.accuracy for trial in plain if trial.accuracy is not None), default=0.0) - targets.max_accuracy_loss
    )


def _pareto(plain: Sequence[Trial], trials: Sequence[Trial], targets: Targets) -> list[Trial]:
    """The trials that none is better than in accuracy and error: those that are accurate enough first, then by their error."""
    best: list[tuple[float, float, Trial]] = []
    points = {t.config: (t.accuracy, t.mse, t) for t in trials if t.accuracy is not None and t.mse is not None}
    for accuracy, mse, trial in sorted(points.values(), key=lambda point: (-point[0], -point[1])):
        if not best or mse > best[-1][1]:
            best.append((accuracy, mse, trial))
    needed = _needed(plain, targets)
    best.sort(key=lambda point: (point[0] < needed, -point[1]))
    return [trial for _, _, trial in best[:MOST_CONFIRMED]]


def _best(plain: Sequence[Trial], trials: Sequence[Trial], targets: Targets) -> int | None:
    needed = _needed(plain, targets)
    meeting = [
        (trial.mse, -index)
        for index, trial in enumerate(trials)
        if trial.accuracy is not None
        and trial.mse is not None
        and trial.accuracy >= needed
        and trial.mse >= targets.min_mse
    ]
    return -max(meeting)[1] if meeting else None


def _write(folder: Path, tuned: Tuned) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if tuned.best is not None:
        best = replace(tuned.confirmed[tuned.best].config, fold=tuned.config.fold, validation=False)
        shown = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(best).items()}
        write_atomically(folder / BEST, BEST_MARK + yaml.safe_dump(shown, sort_keys=False).encode())
    else:
        (folder / BEST).unlink(missing_ok=True)
    write_atomically(folder / PICTURE, picture.draw(tuned))
    write_atomically(folder / TUNED, (json.dumps(tuned.to_json(), indent=1, allow_nan=False) + "\n").encode())
