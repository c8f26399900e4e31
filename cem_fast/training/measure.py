"""Clean features of a network, fits to them, and the accuracy on released ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cem_fast._support.counts import require_count
from cem_fast._support.eval_mode import in_eval_mode
from cem_fast._support.ranks import Ranks
from cem_fast._support.seeding import seeded
from cem_fast.data.splits import Part
from cem_fast.data.stored import MEMORY, StoredImages
from cem_fast.defenses.base import Defense, require_seeded
from cem_fast.models.split import SplitModel

if TYPE_CHECKING:
    from cem_fast.loss import CEMLoss

ALONE = Ranks()
CHUNK = 256  # images per pass
CACHED = 1 << 16  # values of the images of a pass on the CPU: intermediate results then stay in its cache
FEATURES = MEMORY // 4  # bytes of the features of images in a file that are held in memory


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
    labels = part.labels.to(model.device)
    hits = torch.zeros(len(part), dtype=torch.float64, device=model.device)
    with in_eval_mode(model, defense), seeded(seed, "accuracy"):
        for rows in _portions(model, part.images):
            features = clean_features(model, part.images[rows])
            for _ in range(draws):
                released = defense.release(features)
                predicted = torch.cat([model.decoder(some).argmax(1) for some in released.split(CHUNK)])
                hits[rows] += predicted == labels[rows]
    return hits.cpu() / draws


def _portions(model: SplitModel, images: Tensor) -> Iterator[slice]:
    """Images whose features fit into memory together; all of them if they are in memory themselves."""
    count = fitting(model, images)
    return (slice(start, start + count) for start in range(0, len(images), count))


def fitting(model: SplitModel, images: Tensor) -> int:
    """The number of images whose features fit into memory; all of them if they are in memory themselves.

    Args:
        model: the network.
        images: ``[N, C, H, W]``.

    Example:
        >>> import torch
        >>> from cem_fast import models
        >>> from cem_fast.training.measure import fitting
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> fitting(model, torch.rand(5, 1, 16, 16))
        5
    """
    if not isinstance(images, StoredImages):
        return len(images)
    return max(CHUNK, FEATURES // (4 * math.prod(clean_features(model, images[:1]).shape)))


@torch.no_grad()
def fit(
    loss: CEMLoss,
    model: SplitModel,
    images: Tensor,
    labels: Tensor | None,
    *,
    ranks: Ranks = ALONE,
    sent: Callable[[Tensor], Tensor] = lambda features: features,
) -> None:
    """Fits a CEM loss to the features of images.

    The features of images in a file that do not fit into memory are computed again in every iteration of the fit.

    Args:
        loss: the loss.
        model: the network; its mode stays as it was.
        images: ``[N, C, H, W]``.
        labels: classes ``[N]``; None for one class.
        ranks: the processes of the loss's group, each of which computes the features of its share.
        sent: from clean features ``[N, ...]`` to those that the loss is fitted to.

    Raises:
        FloatingPointError: a feature is not finite.

    Example:
        >>> import torch
        >>> from cem_fast import CEMLoss, models
        >>> from cem_fast.training.measure import fit
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> cem = CEMLoss(num_classes=3, num_components=1)
        >>> fit(cem, model, torch.rand(6, 1, 16, 16), torch.arange(6) % 3)
        >>> cem.is_fitted
        True
    """
    fits = -(-len(images) // ranks.count) <= fitting(model, images)
    images, labels = ranks.share(images), None if labels is None else ranks.share(labels)
    if fits:
        loss.fit(sent(clean_features(model, images)), labels)
    else:
        loss.fit_loader(_Features(model, sent), _Batches(images, labels), memory_budget=FEATURES)


class _Features(nn.Module):
    """The features that a loss is fitted to, as a module."""

    def __init__(self, model: SplitModel, sent: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model, self.sent = model, sent

    def forward(self, images: Tensor) -> Tensor:
        return self.sent(clean_features(self.model, images))


class _Batches:
    """Batches of images and labels, in the same order in every pass."""

    def __init__(self, images: Tensor, labels: Tensor | None):
        self.images, self.labels = images, labels

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        for start in range(0, len(self.images), CHUNK):
            rows = slice(start, start + CHUNK)
            yield (self.images[rows],) if self.labels is None else (self.images[rows], self.labels[rows])


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
    """Features of the encoder in eval mode, in passes of up to 256 images, with a gradient where it is enabled.

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
    count = CHUNK
    if model.device.type == "cpu":
        count = max(4, min(count, CACHED // max(1, math.prod(images.shape[1:]))))
    with in_eval_mode(model):
        return torch.cat([model.encoder(part.to(model.device)) for part in images.split(count)])
