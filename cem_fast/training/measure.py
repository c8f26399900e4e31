"""What an attacker observes of a network under a defense, and the accuracy on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cem_fast._support.eval_mode import in_eval_mode
from cem_fast._support.seeding import seeded
from cem_fast.data.splits import Part
from cem_fast.defenses.base import Defense
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
    features = _encoded(model, images)
    if not torch.isfinite(features).all():
        raise FloatingPointError(
            "the features are not finite: the images are not, or training diverged, and a lower learning_rate or lower weights of the "
            "defense and of CEM may help"
        )
    return features


def observer(model: SplitModel, defense: Defense) -> Callable[[Tensor], Tensor]:
    """Returns what an attacker observes: images ``[N, C, H, W]`` -> released features, with fresh noise at every call.

    The encoder is not random, so repeated observations of the same tensor share one pass through it. Images that require a gradient get
    one, through the encoder and the defense; several observations of the same tensor then share one backward pass.

    The mean of ``n`` observations of one image has the noise of ``noise_std / sqrt(n)``: a device must not release an image twice.

    Args:
        model: the network, which must not change while it is observed.
        defense: the defense, whose ``release`` is called.

    Returns:
        The function of images.

    Example:
        >>> import torch
        >>> from cem_fast import defenses, models, training
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> observe = training.observer(model, defenses.GaussianNoise(noise_std=0.1))
        >>> images = torch.rand(5, 1, 16, 16)
        >>> torch.equal(observe(images), observe(images))
        False
    """
    last: tuple[Tensor, int, Tensor] | None = None  # images, their version, and their features

    def observe(images: Tensor) -> Tensor:
        nonlocal last
        differentiated = images.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(differentiated):
            if images.is_inference():  # such tensors have no version
                return defense.release(clean_features(model, images))
            if last is not None:
                known, version, features = last
                if known is images and version == images._version and features.requires_grad == differentiated:
                    return defense.release(features)
            features = _encoded(model, images) if differentiated else clean_features(model, images)
            if features.requires_grad:
                features.register_hook(forget)
            last = (images, images._version, features)
            return defense.release(features)

    def forget(_: Tensor) -> None:
        """Drops features whose graph a backward pass is about to free."""
        nonlocal last
        last = None

    return observe


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
        ValueError: ``draws`` is not positive, or there is no image.

    Example:
        >>> import torch
        >>> from cem_fast import data, defenses, models, training
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> part = data.Part(torch.rand(5, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1]), torch.arange(5))
        >>> training.correctness(model, defenses.GaussianNoise(noise_std=0.1), part, draws=20, seed=0).shape
        torch.Size([5])
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if not len(part):
        raise ValueError("part must hold at least one image, got none")
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
        ValueError: ``draws`` is not positive, or there is no image.

    Example:
        >>> import torch
        >>> from cem_fast import data, defenses, models, training
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> part = data.Part(torch.rand(5, 1, 16, 16), torch.tensor([0, 1, 2, 0, 1]), torch.arange(5))
        >>> 0 <= training.evaluate_accuracy(model, defenses.Bottleneck(), part, draws=1, seed=0) <= 1
        True
    """
    return float(correctness(model, defense, part, draws=draws, seed=seed).mean())


def _encoded(model: SplitModel, images: Tensor) -> Tensor:
    with in_eval_mode(model):
        return torch.cat([model.encoder(part.to(model.device)) for part in images.split(CHUNK)])
