"""Estimates of the information in what an encoder sends."""

from __future__ import annotations

import torch
from torch import Tensor

from cem_fast import bounds, training
from cem_fast.data.splits import Part, Splits
from cem_fast.mixture import GaussianMixture
from cem_fast.models.split import SplitModel

COMPONENTS = 5  # of a class, in the mixture that information is estimated with
BEYOND = 2.0  # radius that features are assumed to keep, in units of the furthest of the attacker's
DELTA = 0.05  # probability that the upper bound fails
SLOPES = 64  # victims of which the Fisher information is computed


def information(
    model: SplitModel, splits: Splits, noise_std: float, *, releases: int, seed: int
) -> dict[str, float | None]:
    """Estimates for all messages of an image together, with Gaussian noise; see :mod:`cem_fast.bounds`.

    Args:
        model: the network, in eval mode.
        splits: the images; a mixture is fitted to features of the attacker's, and tested on those of the victims.
        noise_std: standard deviation of the noise.
        releases: messages of one image.
        seed: seed of the mixture and of the noise.

    Returns:
        ``heldout_nats``, ``heldout_se``, ``plugin_nats``; ``upper_nats``, which holds with 95% confidence for features within ``radius``,
        and is None where a victim lies outside; ``dfil`` and ``unbiased_mse``, which are None for an encoder without gradients.

    Example:
        >>> import torch
        >>> from cem_fast import SplitModel
        >>> from cem_fast.audit import estimates, parts
        >>> splits = parts.split(torch.rand(40, 1, 8, 8), None, seed=0)
        >>> model = SplitModel(torch.nn.AvgPool2d(2), torch.nn.Identity())
        >>> found = estimates.information(model, splits, 0.1, releases=1, seed=0)
        >>> found["heldout_nats"] < found["upper_nats"]
        True
    """
    own, secret = splits.attacker, splits.victims
    fewest = int(torch.bincount(own.labels, minlength=splits.num_classes).min())
    mixture = GaussianMixture(
        num_components=max(1, min(COMPONENTS, fewest)),
        num_classes=splits.num_classes,
        covariance_type="spherical",
        algorithm="kmeans",
        generator=torch.Generator().manual_seed(seed),
    )
    features, held_out = (_features(model, part) for part in (own, secret))
    mixture.fit(features, own.labels if splits.num_classes > 1 else None)
    # the center that heldout_upper_bound measures from
    center = (mixture.class_prior[:, None, None] * mixture.weights[..., None] * mixture.means).sum((0, 1))
    radius = BEYOND * float((features - center).norm(dim=1).max()) + 1e-6
    noise = noise_std / releases**0.5
    generator = torch.Generator().manual_seed(seed)
    nats, error = bounds.heldout_information(mixture, held_out, noise, generator=generator)
    plugin = bounds.plugin_information(mixture, noise)
    upper = None
    if float((held_out - center).norm(dim=1).max()) < 0.999 * radius:  # apart from rounding
        generator = torch.Generator().manual_seed(seed)
        upper = float(
            bounds.heldout_upper_bound(mixture, held_out, noise, radius=radius, delta=DELTA, generator=generator)
        )
    return {
        "heldout_nats": float(nats),
        "heldout_se": float(error),
        "plugin_nats": float(plugin),
        "upper_nats": upper,
        "radius": radius,
        **_fisher(model, secret.images[:SLOPES], noise_std, releases, seed),
    }


def _fisher(model: SplitModel, images: Tensor, noise_std: float, releases: int, seed: int) -> dict[str, float | None]:
    """Mean Fisher information per pixel, and the mean of its inverse, the least error of an unbiased attack."""
    generator = torch.Generator(model.device).manual_seed(seed)
    images = images.to(model.device)
    try:
        found = bounds.fisher_information(model.encoder, images, noise_std, releases=releases, generator=generator)
    except (ValueError, RuntimeError):  # no gradient, or an operation without a derivative
        return {"dfil": None, "unbiased_mse": None}
    return {"dfil": float(found.mean()), "unbiased_mse": float((1 / found.clamp_min(1e-12)).mean())}


def _features(model: SplitModel, part: Part) -> Tensor:
    return training.clean_features(model, part.images).flatten(1).cpu()
