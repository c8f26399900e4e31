"""Attacks on a trained model, and the victims that are shown as pictures."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from cem_fast import metrics, training
from cem_fast._support.seeding import seeded
from cem_fast._support.warn import warn
from cem_fast.attacks.base import Attack, Observe
from cem_fast.attacks.inference import FeatureClassifier
from cem_fast.attacks.nearest import Nearest
from cem_fast.config import RunConfig
from cem_fast.data import Part, Splits, memory
from cem_fast.data.stored import StoredImages
from cem_fast.defenses import Defense
from cem_fast.experiments.build import build_attack
from cem_fast.experiments.records import Outcome
from cem_fast.experiments.watch import Watcher, ignore
from cem_fast.metrics import recognition
from cem_fast.metrics.recognition import Rate
from cem_fast.models.split import SplitModel

NUM_PICTURES = 6
VICTIMS = 1000  # of images in a file, at most
STEPS = 60  # of the progress of an attack, a third for half its budget


def attack_model(
    name: str,
    model: SplitModel,
    defense: Defense,
    splits: Splits,
    config: RunConfig,
    *,
    observe: Observe | None = None,
    draws: int | None = None,
    on_stage: Watcher = ignore,
) -> tuple[Outcome, Tensor, Tensor]:
    """Attacks a trained model, and again with half the budget if the attack has one.

    Args:
        name: one of ``attacks.names()``.
        model: trained network, in eval mode.
        defense: its defense, in eval mode.
        splits: the images, all of them in memory (:func:`in_memory`); the attack learns from ``splits.attacker`` and is measured on
            ``splits.victims``.
        config: its ``seed`` and the settings that start with ``attack_`` are used.
        observe: observer of the network; attacks given the same one share the networks that they start from.
        draws: observations per image of attacks in closed form, at most; None for those of the budget.
        on_stage: called with the stage, the steps done and the steps in total.

    Returns:
        The outcome, the error on every victim ``[N]``, and its reconstructions ``[N, C, H, W]``.

    Raises:
        ValueError: a name is unknown, or a setting is out of range.

    Example:
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments import attack, build
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig()
        >>> model, defense, _ = build.build_parts(config, image_shape=(1, 16, 16), num_classes=2)
        >>> _, errors, rebuilt = attack.attack_model("nearest", model.eval(), defense.eval(), splits, config)
        >>> errors.shape, rebuilt.shape
        (torch.Size([8]), torch.Size([8, 1, 16, 16]))
    """
    observe = observe or training.observer(model, defense)
    truth = splits.victims.images
    full = build_attack(name, config, splits, draws=draws)
    half = full.half_budget()
    stage = f"attack: {name}"
    invert = partial(_invert, observe=observe, splits=splits, device=model.device, seed=config.seed)
    on_stage(stage, 0, STEPS)
    full.on_step = lambda done, total: on_stage(stage, 2 * STEPS * done // (3 * total), STEPS)
    rebuilt = invert(full, releases=config.attack_releases)
    on_stage(stage, 2 * STEPS // 3, STEPS)
    at_half = None
    if half is not None:
        at_half = _mean(metrics.mse(invert(half, releases=config.attack_releases), truth))
    on_stage(stage, STEPS, STEPS)
    errors = metrics.mse(rebuilt, truth)
    outcome = Outcome(
        mse=_mean(errors),
        psnr=_mean(metrics.psnr(rebuilt, truth)),
        ssim=_mean(metrics.ssim(rebuilt, truth)),
        ssim_paper=_mean(metrics.ssim_paper(rebuilt, truth)),
        recognized=recognizer(splits).rate(rebuilt, splits.victims.labels),
        mse_half_budget=at_half,
        knowledge=full.knowledge,
        budget=full.budget,
    )
    return outcome, errors, rebuilt


def infer(
    model: SplitModel,
    defense: Defense,
    splits: Splits,
    *,
    seed: int,
    observe: Observe | None = None,
    on_stage: Watcher = ignore,
) -> dict[str, Rate]:
    """What an attacker reads from released features apart from pixels, each victim observed once.

    ``label`` and ``attribute NAME`` are read by a classifier of features, trained on the attacker's images. ``identity`` is the person on
    the attacker's image with the nearest features, for images of people.

    Args:
        model: trained network, in eval mode.
        defense: its defense, in eval mode.
        splits: the images; the attacker learns from ``splits.attacker`` and is measured on ``splits.victims``.
        seed: seed of the noise and of the classifiers.
        observe: observer of the network.
        on_stage: called with the stage, the steps done and the steps in total.

    Returns:
        Share of the victims by what is read.

    Example:
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments import attack, build
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8), {"glasses": torch.arange(8) % 2})
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> model, defense, _ = build.build_parts(RunConfig(), image_shape=(1, 16, 16), num_classes=2)
        >>> list(attack.infer(model.eval(), defense.eval(), splits, seed=0))
        ['label', 'attribute glasses']
    """
    observe = observe or training.observer(model, defense)
    known, victims, device = splits.attacker, splits.victims, model.device
    asked = {"label": (known.labels, victims.labels)}
    asked |= {f"attribute {name}": (known.attributes[name], values) for name, values in victims.attributes.items()}
    found, total = {}, len(asked) + 1
    images = known.images.to(device)
    with seeded(seed):
        released = observe(victims.images.to(device)).detach()
    for done, (name, (own, truth)) in enumerate(asked.items()):
        on_stage("inference from features", done, total)
        classifier = FeatureClassifier(seed=seed)
        classifier.fit(observe, images, own.to(device))
        found[name] = _rate(classifier.read(released).cpu(), truth)
    on_stage("inference from features", total - 1, total)
    if splits.unit == "people" and torch.isin(victims.groups, known.groups).all():
        nearest = Nearest(image_shape=splits.image_shape, seed=seed)
        nearest.fit(observe, images, known.labels.to(device))
        found["identity"] = _rate(known.groups[nearest.lookup(released).cpu()], victims.groups)
    on_stage("inference from features", total, total)
    return found


def in_memory(splits: Splits, model: SplitModel) -> tuple[Splits, int | None]:
    """The images that attacks work on: the same, unless they are in a file. Of these, as many are drawn as fit into memory.

    All networks are attacked on the same victims. The attacker holds fewer images where features are larger.

    Args:
        splits: the images.
        model: the network, whose features take memory.

    Returns:
        The images, and the observations per image that attacks in closed form have memory for. The latter is None for the same images.

    Example:
        >>> import torch
        >>> from cem_fast import models
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments.attack import in_memory
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=2, cut=2, bottleneck=4)
        >>> in_memory(splits, model)[0] is splits
        True
    """
    if not any(isinstance(part.images, StoredImages) for part in (splits.train, splits.test, splits.attacker)):
        return splits, None
    feature_shape = tuple(training.clean_features(model, splits.attacker.images[:1]).shape[1:])
    drawn = _in_memory(splits, feature_shape)
    return drawn, memory.draws(len(drawn.attacker), feature_shape)


@lru_cache(maxsize=1)
def _in_memory(splits: Splits, feature_shape: tuple[int, ...]) -> Splits:
    most = memory.room(splits.image_shape, feature_shape)
    victims = min(VICTIMS, memory.room(splits.image_shape))
    drawn = memory.held(splits, most, victims, mirror=False, seed=0)
    warn(
        f"attacks hold {len(drawn.attacker)} of {len(splits.attacker)} images and rebuild {len(drawn.victims)} of {len(splits.victims)}, "
        "drawn by a fixed seed: all of them do not fit into 2 GB with their features"
    )
    return drawn


def _rate(read: Tensor, truth: Tensor) -> Rate:
    return Rate(_mean(read == truth), recognition.chance(truth))


def choose_pictures(part: Part, count: int = NUM_PICTURES) -> Tensor:
    """Chooses the images to show, by class alone.

    Takes the first image of each of ``count`` evenly spaced classes, and further images where there are fewer classes.

    Args:
        part: the images.
        count: how many to choose.

    Returns:
        Indices ``[P]``, at most ``count``.

    Example:
        >>> import torch
        >>> from cem_fast.data import Part
        >>> from cem_fast.experiments import attack
        >>> labels = torch.tensor([0, 0, 1, 1, 2, 2])
        >>> attack.choose_pictures(Part(torch.zeros(6, 1, 4, 4), labels, torch.arange(6)), count=4)
        tensor([0, 2, 4, 1])
    """
    rank = torch.zeros_like(part.labels)
    for label in part.labels.unique():
        of_class = part.labels == label
        rank[of_class] = torch.arange(int(of_class.sum()))
    order = sorted(range(len(part)), key=lambda i: (int(rank[i]), int(part.labels[i])))
    firsts = [i for i in order if rank[i] == 0]
    if len(firsts) > count:
        order = [firsts[round(k * (len(firsts) - 1) / (count - 1))] for k in range(count)]
    return torch.tensor(order[:count])


@lru_cache(maxsize=1)
def recognizer(splits: Splits) -> recognition.Recognizer:
    """Fits the classifier of clean images that reconstructions are given to, once for all attacks on the same images.

    Args:
        splits: the images; it learns from ``splits.attacker``.

    Returns:
        The fitted classifier.

    Example:
        >>> import torch
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments import attack
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> attack.recognizer(splits) is attack.recognizer(splits)
        True
    """
    return recognition.Recognizer(splits.attacker.images, splits.attacker.labels)


def _invert(
    attack: Attack, observe: Observe, splits: Splits, device: torch.device, *, seed: int, releases: int
) -> Tensor:
    """Reconstructions of the victims, each observed as often as the attack was built for, with independent noise."""
    known, secret = splits.attacker, splits.victims.images.to(device)
    with seeded(seed):
        attack.fit(observe, known.images.to(device), known.labels.to(device))
        seen = [observe(secret) for _ in range(releases)]
        return attack.reconstruct(seen[0] if releases == 1 else torch.stack(seen)).detach().cpu()


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
