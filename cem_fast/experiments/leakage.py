"""Information in released features, estimated with the same kind of mixture for every run."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from cem_fast import bounds, training
from cem_fast._support.seeding import seeded
from cem_fast.config import RunConfig
from cem_fast.data import Part, Splits, memory
from cem_fast.defenses import Defense
from cem_fast.experiments.build import build_loss
from cem_fast.experiments.records import Leakage
from cem_fast.experiments.saved_run import Run
from cem_fast.loss import CEMLoss
from cem_fast.models.split import SplitModel
from cem_fast.training.measure import fit as fit_to_features
from cem_fast.training.measure import fitting

COMPONENTS = 5  # per class


def fit(loss: CEMLoss | None, config: RunConfig, model: SplitModel, defense: Defense, splits: Splits) -> CEMLoss | None:
    """Fits a CEM loss to the features of the training images before the noise.

    Args:
        loss: the loss; None is passed through.
        config: its ``seed`` is used.
        model: trained network.
        defense: its defense.
        splits: the images; only the training part is used.

    Returns:
        The fitted loss, or None.

    Example:
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments import build, leakage
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(cem_components=1)
        >>> model, defense, loss = build.build_parts(config, image_shape=(1, 16, 16), num_classes=2)
        >>> leakage.fit(loss, config, model.eval(), defense.eval(), splits).is_fitted
        True
    """
    if loss is not None:
        with seeded(config.seed):
            labels = splits.train.labels.to(model.device) if loss.mixture.num_classes > 1 else None
            fit_to_features(loss.to(model.device), model, splits.train.images, labels, sent=defense.before_noise)
    return loss


def fitted_mixture(config: RunConfig, model: SplitModel, defense: Defense, splits: Splits) -> CEMLoss | None:
    """Fits the mixture that leakage is estimated with.

    It has five spherical components per class, fewer where a class has fewer images, whatever mixture CEM trains with:
    estimates of different runs can be compared.

    Args:
        config: settings of the run.
        model: trained network.
        defense: its defense.
        splits: the images; only the training part is used.

    Returns:
        A CEM loss with the fitted mixture; None without noise.

    Example:
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments import build, leakage
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(cem_components=1)
        >>> model, defense, _ = build.build_parts(config, image_shape=(1, 16, 16), num_classes=2)
        >>> leakage.fitted_mixture(config, model.eval(), defense.eval(), splits).mixture.num_components
        4
    """
    fewest = int(torch.bincount(splits.train.labels, minlength=splits.num_classes).min())
    shared = replace(
        config,
        cem_by_class=True,
        cem_components=min(COMPONENTS, max(1, fewest)),
        cem_covariance="spherical",
        cem_variant="paper",
    )
    return fit(build_loss(shared, num_classes=splits.num_classes), config, model, defense, splits)


def estimate(loss: CEMLoss | None, model: SplitModel, defense: Defense, splits: Splits, *, seed: int) -> Leakage:
    """Estimates the information in the released features of the test images, in nats.

    Args:
        loss: result of :func:`fitted_mixture`.
        model: trained network.
        defense: its defense.
        splits: the images; only the test part is used, or a draw of it where its features do not fit into memory.
        seed: seed of the noise.

    Returns:
        The estimates, all None without noise, since no bound is finite then.

    Example:
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments import build, leakage
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> config = RunConfig(defense="bottleneck", noise_std=0.0)
        >>> model, defense, loss = build.build_parts(config, image_shape=(1, 16, 16), num_classes=2)
        >>> leakage.estimate(loss, model, defense, splits, seed=0)
        Leakage(plugin_nats=None, heldout_nats=None, heldout_se=None, capacity_nats=None)
    """
    if loss is None:
        return Leakage(None, None, None)
    with seeded(seed, "leakage"):
        sent = _before_noise(model, defense, _sample(model, splits.test).images)
    generator = torch.Generator(device=model.device).manual_seed(seed)
    nats, error = bounds.heldout_information(loss.mixture, sent, defense.noise_std, generator=generator)
    return Leakage(
        plugin_nats=float(bounds.plugin_information(loss.mixture, defense.noise_std)),
        heldout_nats=float(nats),
        heldout_se=float(error),
        capacity_nats=_capacity(model, defense, sent[0].numel()),
    )


def _capacity(model: SplitModel, defense: Defense, num_features: int) -> float | None:
    """The most that the released features can carry; None where the encoder does not end in a Sigmoid or the defense scales features."""
    last = [module for module in model.encoder.modules() if not isinstance(module, nn.Unflatten)][-1]
    if not (isinstance(last, nn.Sigmoid) and defense.keeps_range):
        return None
    return float(bounds.channel_capacity(num_features, defense.noise_std))


@torch.no_grad()
def posteriors(run: Run) -> Tensor:
    """Posteriors of the right class and of the right component over the test images of a run (Eq. 4).

    Args:
        run: a saved run; every image is released as often as for the accuracy.

    Returns:
        ``[2]``, each in [0, 1].

    Raises:
        FileNotFoundError: the images are not where they were.
        ValueError: the run has no noise, or its images have changed.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from cem_fast.config import RunConfig
        >>> from cem_fast.data import Part, Splits
        >>> from cem_fast.experiments import leakage
        >>> from cem_fast.experiments.run import run
        >>> from cem_fast.experiments.saved_run import load_run
        >>> part = Part(torch.rand(8, 1, 16, 16), torch.arange(8) % 2, torch.arange(8))
        >>> splits = Splits("tiny", part, part, part, 2, ("a", "b"))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = run(RunConfig(epochs=1, cem_components=1), folder, splits=splits, attack=False)
        ...     loaded = load_run(folder)
        >>> loaded.data = splits  # images of no data set that could be read again
        >>> leakage.posteriors(loaded).shape
        torch.Size([2])
    """
    if run.loss is None:
        raise ValueError(f"{run.path}: posteriors need noise, got noise_std 0")
    part, draws = _sample(run.model, run.data.test), run.config.noise_draws
    labels = part.labels.repeat(draws) if run.config.cem_by_class else None
    with seeded(run.config.seed, "utility"):
        sent = _before_noise(run.model, run.defense, part.images).flatten(1)
        found = bounds.utility(run.loss.mixture, sent.repeat(draws, 1), labels, run.config.noise_std)
    return torch.stack([found.label, found.component])


def _sample(model: SplitModel, part: Part) -> Part:
    """As many images as have features that fit into memory, drawn by a fixed seed; all if they are in memory themselves."""
    return memory.drawn(part, fitting(model, part.images), seed=0)


@torch.no_grad()
def _before_noise(model: SplitModel, defense: Defense, images: Tensor) -> Tensor:
    """Features ``[N, ...]`` that a defense adds its Gaussian noise to: the noise hides these, whatever was done before."""
    return defense.before_noise(training.clean_features(model, images))
