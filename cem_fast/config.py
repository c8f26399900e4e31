"""Settings of one run and of a grid of runs: what is trained, how it is defended, and how it is attacked."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from itertools import product
from typing import Any, get_args, get_origin, get_type_hints

from cem_fast import schedule
from cem_fast._support.lookup import lookup
from cem_fast.models.bottleneck import Bottleneck

MAX_SEED = 2**63 - 1  # what every generator of torch takes
PRECISIONS = ("fp32", "bf16", "fp16")
# settings that runs of earlier versions do not name, and what they were
LATER = {"accumulate": 1, "precision": "fp32", "attack_batch_size": 32, "attack_dropout": 0.3}


@dataclass(frozen=True)
class SharedConfig:
    """What a single run and every run of a grid have in common.

    Args:
        image_size: side of the square images in pixels; None keeps the data set's own.
        protocol: ``inference``, the attacker holds the training images and rebuilds test images; ``train``, it holds neither and rebuilds
            training images.
        model: name of the network (``slim``, ``vgg11``, ``vgg13``, ``resnet20``, ``resnet32``, ``mobilenet_v2`` or a variant of one).
        cut: number of stages (convolutions or blocks) that stay on the user's device.
        bottleneck: channels of the features that leave the device, or [noRELU_][Kk]CcSs; 0 for no bottleneck.
        noise_std: standard deviation of the Gaussian noise that every defense adds last to what it releases; 0 for none.
        adversary_weight: weight of the adversarial term of ``adversarial``, ``noise_arl``, ``ressfl`` and ``patrol``.
        ssim_threshold: structural similarity up to which a reconstruction costs ``ressfl`` and ``patrol`` nothing, below 1.
        pruned_channels: share of the channels of the encoder's layers that ``patrol`` prunes halfway through training.
        sparse_threshold: what a neuron of ``sca`` must exceed to be active, in root mean squares of an image's features.
        nopeek_weight: weight of the distance correlation in ``distance_correlation``, ``noise_nopeek``.
        dropout_rate: share of the features that ``dropout`` drops.
        pruned_share: share of the features, those of least magnitude, that ``topk_pruning`` does not send.
        privacy_mechanism: noise of ``local_dp``, ``gaussian`` or ``laplace``.
        privacy_epsilon: epsilon of ``local_dp``; smaller is more private.
        privacy_delta: delta of ``local_dp`` with Gaussian noise.
        privacy_clip: greatest norm of an image's features under ``local_dp``.
        cem_by_class: whether CEM's mixture has components of every class; otherwise it knows no labels and has one set for all images.
        cem_components: mixture components per class (1 without labels: a single Gaussian).
        cem_covariance: ``spherical`` or ``diag``.
        cem_variant: ``paper`` or ``official``.
        cem_gradient: ``unbiased`` or ``literal``.
        cem_schedule: ``constant``, or ``official``, which lowers the weight of the CEM loss while the learning rate is high.
        epochs: passes over the training images.
        batch_size: images per training step.
        accumulate: parts that a batch is computed in, one after the other, so that it needs less memory; their gradients add up.
        precision: what the network computes in during training (``fp32``, ``bf16`` or ``fp16``, where that is safe).
        learning_rate: peak learning rate of the defense training.
        attacks: attacks to run on the trained model.
        attack_decoder: network of the decoder attack (``slim``, ``res_norm``, ``conv_norm``, ``plain``).
        attack_dropout: share of its hidden features that the network ``slim`` drops in training, below 1.
        attack_loss: what the decoder attack minimizes (``mse``, ``ssim``, ``l1``).
        attack_epochs: passes of the decoder attack over the attacker's images, also where another attack starts from it.
        attack_batch_size: images per step of the decoder attack, and of the gan attack after it.
        attack_gan_epochs: passes of the gan attack after that.
        attack_steps: steps of the optimization attack.
        noise_draws: noise draws that the accuracy is averaged over.
    """

    image_size: int | None = None
    protocol: str = "inference"
    model: str = "slim"
    cut: int = 2
    bottleneck: int | str = 8
    noise_std: float = 0.1
    adversary_weight: float = 0.3
    ssim_threshold: float = 0.5
    pruned_channels: float = 0.1
    sparse_threshold: float = 0.3
    nopeek_weight: float = 1.0
    dropout_rate: float = 0.3
    pruned_share: float = 0.8
    privacy_mechanism: str = "gaussian"
    privacy_epsilon: float = 200.0
    privacy_delta: float = 1e-4
    privacy_clip: float = 10.0
    cem_by_class: bool = True
    cem_components: int = 5
    cem_covariance: str = "spherical"
    cem_variant: str = "paper"
    cem_gradient: str = "unbiased"
    cem_schedule: str = "constant"
    epochs: int = 40
    batch_size: int = 32
    accumulate: int = 1
    precision: str = "fp32"
    learning_rate: float = 0.05
    attacks: tuple[str, ...] = ("decoder", "ridge")
    attack_decoder: str = "slim"
    attack_dropout: float = 0.3
    attack_loss: str = "mse"
    attack_epochs: int = 160
    attack_batch_size: int = 32
    attack_gan_epochs: int = 20
    attack_steps: int = 120
    noise_draws: int = 20

    def __post_init__(self) -> None:
        for key, kind in _kinds(type(self)).items():
            if not _is_of(kind, getattr(self, key)):
                raise TypeError(f"{key} must be {_described(kind)}, got {getattr(self, key)!r}")
        choices = {
            "protocol": ("inference", "train"),
            "privacy_mechanism": ("gaussian", "laplace"),
            "cem_covariance": ("spherical", "diag"),
            "cem_variant": ("paper", "official"),
            "cem_gradient": ("unbiased", "literal"),
            "cem_schedule": schedule.KINDS,
            "precision": PRECISIONS,
        }
        for key, options in choices.items():
            lookup(key, getattr(self, key), dict.fromkeys(options))
        for key in (
            "cut",
            "cem_components",
            "epochs",
            "batch_size",
            "accumulate",
            "attack_epochs",
            "attack_gan_epochs",
            "attack_steps",
            "noise_draws",
        ):
            _require(key, getattr(self, key), at_least=1)
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate must be at most batch_size {self.batch_size}, got {self.accumulate}")
        Bottleneck.parse(self.bottleneck)
        for key in ("noise_std", "adversary_weight"):
            _require(key, getattr(self, key), at_least=0)
        _require("attack_dropout", self.attack_dropout, at_least=0, below=1)
        _require("learning_rate", self.learning_rate, at_least=0)
        if self.learning_rate == 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        _require("attack_batch_size", self.attack_batch_size, at_least=2)  # a batch of one cannot be normalized
        if self.image_size is not None:
            _require("image_size", self.image_size, at_least=1)
        if not self.attacks:
            raise ValueError("attacks must list at least one value, got none")


@dataclass(frozen=True)
class RunConfig(SharedConfig):
    """Every setting of one training run and of the attacks on it, beside those of :class:`SharedConfig`.

    Args:
        data: name of a data set (``faces``, ``digits``, ``cifar10``, ``cifar100``, ``tiny_imagenet``, ``facescrub``, ``fashion_mnist``,
            ``fashion_mnist_5k``) or the path of a folder with one sub-folder per class.
        defense: name of the defense.
        cem_weight: weight of the CEM loss (lambda); 0 trains without it.
        seed: seed of every random choice of the run.
        fold: which fold of the data is the test set.
    """

    data: str = "faces"
    defense: str = "noise"
    cem_weight: float = 0.0
    seed: int = 0
    fold: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("cem_weight", "seed", "fold"):
            _require(key, getattr(self, key), at_least=0)
        if self.seed > MAX_SEED:
            raise ValueError(f"seed must be at most {MAX_SEED}, got {self.seed}")
        if self.cem_weight > 0 and self.noise_std == 0:
            raise ValueError(f"noise_std must be positive where cem_weight is, got 0 with cem_weight {self.cem_weight}")
        if self.cem_weight > 0 and self.epochs < 2:
            raise ValueError(
                f"epochs must be at least 2 where cem_weight is positive, since CEM is first fitted after epoch 1, got {self.epochs} "
                f"with cem_weight {self.cem_weight}"
            )

    @property
    def label(self) -> str:
        """What the run is called in tables: ``noise + CEM``."""
        return self.defense + (" + CEM" if self.cem_weight > 0 else "")

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as results.json records them: ``cem_weight`` under the paper's name, ``lambda``."""
        settings = asdict(self)
        settings["lambda"] = settings.pop("cem_weight")
        settings["attacks"] = list(self.attacks)
        return settings

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> RunConfig:
        """Rebuilds the settings that :meth:`to_json` of this version or an earlier one wrote.

        Raises:
            TypeError: a setting is of the wrong kind.
            ValueError: a key is unknown or missing, or a setting is out of range.
        """
        settings = LATER | settings
        if "lambda" in settings:
            settings["cem_weight"] = settings.pop("lambda")
        known = {f.name for f in fields(cls)}
        if settings.keys() != known:
            unknown, missing = sorted(settings.keys() - known), sorted(known - settings.keys())
            raise ValueError(f"run settings do not match this version: unknown keys {unknown}, missing keys {missing}")
        if isinstance(settings["attacks"], list):
            settings["attacks"] = tuple(settings["attacks"])
        return cls(**settings)


