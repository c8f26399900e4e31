"""Settings of one run and of a grid of runs: data, network, defense, training and attacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from typing import Any, get_type_hints

from cem_fast import schedule
from cem_fast._support.bottleneck import Bottleneck
from cem_fast._support.counts import IMAGE_SIDES
from cem_fast._support.lookup import lookup
from cem_fast._support.setting_types import from_yaml, is_of, type_name

MAX_SEED = 2**63 - 1  # the largest seed of torch's generators
MOST_RUNS = 10_000  # of a grid
PRECISIONS = ("fp32", "bf16", "fp16")
# settings that older saved runs lack, with the value in force then
LATER: dict[str, Any] = {"accumulate": 1, "precision": "fp32", "attack_batch_size": 32, "attack_dropout": 0.3}
# settings that files have only where they differ from these, so that files of earlier versions keep their bytes
UNWRITTEN: dict[str, Any] = {
    "train_noise_std": None,
    "attack_budget": "standard",
    "attack_releases": 1,
    "secure": False,
    "mirror": False,
    "validation": False,
}
SEARCHED = ("validation", "defense", "bottleneck", "noise_std", "cem_weight", "cem_components")  # by ``cem-fast tune``
SEEDED = "since evaluations repeat their draws from a seed"  # why they refuse ``secure``
_KINDS: dict[type, dict[str, Any]] = {}  # types of the settings of each class
# groups of the shared settings, by the first setting of each
GROUPS = {
    "image_size": "data and network",
    "noise_std": "defense",
    "cem_by_class": "CEM",
    "epochs": "training",
    "attacks": "attacks and evaluation",
}
POSITIVE = (  # counts of at least 1
    *("cut", "cem_components", "epochs", "batch_size", "accumulate", "noise_draws"),
    *("attack_epochs", "attack_gan_epochs", "attack_steps", "attack_releases"),
)


@dataclass(frozen=True)
class SharedConfig:
    """Settings that a single run and all runs of a grid share.

    Args:
        image_size: side of the square images in pixels, 8 to 2048; null for the data set's own size.
        mirror: whether training also shows mirror images, as of photographs in a folder; other data sets bring their own choice.
        protocol: images that the attacker reconstructs: ``inference``, test images, with the training images known; ``train``, training
            images, with none of them known.
        validation: whether a fifth of the training images, chosen by ``fold``, takes the place of the test images of data with a fixed test
            part, for choosing settings.
        model: network: ``slim``, ``vgg11``, ``vgg13``, ``resnet20``, ``resnet32``, ``mobilenet_v2`` or a variant of one.
        cut: number of stages (convolutions or blocks) on the user's device, at least 1.
        bottleneck: channels of the released features; a convolution in the notation ``[noRELU_][Kk]CcSs``; r numbers of all positions
            in the notation ``[noRELU_]Dr[Pp|[Kk]CcSs][Rk][Gg]``, such as ``D64``; 0 for no bottleneck.
        noise_std: standard deviation of the Gaussian noise added last to the released features; 0 for none.
        train_noise_std: standard deviation of that noise in training, where it is to differ from that in use; null for ``noise_std``.
        adversary_weight: weight of the adversarial term of ``adversarial``, ``noise_arl``, ``ressfl`` and ``patrol``, at least 0.
        ssim_threshold: structural similarity below which ``ressfl`` and ``patrol`` do not penalize a reconstruction, below 1.
        pruned_channels: share of the encoder's channels that ``patrol`` prunes halfway through training.
        sparse_threshold: activation threshold of the neurons of ``sca``, in root mean squares of an image's features.
        nopeek_weight: weight of the distance correlation in ``distance_correlation`` and ``noise_nopeek``.
        dropout_rate: share of the features that ``dropout`` drops.
        pruned_share: share of the features, smallest magnitudes first, that ``topk_pruning`` does not send.
        privacy_mechanism: noise of ``local_dp``: ``gaussian`` or ``laplace``.
        privacy_epsilon: epsilon of ``local_dp``; smaller is more private.
        privacy_delta: delta of ``local_dp`` with Gaussian noise.
        privacy_clip: largest norm of an image's features under ``local_dp``.
        cem_by_class: whether the CEM mixture has components per class; otherwise one set of components for all images, without labels.
        cem_components: mixture components per class, or in all without classes, at least 1.
        cem_covariance: covariance of the mixture components: ``spherical`` or ``diag``.
        cem_variant: formula of the CEM loss: ``paper``, or ``official`` for that of the authors' code.
        cem_gradient: gradient of the CEM loss: ``unbiased``, or ``literal`` for that of the formula as printed.
        cem_schedule: schedule of the CEM weight: ``constant``, or ``official`` for a lower weight while the learning rate is high.
        epochs: passes over the training images, at least 1.
        batch_size: images per training step, at least 1.
        accumulate: parts of a batch that are computed one after another to save memory, with summed gradients; at most ``batch_size``.
        precision: floating-point format of the network in training where it is safe: ``fp32``, ``bf16`` or ``fp16``.
        learning_rate: peak learning rate of the training, positive.
        attacks: attacks on the trained model: ``decoder``, ``ridge``, ``nearest``, ``ensemble``, ``optimization``, ``gan``,
            ``kernel_ridge``, ``inversion``, ``flow``.
        attack_decoder: network of the decoder attack: ``slim``, ``res_norm``, ``conv_norm`` or ``plain``.
        attack_dropout: dropout rate of the decoder network ``slim`` in training, at least 0 and below 1.
        attack_loss: loss of the decoder attack: ``mse``, ``ssim`` or ``l1``.
        attack_epochs: passes of the decoder attack over the attacker's images, also as the start of other attacks, at least 1; null for
            those of ``attack_budget``.
        attack_batch_size: images per step of the decoder attack and the GAN attack, at least 2.
        attack_gan_epochs: further passes of the GAN attack after the decoder attack, at least 1; null for those of ``attack_budget``.
        attack_steps: steps of the optimization attack, at least 1; null for those of ``attack_budget``.
        attack_budget: computation of the attacks: ``quick``, ``standard`` or ``thorough``.
        attack_releases: messages of each image, with independent noise, that an attack uses jointly, at least 1.
        noise_draws: noise draws per test image that the accuracy is averaged over, at least 1.
    """

    image_size: int | None = None
    mirror: bool = False
    protocol: str = "inference"
    validation: bool = False
    model: str = "slim"
    cut: int = 2
    bottleneck: int | str = 8
    noise_std: float = 0.1
    train_noise_std: float | None = None
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
    attack_epochs: int | None = None
    attack_batch_size: int = 32
    attack_gan_epochs: int | None = None
    attack_steps: int | None = None
    attack_budget: str = "standard"
    attack_releases: int = 1
    noise_draws: int = 20

    def __post_init__(self) -> None:
        for key, kind in _kinds(type(self)).items():
            if not is_of(kind, getattr(self, key)):
                raise TypeError(f"{key} must be {type_name(kind, sequence='tuple')}, got {getattr(self, key)!r}")
            if isinstance(getattr(self, key), int) and not -MAX_SEED <= getattr(self, key) <= MAX_SEED:
                raise ValueError(f"{key} must be at most {MAX_SEED}, got {getattr(self, key)}")
            if isinstance(getattr(self, key), float) and not math.isfinite(getattr(self, key)):
                raise ValueError(f"{key} must be finite, got {getattr(self, key)}")
        choices = {
            "protocol": ("inference", "train"),
            "privacy_mechanism": ("gaussian", "laplace"),
            "cem_covariance": ("spherical", "diag"),
            "cem_variant": ("paper", "official"),
            "cem_gradient": ("unbiased", "literal"),
            "cem_schedule": schedule.KINDS,
            "precision": PRECISIONS,
            "attack_budget": ("quick", "standard", "thorough"),
        }
        for key, options in choices.items():
            lookup(key, getattr(self, key), dict.fromkeys(options))
        for key in POSITIVE:
            if getattr(self, key) is not None:
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
        if self.train_noise_std is not None:
            _require("train_noise_std", self.train_noise_std, at_least=0)
        if self.image_size is not None:
            _require("image_size", self.image_size, at_least=IMAGE_SIDES[0], below=IMAGE_SIDES[1] + 1)
        if not self.attacks:
            raise ValueError("attacks must list at least one value, got none")


@dataclass(frozen=True)
class RunConfig(SharedConfig):
    """All settings of one training run and the attacks on it.

    The settings of :class:`cem_fast.config.SharedConfig` are keywords too.

    Args:
        data: data set: ``faces``, ``digits``, ``cifar10``, ``cifar10-jpeg``, ``cifar100``, ``tiny_imagenet``, ``facescrub``,
            ``fashion_mnist``, ``fashion_mnist_5k``, or the path of a folder with one subfolder per class.
        defense: name of the defense, such as ``noise``.
        cem_weight: weight of the CEM loss (lambda), at least 0; 0 trains without it.
        seed: seed of all random choices of the run, from 0 to 2**63 - 1.
        fold: fold of the data that is the test set, 0 to 4.
        secure: whether the defense of the saved run draws from the operating system's secure generator. Training and measurements repeat
            their draws from ``seed``, and grids refuse this setting.

    Raises:
        TypeError: a setting is of the wrong type.
        ValueError: a setting is out of range.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> config = RunConfig(data="digits", cem_weight=0.35, epochs=10)
        >>> config.label
        'noise + CEM'
        >>> RunConfig(epochs=0)
        Traceback (most recent call last):
            ...
        ValueError: epochs must be at least 1, got 0
    """

    data: str = "faces"
    defense: str = "noise"
    cem_weight: float = 0.0
    seed: int = 0
    fold: int = 1
    secure: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("cem_weight", "seed", "fold"):
            _require(key, getattr(self, key), at_least=0)
        if self.seed > MAX_SEED:
            raise ValueError(f"seed must be at most {MAX_SEED}, got {self.seed}")
        if self.noise_std == 0 and self.train_noise_std is not None:
            raise ValueError(f"train_noise_std must be null without noise_std, got {self.train_noise_std}")
        if self.cem_weight > 0 and self.noise_std == 0:
            raise ValueError(f"noise_std must be positive where cem_weight is, got 0 with cem_weight {self.cem_weight}")
        if self.cem_weight > 0 and self.epochs < 2:
            raise ValueError(
                f"epochs must be at least 2 where cem_weight is positive, since CEM is first fitted after epoch 1, got {self.epochs} "
                f"with cem_weight {self.cem_weight}"
            )

    @property
    def label(self) -> str:
        """Name of the run in tables.

        Example:
            >>> from cem_fast.config import RunConfig
            >>> RunConfig(defense="dropout").label
            'dropout'
        """
        return self.defense + (" + CEM" if self.cem_weight > 0 else "")

    def to_json(self) -> dict[str, Any]:
        """Return the settings as results.json records them, with ``cem_weight`` under the paper's name ``lambda``.

        Example:
            >>> from cem_fast.config import RunConfig
            >>> RunConfig(cem_weight=0.35).to_json()["lambda"]
            0.35
        """
        settings = asdict(self)
        settings["lambda"] = settings.pop("cem_weight")
        settings["attacks"] = list(self.attacks)
        return {key: value for key, value in settings.items() if key not in UNWRITTEN or value != UNWRITTEN[key]}

    @classmethod
    def from_json(cls, settings: dict[str, Any]) -> RunConfig:
        """Read the settings that :meth:`cem_fast.config.RunConfig.to_json` of this or an older version wrote.

        Args:
            settings: the settings by their names in results.json.

        Raises:
            TypeError: a setting is of the wrong type.
            ValueError: a key is unknown or missing, or a setting is out of range.

        Example:
            >>> from cem_fast.config import RunConfig
            >>> RunConfig.from_json(RunConfig(seed=3).to_json()) == RunConfig(seed=3)
            True
        """
        settings = LATER | UNWRITTEN | settings
        if "lambda" in settings:
            settings["cem_weight"] = settings.pop("lambda")
        known = {f.name for f in fields(cls)}
        if settings.keys() != known:
            unknown, missing = sorted(settings.keys() - known), sorted(known - settings.keys())
            raise ValueError(f"run settings do not match this version: unknown keys {unknown}, missing keys {missing}")
        if isinstance(settings["attacks"], list):
            settings["attacks"] = tuple(settings["attacks"])
        return cls(**settings)


_OF_DATA = ("data", "seed", "fold", "secure", "image_size", "mirror", "protocol", "validation", "noise_draws")
# settings that an entry of a grid's defenses may set: all but those of data and attacks, which stay equal across defenses
CELL_SETTINGS = tuple(
    field.name for field in fields(RunConfig) if field.name not in _OF_DATA and not field.name.startswith("attack")
)


@dataclass(frozen=True)
class GridConfig(SharedConfig):
    """A grid of runs: all combinations of the lists below, with all other settings shared.

    The settings of :class:`cem_fast.config.SharedConfig` are keywords too.

    Args:
        name: name of the grid; its results go to ``runs/<name>``.
        data: data sets, each a name (``faces``, ``cifar10``, ...) or the path of a folder of images.
        undefended: defenses trained as reference points, without noise and without CEM.
        defenses: defenses, each trained with every weight in ``cem_weights``; a name, or settings of its own with the name under
            ``defense``, such as ``{defense: noise_arl, noise_std: 0.15}``.
        cem_weights: weights of the CEM loss (lambda); 0 trains without it.
        noise_levels: further noise levels for the ``noise`` defense without CEM, the curve for comparisons at equal accuracy.
        seeds: seeds, one run each.
        folds: folds of the data, one run each.
        per_data: settings of single data sets in place of the shared ones, by their name in ``data``, such as
            ``{digits: {epochs: 10}}``; all but ``name``, ``data`` and ``per_data`` are allowed.

    Raises:
        TypeError: a setting is of the wrong type.
        ValueError: a setting is unknown or out of range, or the grid plans no run.

    Example:
        >>> from cem_fast.config import GridConfig
        >>> grid = GridConfig(data=("digits",), cem_weights=(0.0, 0.5), seeds=(0, 1))
        >>> [run.label for run in grid.runs()]
        ['bottleneck', 'noise', 'noise + CEM', 'bottleneck', 'noise', 'noise + CEM']
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
        """The planned runs without duplicates, ordered by data set, fold, seed and defense.

        Raises:
            TypeError: a setting of a run is of the wrong type.
            ValueError: a setting of a run is unknown or out of range.

        Example:
            >>> from cem_fast.config import GridConfig
            >>> [(run.defense, run.noise_std, run.cem_weight) for run in GridConfig(seeds=(0,)).runs()]
            [('bottleneck', 0.0, 0.0), ('noise', 0.1, 0.0), ('noise', 0.1, 0.35)]
        """
        if self.per_data:
            for data in self.per_data:
                lookup("data set of per_data", data, dict.fromkeys(self.data))
            grids = [replace(self, data=(data,), per_data={}, **self._own_settings(data)) for data in self.data]
            return list(dict.fromkeys(run for grid in grids for run in grid.runs()))
        shared: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(SharedConfig)}
        cells: list[dict[str, Any]] = [
            {"defense": defense, "cem_weight": 0.0, "noise_std": 0.0, "train_noise_std": None}
            for defense in self.undefended
        ]
        cells += [
            _without_idle({"cem_weight": weight, **_cell(defense)})
            for defense, weight in product(self.defenses, self.cem_weights)
        ]
        cells += [{"defense": "noise", "cem_weight": 0.0, "noise_std": level} for level in self.noise_levels]
        planned = len(self.data) * len(self.folds) * len(self.seeds) * len(cells)
        if planned > MOST_RUNS:
            raise ValueError(f"a grid must plan at most {MOST_RUNS:,} runs, got {planned:,}")
        runs = [
            RunConfig(**shared | cell | {"data": data, "fold": fold, "seed": seed})
            for data, fold, seed, cell in product(self.data, self.folds, self.seeds, cells)
        ]
        return list(dict.fromkeys(runs))

    def _own_settings(self, data: str) -> dict[str, Any]:
        """The entry of ``per_data`` for a data set."""
        settings = self.per_data.get(data, {})
        if not isinstance(settings, dict):
            raise TypeError(f"per_data must have settings under {data!r}, got {settings!r}")
        known = [f.name for f in fields(self) if f.name not in ("name", "data", "per_data")]
        for key in settings:
            _require_known(f"setting of {data} in per_data", key, known)
        return {key: from_yaml(_kinds(GridConfig)[key], value) for key, value in settings.items()}


