"""What run.json and results.json hold, as frozen dataclasses.

Read with :func:`cem_fast.experiments.saved_run.read_description` and :func:`cem_fast.experiments.results.read`, which check every entry.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import PurePath
from typing import Any

from cem_fast._support import typed_json
from cem_fast._support.bottleneck import Bottleneck
from cem_fast._support.counts import IMAGE_SIDES
from cem_fast.config import RunConfig
from cem_fast.experiments.gain_records import FrontierEntry, Pair
from cem_fast.metrics.recognition import Rate
from cem_fast.training import Epoch

SCHEMA = 1
PAPER = Bottleneck(8)
Cell = tuple[str, RunConfig]
WITHOUT_CEM: dict[str, Any] = {each.name: each.default for each in fields(RunConfig) if each.name.startswith("cem_")}


@dataclass(frozen=True)
class Outcome:
    """Result of one attack on one run: means over the victims.

    Attributes:
        mse: mean squared error, pixels in [0, 1].
        psnr: peak signal-to-noise ratio per image in dB, averaged.
        ssim: structural similarity.
        ssim_paper: structural similarity as the paper's code computes it.
        recognized: share of reconstructions that a classifier of clean images assigns to their own class.
        mse_half_budget: error with half the budget; None for an attack without a budget to halve.
        knowledge: capabilities of the attacker, in one sentence.
        budget: computation of the attack, in a few words.

    Example:
        >>> from cem_fast.experiments.records import Outcome
        >>> Outcome(0.01, 20.0, 0.5, 0.6, 0.9, None, knowledge="its own images", budget="a closed form").mse
        0.01
    """

    mse: float
    psnr: float
    ssim: float
    ssim_paper: float
    recognized: float
    mse_half_budget: float | None
    knowledge: str
    budget: str


@dataclass(frozen=True)
class Leakage:
    """Estimates of the information in released features; None without noise, since no bound is finite then.

    Attributes:
        plugin_nats: Eq. 7 of the paper on the fitted mixture.
        heldout_nats: cross-entropy of noisy test features minus the entropy of the noise.
        heldout_se: standard error of ``heldout_nats``.
        capacity_nats: the most that features in [0, 1] can carry through this noise, :func:`cem_fast.bounds.channel_capacity`; None for
            features that are not bounded, and in runs of earlier versions.

    Raises:
        ValueError: some of the estimates are None, but not all.

    Example:
        >>> from cem_fast.experiments.records import Leakage
        >>> Leakage(plugin_nats=40.0, heldout_nats=42.0, heldout_se=0.5).heldout_nats
        42.0
    """

    plugin_nats: float | None
    heldout_nats: float | None
    heldout_se: float | None
    capacity_nats: float | None = field(default=None, metadata={"later": True})

    def __post_init__(self) -> None:
        if len({value is None for value in (self.plugin_nats, self.heldout_nats, self.heldout_se)}) > 1:
            raise ValueError(f"leakage must be all numbers or all null, got {vars(self)}")


@dataclass(frozen=True)
class Record:
    """One run, as run.json holds it under ``record``.

    Attributes:
        data: name of the data set.
        config: every setting.
        accuracy: on released features of test images, averaged over noise draws.
        num_test: number of test images.
        attacks: outcome of every attack by name; empty for a run that was not attacked.
        leakage: estimates of the information in the released features.
        seconds: time per stage, and their ``total``.
        inferred: what else the attacker reads from features: ``label``, ``identity``, and ``attribute NAME`` of every attribute; empty in
            runs of earlier versions and for a run that was not attacked.

    Raises:
        ValueError: ``seconds`` has no ``total``.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Record
        >>> config = RunConfig(defense="noise", cem_weight=0.5)
        >>> record = Record("faces", config, 0.9, 80, {}, Leakage(None, None, None), {"total": 1.0})
        >>> record.cem, record.strongest, record.to_json()["cut"]
        (True, None, 2)
    """

    data: str
    config: RunConfig
    accuracy: float
    num_test: int
    attacks: dict[str, Outcome]
    leakage: Leakage
    seconds: dict[str, float]
    inferred: dict[str, Rate] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if "total" not in self.seconds:
            raise ValueError(f"seconds must have a total, got {sorted(self.seconds)}")

    @property
    def cem(self) -> bool:
        """Whether the run was trained with CEM."""
        return self.config.cem_weight > 0

    @property
    def plain(self) -> bool:
        """Whether this is plain noise, or none, on the paper's bottleneck of 8 channels, which every other cell has to beat."""
        shape = Bottleneck.parse(self.config.bottleneck)
        return self.config.defense in ("noise", "bottleneck") and not self.cem and shape == PAPER

    @property
    def label(self) -> str:
        """``noise + CEM``."""
        return self.config.label

    @property
    def repeat(self) -> tuple[int, int]:
        """Seed and fold, in which the runs of one cell differ."""
        return self.config.seed, self.config.fold

    @property
    def strongest(self) -> str | None:
        """The attack with the lowest mean error; None for a run that was not attacked."""
        return min(self.attacks, key=lambda name: self.attacks[name].mse, default=None)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings under their names in the file."""
        return self.config.to_json()

    @cached_property
    def cell(self) -> Cell:
        """Everything that the runs of one cell share."""
        return self.data, replace(self.config, seed=0, fold=0)

    @cached_property
    def without_cem(self) -> Cell:
        """Everything that runs of a cell share with the runs without CEM that they are compared to."""
        return self.data, replace(self.config, seed=0, fold=0, **WITHOUT_CEM)

    def at(self, checkpoint: str | None) -> GridRecord:
        """This record as results.json holds it.

        Args:
            checkpoint: folder of the run, relative to that of results.json; None if its files were not kept.
        """
        return GridRecord(**{each.name: getattr(self, each.name) for each in fields(Record)}, checkpoint=checkpoint)

    def to_json(self) -> dict[str, Any]:
        """Returns the record with the main settings repeated in front, for people who read the file."""
        config = self.config
        return {
            "data": self.data,
            "protocol": config.protocol,
            "model": config.model,
            "cut": config.cut,
            "defense": config.defense,
            "cem": self.cem,
            "config": self.settings,
            "seed": config.seed,
            "fold": config.fold,
            "accuracy": self.accuracy,
            "num_test": self.num_test,
            "attacks": typed_json.write(self.attacks),
            "leakage": typed_json.write(self.leakage),
            "seconds": self.seconds,
        } | ({"inferred": typed_json.write(self.inferred)} if self.inferred else {})


@dataclass(frozen=True)
class GridRecord(Record):
    """One run, as results.json holds it.

    Attributes:
        checkpoint: folder of the run, relative to that of results.json; None if its files were not kept.

    Raises:
        ValueError: ``checkpoint`` lies outside of that folder.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Leakage, Record
        >>> record = Record("faces", RunConfig(), 0.9, 80, {}, Leakage(None, None, None), {"total": 1.0})
        >>> record.at("runs/faces").to_json()["checkpoint"]
        'runs/faces'
    """

    checkpoint: str | None = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        path = PurePath(self.checkpoint or "")
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"checkpoint must lie in the folder of results.json, got {self.checkpoint!r}")

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "checkpoint": self.checkpoint}


@dataclass(frozen=True)
class Images:
    """Images of a run.

    Attributes:
        name: name of the data set.
        credit: its source.
        unit: what intervals resample, such as ``people``.
        num_train: number of training images.
        num_attacker: number of images that the attacker holds.
        num_victims: number of images under attack.
        num_leaked: number of images under attack that the attacker holds as well; None in runs of earlier versions.
        num_available: number of images that those of the attacker were drawn from, as many as fit into memory; None if it holds all.

    Example:
        >>> from cem_fast.experiments.records import Images
        >>> Images("faces", "ORL", "people", 320, 320, 80).num_leaked is None
        True
    """

    name: str
    credit: str
    unit: str
    num_train: int
    num_attacker: int
    num_victims: int
    num_leaked: int | None = None
    num_available: int | None = field(default=None, metadata={"later": True})


@dataclass(frozen=True)
class Baseline:
    """Errors of an attacker without features.

    Attributes:
        mean_image_mse: error of the mean image.
        class_mean_mse: error of the mean image of the right class.

    Example:
        >>> from cem_fast.experiments.records import Baseline
        >>> Baseline(0.02, 0.01).class_mean_mse
        0.01
    """

    mean_image_mse: float
    class_mean_mse: float


@dataclass(frozen=True)
class Recognition:
    """References for the share of reconstructions that are recognized.

    Attributes:
        clean: share of the originals that are recognized.
        chance: share that naming one class for all would get right.

    Example:
        >>> from cem_fast.experiments.records import Recognition
        >>> Recognition(clean=0.9, chance=0.1).clean
        0.9
    """

    clean: float
    chance: float


@dataclass(frozen=True)
class Identity:
    """Version, code and images: what a result depends on apart from its settings.

    Attributes:
        version: version of the package.
        code: digest of the code.
        images: digest of the images.

    Example:
        >>> from cem_fast.experiments.records import Identity
        >>> Identity("0.1.0", "af66", "3a37") == Identity("0.1.0", "af66", "0000")
        False
    """

    version: str
    code: str
    images: str


@dataclass(frozen=True)
class Point:
    """Measurements after one epoch, for the curves of the report.

    Attributes:
        epoch: the epoch, from 1.
        accuracy: on test images with one noise draw.
        plugin_nats: plug-in estimate of the information; None without noise.

    Example:
        >>> from cem_fast.experiments.records import Point
        >>> Point(1, accuracy=0.5, plugin_nats=111.3).epoch
        1
    """

    epoch: int
    accuracy: float
    plugin_nats: float | None


@dataclass(frozen=True)
class Description:
    """Content of run.json.

    Attributes:
        config: every setting.
        image_shape: ``(channels, height, width)``.
        num_classes: number of classes.
        data: the images.
        baseline: errors of an attacker without features.
        recognition: references for the share of reconstructions that are recognized.
        identity: version, code and images.
        history: the epochs of the training.
        curves: measurements during the training.
        record: the results.
        files: tensor files of the folder by kind, ``weights`` and ``measurements``; set when the run is saved.

    Raises:
        ValueError: a size is not positive.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Baseline, Description, Identity, Images, Leakage, Recognition, Record
        >>> config = RunConfig()
        >>> Description(
        ...     config,
        ...     image_shape=(1, 16, 16),
        ...     num_classes=40,
        ...     data=Images("faces", "ORL", "people", 320, 320, 80),
        ...     baseline=Baseline(0.02, 0.01),
        ...     recognition=Recognition(0.9, 0.1),
        ...     identity=Identity("0.1.0", "af66", "3a37"),
        ...     history=(),
        ...     curves=(),
        ...     record=Record("faces", config, 0.9, 80, {}, Leakage(None, None, None), {"total": 1.0}),
        ... ).num_classes
        40
    """

    config: RunConfig
    image_shape: tuple[int, int, int]
    num_classes: int
    data: Images
    baseline: Baseline
    recognition: Recognition
    identity: Identity
    history: tuple[Epoch, ...]
    curves: tuple[Point, ...]
    record: Record
    files: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if min(self.image_shape) < 1 or max(self.image_shape) > IMAGE_SIDES[1]:
            raise ValueError(
                f"image_shape must be three sizes from 1 to {IMAGE_SIDES[1]}, got {list(self.image_shape)}"
            )
        if self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")

    def to_json(self) -> dict[str, Any]:
        """Returns the document, which starts with its schema."""
        return {"schema": SCHEMA, **typed_json.write_fields(self)}


@dataclass(frozen=True)
class Failure:
    """A run that failed.

    Attributes:
        config: its settings.
        reason: why, in one line.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments.records import Failure
        >>> Failure(RunConfig(), "the training loss is nan").reason
        'the training loss is nan'
    """

    config: RunConfig
    reason: str


@dataclass(frozen=True)
class Results:
    """Content of results.json.

    Attributes:
        command: how to get these results again.
        git: commit of the code; None outside its repository.
        versions: versions of packages by name; None for a package that is not installed.
        baseline: errors of an attacker without features, by data set.
        runs: the finished runs.
        pairs: gains at the same noise.
        frontier: gains over plain noise at equal accuracy.
        failed: the runs that failed.

    Raises:
        ValueError: a gain names a run that is not there, or ``baseline`` and ``runs`` are of different data sets.

    Example:
        >>> from cem_fast.experiments.records import Results
        >>> empty = Results("cem-fast demo", None, {}, {}, (), (), (), ())
        >>> list(empty.to_json())
        ['schema', 'command', 'git', 'versions', 'baseline', 'runs', 'pairs', 'frontier', 'failed']
    """

    command: str
    git: str | None
    versions: dict[str, str | None]
    baseline: dict[str, Baseline]
    runs: tuple[GridRecord, ...]
    pairs: tuple[Pair, ...]
    frontier: tuple[FrontierEntry, ...]
    failed: tuple[Failure, ...] = ()

    def __post_init__(self) -> None:
        named = {"pairs": [entry.run for entry in self.pairs], "frontier": [entry.run for entry in self.frontier]}
        for key, runs in named.items():
            for index, run in enumerate(runs):
                if not 0 <= run < len(self.runs):
                    raise ValueError(f"{key}.{index}.run must be the index of one of {len(self.runs)} runs, got {run}")
        for index, entry in enumerate(self.frontier):
            if beyond := [run for run in entry.baseline if not 0 <= run < len(self.runs)]:
                raise ValueError(
                    f"frontier.{index}.baseline must be indices of {len(self.runs)} runs, got {beyond[0]} among them"
                )
        if {*self.baseline} != (found := {run.data for run in self.runs}):
            raise ValueError(f"baseline must be of the data sets of runs, {sorted(found)}, got {sorted(self.baseline)}")

    def lead(self, data: str) -> FrontierEntry | None:
        """The gain at equal accuracy that leads: that of the first cell of noise in the grid's order, which is no result.

        Args:
            data: name of a data set.
        """
        entries = [entry for entry in self.frontier if entry.data == data]
        return next((entry for entry in entries if entry.defense == "noise"), entries[0] if entries else None)

    def to_json(self) -> dict[str, Any]:
        """Returns the document, which starts with its schema."""
        return {"schema": SCHEMA, **typed_json.write_fields(self)}