# what a grid's defense may have of its own: how the images are read, and how it is attacked, is the same for all of them
CELL_SETTINGS = tuple(
    field.name
    for field in fields(RunConfig)
    if field.name not in ("data", "seed", "fold", "image_size", "protocol", "noise_draws")
    and not field.name.startswith("attack")
)


@dataclass(frozen=True)
class GridConfig(SharedConfig):
    """A grid of runs that differ in what is listed here and share every setting of :class:`SharedConfig`.

    Args:
        name: name of the grid; its results go to ``runs/<name>``.
        data: data sets, each a name (``faces``, ``cifar10``, ...) or the path of a folder of images.
        undefended: reference points, trained without noise and without CEM.
        defenses: defenses, each trained with every weight in ``cem_weights``; a name, or settings of its own with the name under
            ``defense``, such as ``{defense: noise_arl, noise_std: 0.15}``.
        cem_weights: weights of the CEM loss (lambda); 0 trains without it.
        noise_levels: further noise levels for the ``noise`` defense without CEM, the curve that CEM is held against at equal accuracy.
        seeds: seeds, one run each.
        folds: folds of the data, one run each.
        per_data: settings that a data set has of its own, under the name it has in ``data``, such as ``{digits: {epochs: 10}}``: any
            setting of a grid but ``name``, ``data`` and this one. They take the place of those that the data sets share.
    """

    name: str = "evaluation"
    data: tuple[str, ...] = ("faces",)
    undefended: tuple[str, ...] = ("bottleneck",)
    defenses: tuple[str | dict[str, Any], ...] = ("noise",)
    cem_weights: tuple[float, ...] = (0.0, 0.35)
    noise_levels: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (0, 1)
    folds: tuple[int, ...] = (1,)
    per_data: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name or set(self.name) & set("/\\") or self.name.startswith("."):
            raise ValueError(f"name must be usable as the name of a folder, got {self.name!r}")
        for key in ("data", "seeds", "folds"):
            if not getattr(self, key):
                raise ValueError(f"{key} must list at least one value, got none")
        if not self.runs():
            raise ValueError("the grid is empty: undefended, defenses and noise_levels plan no run")

    def runs(self) -> list[RunConfig]:
        """The planned runs, those of one data set and fold together, each planned once.

        Raises:
            TypeError: a setting of one of them is of the wrong kind.
            ValueError: a setting of one of them is unknown or out of range.
        """
        if self.per_data:
            for data in self.per_data:
                lookup("data set of per_data", data, dict.fromkeys(self.data))
            grids = [replace(self, data=(data,), per_data={}, **self._own_settings(data)) for data in self.data]
            return list(dict.fromkeys(run for grid in grids for run in grid.runs()))
        shared = {f.name: getattr(self, f.name) for f in fields(SharedConfig)}
        cells = [{"defense": defense, "cem_weight": 0.0, "noise_std": 0.0} for defense in self.undefended]
        cells += [
            _without_idle({"cem_weight": weight, **_cell(defense)})
            for defense, weight in product(self.defenses, self.cem_weights)
        ]
        cells += [{"defense": "noise", "cem_weight": 0.0, "noise_std": level} for level in self.noise_levels]
        runs = [
            RunConfig(**{**shared, **cell, "data": data, "fold": fold, "seed": seed})
            for data, fold, seed, cell in product(self.data, self.folds, self.seeds, cells)
        ]
        return list(dict.fromkeys(runs))

    def _own_settings(self, data: str) -> dict[str, Any]:
        """The settings that a data set has of its own."""
        settings = self.per_data.get(data, {})
        if not isinstance(settings, dict):
            raise TypeError(f"per_data must have settings under {data!r}, got {settings!r}")
        known = [f.name for f in fields(self) if f.name not in ("name", "data", "per_data")]
        for key in settings:
            lookup(f"setting of {data} in per_data", key, dict.fromkeys(known))
        return {key: _as_said(_kinds(GridConfig)[key], value) for key, value in settings.items()}