@dataclass(frozen=True)
class Setting:
    """Description of one setting.

    Args:
        name: name of the field, which is also the YAML key.
        kind: its type.
        default: its default.
        text: its description, in Markdown.
        group: heading that it is listed under.
    """

    name: str
    kind: Any
    default: Any
    text: str
    group: str

    @property
    def type(self) -> str:
        """The type as users read it, such as ``int or null``.

        Example:
            >>> from cem_fast.config import RunConfig, described
            >>> described(RunConfig)["image_size"].type
            'int or null'
        """
        return type_name(self.kind)


def described(config: type[SharedConfig]) -> dict[str, Setting]:
    """Describe the settings of a configuration, with the texts of its docstrings.

    Args:
        config: :class:`cem_fast.config.RunConfig` or :class:`cem_fast.config.GridConfig`.

    Returns:
        The settings by name: those that only this class has first, then the shared ones.

    Example:
        >>> from cem_fast.config import RunConfig, described
        >>> setting = described(RunConfig)["epochs"]
        >>> setting.type, setting.default, setting.group
        ('int', 40, 'training')
        >>> setting.text
        'passes over the training images, at least 1'
    """
    from docstring_parser import parse_from_object  # needed for help and documentation only

    texts = {
        parameter.arg_name: " ".join((parameter.description or "").split()).rstrip(".")
        for cls in config.__mro__[:-1]
        for parameter in parse_from_object(cls).params
    }
    defaults, kinds = config(), _kinds(config)
    shared = [f.name for f in fields(SharedConfig)]
    group = "grid" if config is GridConfig else "run"
    found = {}
    for name in (*(f.name for f in fields(config) if f.name not in shared), *shared):
        group = GROUPS.get(name, group)
        found[name] = Setting(name, kinds[name], getattr(defaults, name), texts[name], group)
    return found


