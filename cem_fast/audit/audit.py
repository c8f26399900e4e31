"""The audit: attacks, readings and estimates on one encoder."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from cem_fast import data, metrics, training
from cem_fast._support.eval_mode import in_eval_mode
from cem_fast._support.lookup import lookup
from cem_fast.attacks import names as attack_names
from cem_fast.attacks.view import Averaged
from cem_fast.audit import estimates, parts
from cem_fast.audit.limits import OF_LABELS, Limit, judge
from cem_fast.audit.records import Audit, Tried
from cem_fast.audit.targets import Normalization, Pairs, Target, as_images
from cem_fast.config import RunConfig
from cem_fast.data import memory
from cem_fast.data.items import LabeledImages
from cem_fast.data.splits import Splits
from cem_fast.defenses import Defense, GaussianNoise, NoDefense
from cem_fast.experiments.attack import attack_model, choose_pictures, infer, recognizer
from cem_fast.experiments.provenance import versions
from cem_fast.experiments.watch import Watcher, ignore
from cem_fast.models.split import SplitModel

ATTACKS = {
    "quick": ("ridge", "decoder"),
    "standard": ("ridge", "decoder", "optimization"),
    "thorough": ("ridge", "decoder", "optimization", "inversion", "flow"),
}
VICTIMS = 1000
MOST_NOISE = 1e18  # whose square float32 holds


def audit(
    encoder: Callable[[Tensor], Any] | nn.Module | Tensor,
    images: Tensor | Splits | LabeledImages | DataLoader[Any],
    labels: Tensor | None = None,
    *,
    decoder: nn.Module | None = None,
    noise_std: float = 0.0,
    defense: Defense | None = None,
    releases: int = 1,
    attacks: Sequence[str] | None = None,
    limits: Sequence[str] = (),
    budget: str = "standard",
    victims: int = VICTIMS,
    attacker_images: int | None = None,
    mirror: bool = False,
    normalize: Normalization | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    name: str = "encoder",
    digest: str = "",
    verdicts_only: bool = False,
    on_stage: Watcher = ignore,
) -> Audit:
    """Audits an encoder.

    Each attack learns from the attacker's images and rebuilds the victims, four fifths and one fifth of the images, unless splits are
    given. The encoder runs in eval mode, in its own dtype and on its own device. Errors are those of pixels in [0, 1].

    Args:
        encoder: a module or any function from images to features of any shape; or the features ``[N, ...]`` of the images, as they were
            released, which only attacks that learn from pairs can use.
        images: ``[N, C, H, W]``, uint8 or float in [0, 1]; or splits; or a map-style data set of pairs (image, label), or its loader.
        labels: classes ``[N]``; None if there are none.
        decoder: the rest of the network, for the accuracy; None if it is not there.
        noise_std: standard deviation of the Gaussian noise added to the features; 0 for none.
        defense: a defense in place of the noise.
        releases: messages of each image, with independent noise, that the attacker uses jointly.
        attacks: names of attacks; None for those of the budget.
        limits: limits such as ``mse >= 0.01``.
        budget: ``quick``, ``standard`` or ``thorough``.
        victims: images under attack, at most, drawn by ``seed``.
        attacker_images: images that the attacker holds, at most, drawn by ``seed``; None for as many as fit into 2 GB with all that attacks
            make of them.
        mirror: whether the attacker also learns from mirror images of its own, which take as much room.
        normalize: mean and standard deviation of the channels; None for the encoder's own preprocessing.
        device: where modules are moved to, and attacks compute; None for where they are. A function stays where it computes.
        seed: seed of all random choices.
        name: name of the encoder in the result.
        digest: digest of its file.
        verdicts_only: whether to leave out the readings and estimates that no limit judges.
        on_stage: called with the stage, the steps done and the steps in total.

    Returns:
        The result; ``passed`` says whether all limits hold.

    Raises:
        ValueError: an argument is out of range, a limit needs labels, or an attack fails.

    Source:
        OWASP, "AI Security Verification Standard", 8.4.1 (an audit as a regression gate).

    Example:
        >>> import torch
        >>> from cem_fast.audit import audit
        >>> images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> result = audit(torch.nn.AvgPool2d(2), images, attacks=["ridge"], limits=["mse >= 0.5"])
        >>> result.passed, result.limits[0].attack, result.data["num_victims"]
        (False, 'ridge', 8)
    """
    wanted = [Limit.parse(limit) for limit in limits]
    chosen_attacks = chosen(attacks, budget)
    if not 0 <= noise_std <= MOST_NOISE:
        raise ValueError(f"noise_std must be from 0 to {MOST_NOISE:g}, got {noise_std}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")
    if releases < 1 or victims < 2:
        raise ValueError(f"releases must be at least 1 and victims at least 2, got {releases} and {victims}")
    if defense is not None and noise_std:
        raise ValueError(f"noise_std must be 0 with a defense, which has its own noise, got {noise_std}")
    if attacker_images is not None and attacker_images < 10:
        raise ValueError(f"attacker_images must be at least 10, got {attacker_images}")
    drawn = attacker_images and attacker_images + victims
    splits = images if isinstance(images, Splits) else parts.read(images, labels, drawn, seed=seed)
    labeled = splits.num_classes > 1
    if "lpips" in {limit.metric for limit in wanted}:
        _require_lpips(splits)
    needing = [limit.text for limit in wanted if limit.metric in OF_LABELS and not labeled]
    if needing:
        raise ValueError(f"the limit {needing[0]!r} needs labels of at least 2 classes, got none")
    if isinstance(encoder, Tensor):
        if not isinstance(images, Tensor) or len(encoder) != len(images):
            raise ValueError(f"features must be one for each image of a tensor, got {len(encoder)}")
        if mirror:
            raise ValueError("mirror needs an encoder: pairs have no features of mirror images")
        encoder = Pairs(as_images(images, "images"), encoder)
    target = Target(encoder, normalize)
    model = SplitModel(target, decoder or nn.Identity())
    defense = defense or (GaussianNoise(noise_std=noise_std) if noise_std else NoDefense())
    for each in (model, defense) if device is not None else ():
        each.to(device)
    measures: dict[str, dict[str, Tensor]] = {limit.metric: {} for limit in wanted}
    with in_eval_mode(model, defense):
        shape = _check(model, splits)
        most = attacker_images or memory.room(splits.image_shape, shape)
        splits = memory.held(splits, most, victims, mirror=mirror, seed=seed)
        draws = memory.draws(len(splits.attacker), shape)
        observe = training.observer(model, defense)
        config = RunConfig(attack_budget=budget, attack_releases=releases, seed=seed)
        tried, pictures = {}, {"original": splits.victims.images[choose_pictures(splits.victims)]}
        for attack in chosen_attacks:
            tried[attack], rebuilt, measured = _attacked(
                attack, model, defense, splits, config, observe, draws, [*measures], on_stage, labeled
            )
            pictures[attack] = rebuilt[choose_pictures(splits.victims)]
            for metric, values in measured.items():
                measures[metric][attack] = values
        label = None
        if labeled and ("label" in measures or not verdicts_only):
            heard = observe if releases == 1 else Averaged(observe, releases)
            rate = infer(model, defense, splits, seed=seed, observe=heard, on_stage=on_stage)["label"]
            label = {"share": rate.share, "chance": rate.chance}
            if "label" in measures:
                right = round(rate.share * len(splits.victims))
                measures["label"]["label"] = (torch.arange(len(splits.victims)) < right).double()
        accuracy = clean = information = None
        if labeled and decoder is not None and not verdicts_only:
            accuracy = training.evaluate_accuracy(model, defense, splits.victims, draws=5, seed=seed)
            clean = training.evaluate_accuracy(model, NoDefense(), splits.victims, draws=1, seed=seed)
        if noise_std and not verdicts_only:
            information = estimates.information(model, splits, noise_std, releases=releases, seed=seed)
    verdicts = tuple(judge(limit, measures[limit.metric], seed=seed) for limit in wanted)
    return Audit(
        passed=all(each.holds for each in verdicts),
        limits=verdicts,
        attacks=tried,
        not_tried=tuple(each for each in attack_names() if each not in chosen_attacks),
        baseline=data.baselines(splits),
        label=label,
        information=information,
        data=_facts(splits, mirror),
        target={"name": name, "digest": digest or target.digest()},
        accuracy=accuracy,
        clean_accuracy=clean,
        noise_std=defense.noise_std,
        releases=releases,
        seed=seed,
        versions=versions(),
        pictures=pictures,
    )


def chosen(attacks: Sequence[str] | None, budget: str) -> tuple[str, ...]:
    """Names of the attacks to try.

    Args:
        attacks: as of :func:`audit`.
        budget: as of :func:`audit`.

    Raises:
        ValueError: a name is unknown, or there is none.

    Example:
        >>> from cem_fast.audit.audit import chosen
        >>> chosen(None, "quick")
        ('ridge', 'decoder')
    """
    lookup("budget", budget, ATTACKS)
    found = tuple(dict.fromkeys(ATTACKS[budget] if attacks is None else attacks))
    for each in found:
        lookup("attack", each, dict.fromkeys(attack_names()))
    if not found:
        raise ValueError("attacks must name at least one attack, got none")
    return found


def _require_lpips(splits: Splits) -> None:
    """Fails before any attack if LPIPS cannot be computed."""
    try:
        metrics.lpips(splits.victims.images[:1], splits.victims.images[:1])
    except (ImportError, RuntimeError) as error:
        raise ValueError(f"a limit on lpips cannot be judged: {error}") from error


def _facts(splits: Splits, mirror: bool) -> dict[str, Any]:
    """What audit.json says of the images."""
    held = len(splits.attacker) // (2 if mirror else 1)
    return {
        "name": splits.name,
        "num_classes": splits.num_classes if splits.num_classes > 1 else 0,
        "num_attacker": held,
        "num_available": splits.num_available or held,
        "mirror": mirror,
        "num_victims": len(splits.victims),
        "num_shared": splits.victims.num_in(splits.attacker),
        "image_shape": list(splits.image_shape),
        "digest": splits.digest(),
    }


def _check(model: SplitModel, splits: Splits) -> tuple[int, ...]:
    """The shape of the features of an image. Requires finite features with one row an image."""
    probe = splits.victims.images[:2]
    try:
        with torch.no_grad():
            features = model.encoder(probe)
    except Exception as error:  # the user's network
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"the encoder fails on images of shape {tuple(probe.shape)}: {reason}") from error
    if features.dim() < 2 or len(features) != len(probe) or not bool(features.isfinite().all()):
        raise ValueError(f"the encoder must give finite features [{len(probe)}, ...], got {tuple(features.shape)}")
    return tuple(features.shape[1:])


def _attacked(
    name: str,
    model: SplitModel,
    defense: Defense,
    splits: Splits,
    config: RunConfig,
    observe: Callable[[Tensor], Tensor],
    draws: int,
    wanted: Sequence[str],
    on_stage: Watcher,
    labeled: bool,
) -> tuple[Tried, Tensor, dict[str, Tensor]]:
    """The outcome of an attack, its reconstructions, and the wanted metrics of every victim."""
    start = time.perf_counter()
    try:
        found, errors, rebuilt = attack_model(
            name, model, defense, splits, config, observe=observe, draws=draws, on_stage=on_stage
        )
    except (ValueError, RuntimeError, ArithmeticError, NotImplementedError) as error:
        raise ValueError(f"the attack {name} fails: {error}") from error
    if not bool(errors.isfinite().all()):
        raise ValueError(f"the attack {name} fails: its reconstructions are not finite")
    truth = splits.victims
    of: Mapping[str, Callable[[], Tensor]] = {
        "mse": lambda: errors,
        "psnr": lambda: metrics.psnr(rebuilt, truth.images),
        "ssim": lambda: metrics.ssim(rebuilt, truth.images),
        "lpips": lambda: metrics.lpips(rebuilt, truth.images),
        "recognized": lambda: (recognizer(splits).names(rebuilt).cpu() == truth.labels).double(),
    }
    measured = {metric: of[metric]() for metric in wanted if metric in of}
    tried = Tried(
        mse=found.mse,
        psnr=found.psnr,
        ssim=found.ssim,
        recognized=found.recognized if labeled else None,
        mse_half_budget=found.mse_half_budget,
        knowledge=found.knowledge,
        budget=found.budget,
        seconds=time.perf_counter() - start,
        lpips=float(measured["lpips"].double().mean()) if "lpips" in measured else None,
    )
    return tried, rebuilt, measured
