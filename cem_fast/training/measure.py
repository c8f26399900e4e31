"""Clean features of a network, and the accuracy on released ones."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_fast._support.counts import require_count
from cem_fast._support.eval_mode import in_eval_mode
from cem_fast._support.seeding import seeded
from cem_fast.data.splits import Part
from cem_fast.defenses.base import Defense, require_seeded
from cem_fast.models.split import SplitModel

CHUNK = 256  # images per pass


@torch.no_grad()
def clean_features(model: SplitModel, images: Tensor) -> Tensor:
    """Features of the encoder before the defense, with batch normalization in eval mode.

    Args:
        model: the network; its mode stays as it was.
        images: ``[N, C, H, W]``.

    Returns:
        ``[N, ...]``.

    Raises:
        FloatingPointError: a feature is not finite.

    Example:
        >>> import torch
        >>> from cem_fast import models, training
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> features = training.clean_features(model, torch.rand(5, 1, 16, 16))
        >>> features.shape, features.requires_grad
        (torch.Size([5, 4, 4, 4]), False)
    """
    features = encoded(model, images)
    if not torch.isfinite(features).all():
        raise FloatingPointError(
            "the features are not finite: the images are not, or training diverged, and a lower learning_rate or lower weights of the "
            "defense and of CEM may help"
        )
    return features


@torch.no_grad()
def correctness(model: SplitModel, defense: Defense, part: Part, *, draws: int, seed: int) -> Tensor:
    """Share of the draws of the defense's noise in which each image is classified correctly from its released features.

    Args:
        model: the network; measured in eval mode, after which its mode is as it was.
        defense: the defense; likewise.
        part: images and labels.
        draws: releases of every image, at least 1.
        seed: seed of the draws.

    Returns:
        ``[N]`` float64, in [0, 1].

    Raises:
        ValueError: ``draws`` is not positive, there is no image, or the defense draws securely, which no seed repeats.

    Example:
        >>> import torch
        >>> from cem_fast import data, defenses, models, training
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> part = data.Part(torch.rand(5, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1]), torch.arange(5))
        >>> training.correctness(model, defenses.GaussianNoise(noise_std=0.1), part, draws=20, seed=0).shape
        torch.Size([5])
    """
    require_count("draws", draws)
    if not len(part):
        raise ValueError("part must hold at least one image, got none")
    require_seeded(defense)
    features, labels = clean_features(model, part.images), part.labels.to(model.device)
    hits = torch.zeros(len(part), dtype=torch.float64, device=model.device)
    with in_eval_mode(model, defense), seeded(seed, "accuracy"):
        for _ in range(draws):
            released = defense.release(features)
            predicted = torch.cat([model.decoder(rows).argmax(1) for rows in released.split(CHUNK)])
            hits += predicted == labels
    return hits.cpu() / draws


def evaluate_accuracy(model: SplitModel, defense: Defense, part: Part, *, draws: int, seed: int) -> float:
    """Accuracy on released features: the mean of :func:`cem_fast.training.correctness`.

    Args:
        model: the network; measured in eval mode, after which its mode is as it was.
        defense: the defense; likewise.
        part: images and labels.
        draws: releases of every image, at least 1.
        seed: seed of the draws.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: ``draws`` is not positive, there is no image, or the defense draws securely, which no seed repeats.

    Example:
        >>> import torch
        >>> from cem_fast import data, defenses, models, training
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> part = data.Part(torch.rand(5, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1]), torch.arange(5))
        >>> 0 <= training.evaluate_accuracy(model, defenses.Bottleneck(), part, draws=1, seed=0) <= 1
        True
    """
    return float(correctness(model, defense, part, draws=draws, seed=seed).mean())


def encoded(model: SplitModel, images: Tensor) -> Tensor:
    """Features of the encoder in eval mode, in passes of a few hundred images, with a gradient where it is enabled.

    Args:
        model: the network; its mode stays as it was.
        images: ``[N, C, H, W]``.

    Returns:
        ``[N, ...]`` on the network's device.

    Example:
        >>> import torch
        >>> from cem_fast import models
        >>> from cem_fast.training.measure import encoded
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> encoded(model, torch.rand(5, 1, 16, 16)).shape
        torch.Size([5, 4, 4, 4])
    """
    with in_eval_mode(model):
        return torch.cat([model.encoder(part.to(model.device)) for part in images.split(CHUNK)])