def _cell(defense: str | dict[str, Any]) -> dict[str, Any]:
    """The settings of one entry of a grid's defenses, which is a name or a mapping."""
    if isinstance(defense, str):
        return {"defense": defense}
    if "defense" not in defense:
        raise ValueError(f"defenses must each have a name under 'defense', got {defense!r}")
    for key in defense:
        _require_known("setting of a defense", key, CELL_SETTINGS)
    return {key: from_yaml(_kinds(RunConfig)[key], value) for key, value in defense.items()}


def _require_known(kind: str, key: str, known: Sequence[str]) -> None:
    """Requires a setting of a part of a grid to be one of these."""
    if key == "secure":
        raise ValueError(f"secure must not be set in a grid, {SEEDED}")
    lookup(kind, key, dict.fromkeys(known))


def _without_idle(cell: dict[str, Any]) -> dict[str, Any]:
    """The cell without CEM settings if its CEM weight is 0, so that equal cells are trained once."""
    if cell["cem_weight"] > 0:
        return cell
    return {key: value for key, value in cell.items() if key == "cem_weight" or not key.startswith("cem_")}


def _kinds(config: type) -> dict[str, Any]:
    if config not in _KINDS:
        _KINDS[config] = get_type_hints(config)
    return _KINDS[config]


def _require(key: str, value: float, *, at_least: float, below: float = math.inf) -> None:
    if not (math.isfinite(value) and at_least <= value < below):
        limit = f" and below {below}" if math.isfinite(below) else ""
        raise ValueError(f"{key} must be at least {at_least}{limit}, got {value}")