def _cell(defense: str | dict[str, Any]) -> dict[str, Any]:
    """The settings of one entry of a grid's defenses: a name is short for a defense without settings of its own."""
    if isinstance(defense, str):
        return {"defense": defense}
    if "defense" not in defense:
        raise ValueError(f"defenses must each have a name under 'defense', got {defense!r}")
    for key in defense:
        lookup("setting of a defense", key, dict.fromkeys(CELL_SETTINGS))
    return {key: _as_said(_kinds(RunConfig)[key], value) for key, value in defense.items()}


def _as_said(kind: Any, value: Any) -> Any:
    """A value from a file as the setting's kind has it: a file may say 1 for 1.0, and knows lists alone."""
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_as_said(get_args(kind)[0], each) for each in value)
    return float(value) if kind is float and _is_of(int, value) else value


def _without_idle(cell: dict[str, Any]) -> dict[str, Any]:
    """A cell without the settings of CEM where there is no CEM: such cells are trained alike, and once is enough."""
    if cell["cem_weight"] > 0:
        return cell
    return {key: value for key, value in cell.items() if key == "cem_weight" or not key.startswith("cem_")}


def _described(kind: Any) -> str:
    """A type for people: ``int or null``, ``tuple of str``."""
    if get_origin(kind) is tuple:
        return f"tuple of {_described(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return "settings"
    if get_args(kind):
        return " or ".join(_described(option) for option in get_args(kind))
    return "null" if kind is type(None) else kind.__name__


@cache
def _kinds(config: type) -> dict[str, Any]:
    return get_type_hints(config)


def _is_of(kind: Any, value: Any) -> bool:
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_of(get_args(kind)[0], each) for each in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict)
    if get_args(kind):
        return any(_is_of(option, value) for option in get_args(kind))
    return isinstance(value, int | float if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def _require(key: str, value: float, *, at_least: float, below: float = math.inf) -> None:
    if not (math.isfinite(value) and at_least <= value < below):
        limit = f" and below {below}" if math.isfinite(below) else ""
        raise ValueError(f"{key} must be at least {at_least}{limit}, got {value}")
