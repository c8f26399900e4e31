"""Settings to parts: the images, model, defense, loss and attacks of a run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cem_fast import attacks, data, defenses, models
from cem_fast.attacks.base import Attack
from cem_fast.attacks.budgets import budgeted
from cem_fast.config import RunConfig
from cem_fast.data import Splits
from cem_fast.data.decoding import Steps
from cem_fast.data.root import SKIP_CORRUPT, VARIABLE
from cem_fast.defenses import Defense
from cem_fast.loss import CEMLoss
from cem_fast.models.split import SplitModel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


CACHED = 4  # splits that are kept
_loaded: dict[tuple[object, ...], Splits] = {}


def load_data(config: RunConfig, *, on_step: Steps = lambda done, total: None) -> Splits:
    """Loads the images of a run, cached for the runs that share them. All seeds share one split.

    Args:
        config: settings of the run.
        on_step: called with the files of a folder that are decoded and their total; not if they are kept decoded.

    Returns:
        The splits under the protocol of the run.

    Raises:
        FileNotFoundError: the data set is missing.
        ValueError: a setting is unknown or out of range, or does not fit the data.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import build
        >>> splits = build.load_data(RunConfig(data="faces", fold=1, image_size=16))
        >>> splits.image_shape, splits.num_classes, len(splits.train), len(splits.test)
        ((1, 16, 16), 40, 320, 80)
    """
    name, fold, size, validation = config.data, config.fold, config.image_size, config.validation
    key = (name, fold, size, validation, config.protocol, *map(os.environ.get, (VARIABLE, SKIP_CORRUPT)))
    splits = _loaded.pop(key, None)
    if splits is None:
        splits = data.load(name, fold=fold, image_size=size, validation=validation, on_step=on_step)
        splits = splits.under(config.protocol)
    _loaded[key] = splits  # the last of those that were used
    if len(_loaded) > CACHED:
        del _loaded[next(iter(_loaded))]
    return splits


def build_parts(
    config: RunConfig,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    process_group: ProcessGroup | None = None,
) -> tuple[SplitModel, Defense, CEMLoss | None]:
    """Builds the untrained parts of a run.

    Args:
        config: settings of the run.
        image_shape: ``(channels, height, width)`` of the images.
        num_classes: number of classes.
        process_group: torch.distributed group of the processes that train together; None for a single process.

    Returns:
        The model, the defense and the CEM loss. The loss is None without noise, since no entropy bound is finite then.

    Raises:
        ValueError: a setting is unknown or out of range.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import build
        >>> config = RunConfig(model="slim", defense="noise", noise_std=0.1)
        >>> model, defense, loss = build.build_parts(config, image_shape=(1, 16, 16), num_classes=10)
        >>> defense.noise_std, loss.mixture.num_classes
        (0.1, 10)
    """
    model, defense = build_networks(config, image_shape=image_shape, num_classes=num_classes)
    return model, defense, build_loss(config, num_classes=num_classes, process_group=process_group)


def build_networks(
    config: RunConfig, *, image_shape: tuple[int, int, int], num_classes: int
) -> tuple[SplitModel, Defense]:
    """Builds the untrained model and the defense of a run.

    Args:
        config: settings of the run.
        image_shape: ``(channels, height, width)`` of the images.
        num_classes: number of classes.

    Returns:
        The model and the defense, not yet attached.

    Raises:
        ValueError: a setting is unknown or out of range.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import build
        >>> model, defense = build.build_networks(RunConfig(noise_std=0.1), image_shape=(1, 16, 16), num_classes=10)
        >>> defense.noise_std
        0.1
    """
    defense = defenses.build(config.defense, **{key: getattr(config, key) for key in defenses.settings()})
    model = models.build(
        config.model,
        image_shape=image_shape,
        num_classes=num_classes,
        cut=config.cut,
        bottleneck=config.bottleneck if defense.uses_bottleneck else 0,
    )
    return model, defense


def build_loss(config: RunConfig, *, num_classes: int, process_group: ProcessGroup | None = None) -> CEMLoss | None:
    """Builds the CEM loss of a run, not yet fitted.

    Args:
        config: settings of the run.
        num_classes: number of classes of the data.
        process_group: torch.distributed group of the processes that train together; None for a single process.

    Returns:
        The loss; None without noise.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import build
        >>> build.build_loss(RunConfig(cem_components=3), num_classes=10).mixture.num_components
        3
        >>> build.build_loss(RunConfig(noise_std=0.0), num_classes=10) is None
        True
    """
    if config.noise_std == 0:
        return None
    return CEMLoss(
        num_classes=num_classes if config.cem_by_class else 1,
        num_components=config.cem_components,
        noise_std=config.noise_std,
        covariance_type=config.cem_covariance,
        variant=config.cem_variant,
        gradient=config.cem_gradient,
        process_group=process_group,
    )


def build_attack(name: str, config: RunConfig, splits: Splits, *, draws: int | None = None) -> Attack:
    """Builds an attack, not yet fitted.

    Args:
        name: one of ``attacks.names()``.
        config: its ``seed`` and the settings that start with ``attack_`` are used.
        splits: images that the attack will be fitted to.
        draws: observations per image of attacks in closed form, at most; None for those of the budget.

    Returns:
        The attack.

    Raises:
        ValueError: a name is unknown, or a setting is out of range.

    Example:
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.experiments import build
        >>> splits = build.load_data(RunConfig(image_size=16))
        >>> build.build_attack("decoder", RunConfig(attack_epochs=3), splits).budget
        "3 epochs of the network 'slim' on its images, minimizing mse"
    """
    given = {"epochs": config.attack_epochs, "gan_epochs": config.attack_gan_epochs, "steps": config.attack_steps}
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if draws is not None:
        settings["draws"] = min(draws, budgeted(config.attack_budget, {})["draws"])
    return attacks.build(
        name,
        image_shape=splits.image_shape,
        decoder=config.attack_decoder,
        seed=config.seed,
        dropout=config.attack_dropout,
        loss=config.attack_loss,
        batch_size=config.attack_batch_size,
        budget=config.attack_budget,
        releases=config.attack_releases,
        **settings,
    )
