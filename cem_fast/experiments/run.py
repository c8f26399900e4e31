"""One run: train a model, measure it, attack it, save it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cem_fast import bounds, data, training
from cem_fast._support.files import check_target
from cem_fast._support.ranks import Ranks
from cem_fast.config import LATER, SEEDED, UNWRITTEN, RunConfig
from cem_fast.data import Splits
from cem_fast.defenses import Defense
from cem_fast.experiments import leakage, provenance, saved_run
from cem_fast.experiments.attack import attack_model, choose_pictures, in_memory, infer, recognizer
from cem_fast.experiments.build import build_loss, build_parts, load_data
from cem_fast.experiments.records import (
    Baseline,
    Description,
    Images,
    Leakage,
    Outcome,
    Point,
    Recognition,
    Record,
)
from cem_fast.experiments.watch import Watcher, ignore
from cem_fast.loss import CEMLoss
from cem_fast.metrics import recognition
from cem_fast.metrics.recognition import Rate
from cem_fast.models.split import SplitModel
from cem_fast.schedule import CEMSchedule
from cem_fast.training.resume import Snapshot, difference

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

NUM_WATCHED = 12  # epochs after which accuracy and leakage are measured for the curves of the report


def run(
    config: RunConfig,
    folder: str | Path,
    *,
    splits: Splits | None = None,
    device: str | torch.device = "cpu",
    attack: bool = True,
    on_stage: Watcher = ignore,
    resume: bool = False,
    process_group: ProcessGroup | None = None,
) -> Record | None:
    """Trains one model, measures its accuracy and leakage, attacks it, and saves everything.

    During training, the folder holds a snapshot of the latest epoch. For leakage, see
    :func:`cem_fast.experiments.leakage.fitted_mixture`. Next to the weights, the folder gets these tensors:

    - per test image ``correct [T]`` (share of noise draws classified correctly) and ``correct.groups [T]`` (resampling unit);
    - per victim ``mse.<attack> [N]`` and ``groups [N]``;
    - for a few victims, chosen by class before any attack, ``pictures.index [P]``, ``pictures.original``, ``pictures.class_mean`` and
      ``pictures.<attack>``, each ``[P, C, H, W]``.

    Args:
        config: every setting.
        folder: where to save the run.
        splits: the images; None loads ``config.data``.
        device: device to compute on.
        attack: whether to run ``config.attacks``.
        on_stage: called with the stage, the steps done and the steps in total.
        resume: whether to continue the training in the folder, if there is one. The result has the same bits as an uninterrupted run on
            as many threads and processes, except ``seconds``, which exclude the time before the interruption.
        process_group: torch.distributed group of processes that train together, each called with the same arguments. Only the first
            one measures, attacks and writes. None for a single process.

    Returns:
        The results; None in all processes but the first.

    Raises:
        FileNotFoundError: the data set is missing.
        ValueError: before training: a setting does not fit, the folder cannot be written to, the training in it is damaged or belongs
            to other settings, or secure draws are to be attacked.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments.run import run
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0, epochs=1, attacks=("ridge",))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     record = run(config, folder, splits=splits)
        >>> record.num_test, list(record.attacks)
        (8, ['ridge'])
    """
    if attack:
        require_seeded(config)
    ranks, clock = Ranks(process_group), _Clock()
    if not ranks.rank:
        check_target(folder, {saved_run.DESCRIPTION: saved_run.MARK})
    splits = _images(config, splits)
    torch.manual_seed(config.seed)
    model, defense, loss = build_parts(
        config, image_shape=splits.image_shape, num_classes=splits.num_classes, process_group=process_group
    )
    for module in (model, defense, loss):
        if module is not None:
            module.to(device)
    curves = _Curves(config, model, defense, splits, on_stage)
    with clock.timed("train"):
        history = training.train(
            model,
            splits,
            defense,
            config=config,
            cem=loss if config.cem_weight > 0 else None,
            schedule=CEMSchedule(config.cem_weight, kind=config.cem_schedule) if config.cem_weight > 0 else None,
            on_epoch=curves,
            snapshot=_snapshot(config, folder, splits, ranks=ranks, beside=curves.points, resume=resume),
            process_group=process_group,
        )
    if ranks.rank:
        return None
    defense.eval()
    loss, measured, correct = _measure(config, model, defense, splits, clock, on_stage)
    attacked: dict[str, Outcome] = {}
    inferred: dict[str, Rate] = {}
    drawn, draws = in_memory(splits, model)
    measurements = {"correct": correct, "correct.groups": splits.test.groups.clone(), "groups": drawn.victims.groups}
    if attack:
        attacked, found = _attack(config, model, defense, drawn, draws, clock, on_stage)
        measurements |= found
        with clock.timed("inference"):
            inferred = infer(model, defense, drawn, seed=config.seed, on_stage=on_stage)
    record = Record(
        data=splits.name,
        config=config,
        accuracy=_mean(correct),
        num_test=len(splits.test),
        attacks=attacked,
        leakage=measured,
        seconds=clock.rounded(),
        inferred=inferred,
    )
    saved_run.save_run(
        folder,
        model=model,
        defense=defense,
        loss=loss,
        measurements=measurements,
        description=_describe(splits, drawn, record, history, curves.points),
    )
    return record


def run_cell(
    config: RunConfig, folder: Path, *, device: str | torch.device, fresh: bool, on_stage: Watcher
) -> Record | None:
    """Does one run of a grid, continuing an interrupted one of the same settings, images and code.

    Args:
        config: every setting.
        folder: where to save the run.
        device: device to compute on.
        fresh: whether to start over instead of continuing.
        on_stage: called with the stage, the steps done and the steps in total.

    Returns:
        The results.

    Raises:
        FileNotFoundError: the data set is missing.
        ValueError: a setting does not fit, or the folder cannot be written to.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from PIL import Image
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import run, watch
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for i in range(20):
        ...         (Path(root) / "images" / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        ...         pixels = np.full((16, 16), 10 * i, dtype=np.uint8)
        ...         Image.fromarray(pixels).save(Path(root) / "images" / f"class{i % 2}" / f"{i}.png")
        ...     config = RunConfig(data=f"{root}/images", defense="bottleneck", noise_std=0.0, epochs=1, attacks=("nearest",))
        ...     record = run.run_cell(config, Path(root) / "run", device="cpu", fresh=True, on_stage=watch.ignore)
        >>> list(record.attacks)
        ['nearest']
    """
    splits = load_data(config)
    resume = not fresh and _snapshot(config, folder, splits, ranks=Ranks(), beside=[], resume=True).fits()
    return run(config, folder, device=device, on_stage=on_stage, resume=resume)


def require_seeded(config: RunConfig) -> None:
    """Fails for settings with secure draws, which no seed repeats.

    Args:
        config: settings of a run to evaluate.

    Raises:
        ValueError: ``secure`` is set.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.run import require_seeded
        >>> require_seeded(RunConfig(secure=True))
        Traceback (most recent call last):
        ValueError: secure must be False here, since evaluations repeat their draws from a seed
    """
    if config.secure:
        raise ValueError(f"secure must be False here, {SEEDED}")


def is_finished(config: RunConfig, folder: str | Path) -> bool:
    """Whether a folder holds the finished run of these settings.

    Args:
        config: every setting.
        folder: folder of the run; it need not exist.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import run
        >>> run.is_finished(RunConfig(), "runs/none")
        False
    """
    try:
        return saved_run.read_description(folder).config == config
    except (FileNotFoundError, ValueError):  # absent or unreadable
        return False


def check_run_folder(folder: str | Path, config: RunConfig) -> None:
    """Fails early if a single run could not be saved to a folder, or would replace another run.

    Args:
        folder: where the run will be saved; it need not exist.
        config: its settings.

    Raises:
        ValueError: the folder cannot be written to, or holds another program's ``run.json`` or a run of other settings, finished or
            interrupted.

    Example:
        >>> import tempfile
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import run
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run.check_run_folder(folder, RunConfig())
    """
    check_target(folder, {saved_run.DESCRIPTION: saved_run.MARK})
    wanted, held = config.to_json(), Snapshot(folder, {}).owner()
    with suppress(FileNotFoundError, ValueError):  # absent or unreadable
        held = saved_run.read_settings(folder)
    held = {key: value for key, value in {**LATER, **held}.items() if key in {**wanted, **UNWRITTEN}}
    if held != LATER and held != wanted:
        raise ValueError(
            f"{folder} holds a run of other settings, which would be lost: give this one a --folder of its own "
            f"({difference(held, wanted)})"
        )


@dataclass
class _Clock:
    """Seconds spent in every stage of a run."""

    seconds: dict[str, float] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - start

    def rounded(self) -> dict[str, float]:
        """Milliseconds precision, with the ``total`` since the run started."""
        seconds = {**self.seconds, "total": time.perf_counter() - self.started}
        return {stage: round(value, 3) for stage, value in seconds.items()}


class _Curves:
    """Accuracy and leakage a dozen times during training, for the curves of the report only."""

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
        loss, plugin = leakage.fitted_mixture(self.config, self.model, self.defense, self.splits), None
        if loss is not None:
            plugin = float(bounds.plugin_information(loss.mixture, self.defense.noise_std))
        self.points.append({"epoch": epoch, "accuracy": _mean(correct), "plugin_nats": plugin})


def _images(config: RunConfig, splits: Splits | None) -> Splits:
    """The images of a run under its protocol, loaded unless given."""
    if splits is None:
        splits = load_data(config)
    splits = splits.under(config.protocol)
    if len(splits.test) < 2:
        raise ValueError(f"the test part must hold at least 2 images, got {len(splits.test)}")
    return splits


def _snapshot(
    config: RunConfig,
    folder: str | Path,
    splits: Splits,
    *,
    ranks: Ranks,
    beside: list[dict[str, Any]],
    resume: bool,
) -> Snapshot:
    """The training in progress, kept in the run's folder until the run is finished."""
    depends_on = {**config.to_json(), **asdict(provenance.identity(splits)), "processes": ranks.count}
    return Snapshot(folder, depends_on, resume=resume, beside=beside)


def _measure(
    config: RunConfig, model: SplitModel, defense: Defense, splits: Splits, clock: _Clock, on_stage: Watcher
) -> tuple[CEMLoss | None, Leakage, Tensor]:
    """The refitted CEM loss, the leakage, and per test image the share of noise draws classified correctly."""
    on_stage("measuring", 0, 2)
    with clock.timed("accuracy"):
        correct = training.correctness(model, defense, splits.test, draws=config.noise_draws, seed=config.seed)
    on_stage("measuring", 1, 2)
    with clock.timed("leakage"):
        # Refitted from scratch, with or without CEM: the mixture of the training has a head start and fits an earlier encoder.
        loss = leakage.fit(build_loss(config, num_classes=splits.num_classes), config, model, defense, splits)
        mixture = leakage.fitted_mixture(config, model, defense, splits)
        found = leakage.estimate(mixture, model, defense, splits, seed=config.seed)
    return loss, found, correct


def _attack(
    config: RunConfig,
    model: SplitModel,
    defense: Defense,
    splits: Splits,
    draws: int | None,
    clock: _Clock,
    on_stage: Watcher,
) -> tuple[dict[str, Outcome], dict[str, Tensor]]:
    """The outcome of every attack, their errors per victim, and a few pictures."""
    victims = splits.victims
    outcomes: dict[str, Outcome] = {}
    chosen = choose_pictures(victims)
    measurements = {
        "pictures.index": chosen,
        "pictures.original": victims.images[chosen],
        "pictures.class_mean": data.class_means(splits)[victims.labels[chosen]],
    }
    observe = training.observer(model, defense)
    for name in config.attacks:
        with clock.timed(f"attack_{name}"):
            outcomes[name], errors, rebuilt = attack_model(
                name, model, defense, splits, config, observe=observe, draws=draws, on_stage=on_stage
            )
        measurements |= {f"mse.{name}": errors, f"pictures.{name}": rebuilt[chosen]}
    return outcomes, measurements


def _describe(
    splits: Splits, drawn: Splits, record: Record, history: list[training.Epoch], curves: list[dict[str, Any]]
) -> Description:
    """Content of ``run.json``; ``drawn`` are the images that attacks work on."""
    victims = drawn.victims
    return Description(
        config=record.config,
        image_shape=splits.image_shape,
        num_classes=splits.num_classes,
        data=Images(
            name=splits.name,
            credit=splits.credit,
            unit=splits.unit,
            num_train=len(splits.train),
            num_attacker=len(drawn.attacker),
            num_victims=len(victims),
            num_leaked=splits.num_leaked if drawn is splits else drawn.test.num_in(splits.train),
            num_available=None if drawn is splits else len(splits.attacker),
        ),
        baseline=Baseline(**data.baselines(drawn)),
        recognition=Recognition(
            clean=recognizer(drawn).rate(victims.images, victims.labels),
            chance=recognition.chance(victims.labels),
        ),
        identity=provenance.identity(splits),
        history=tuple(history),
        curves=tuple(Point(**point) for point in curves),
        record=record,
    )


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
