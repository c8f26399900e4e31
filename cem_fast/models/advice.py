"""Where to cut a network: how far features of a class spread, and what they tell about the image."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cem_fast._support.eval_mode import in_eval_mode
from cem_fast.functional import component_statistics, mixture_log_prob

CHUNK = 64  # images per pass
MEMORY = 1 << 30  # bytes of the class means of all cuts that are measured in one pass
EVERY = 5  # one image of so many is held out


@dataclass(frozen=True)
class Spread:
    """Features at a cut.

    Args:
        radius: R_c^2, the mean squared distance of features from the mean of their class.
        information: held-out estimate of an upper bound on the information about an image, in nats.

    Example:
        >>> from cem_fast.models.advice import Spread
        >>> Spread(radius=2.5, information=40.0).radius
        2.5
    """

    radius: float
    information: float


def spreads(
    network: nn.Module, names: Sequence[str], sizes: Sequence[int], images: Tensor, labels: Tensor, *, noise: float
) -> list[Spread]:
    """Measures the features at cuts, on one pass over four fifths of the images and one over the others.

    ``R_c^2 = mean_n |z_n - mu_{y_n}|^2``; the information is ``E[ -log q(z + noise) ] - H(noise)``, with q one Gaussian per class,
    of variance ``R_c^2 / D`` with the noise on top. The noise is in units of the features' own standard deviation, for comparable cuts.

    Args:
        network: the network.
        names: modules whose last results are the features.
        sizes: number of features of each.
        images: ``[N, C, H, W]``, on the device and with the dtype that the network takes; every fifth is held out.
        labels: their classes ``[N]``.
        noise: standard deviation of the noise, in units of that of the features.

    Source:
        "Golden Partition Zone", arXiv 2506.15412 (the radius as a guide to the cut).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from cem_fast.models.advice import spreads
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
        >>> images, labels = torch.rand(40, 1, 8, 8), torch.arange(40) % 2
        >>> [one.radius < 6 for one in spreads(network, ["0"], [64], images, labels, noise=0.1)]
        [True]
    """
    _, labels = labels.to(images.device).unique(return_inverse=True)
    held_out = torch.arange(len(images), device=images.device) % EVERY == EVERY - 1
    own, secret = (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])
    found: list[Spread] = []
    most = max(1, MEMORY // (8 * (int(labels.max()) + 1)))
    start = 0
    while start < len(names):
        stop = start + 1
        while stop < len(names) and sum(sizes[start : stop + 1]) <= most:
            stop += 1
        found += _measured(network, names[start:stop], own, secret, noise)
        start = stop
    return found


class _Classes:
    """Sums over the features of each class, about zero."""

    def __init__(self, count: int):
        self.count = count
        self.rows: Tensor | None = None

    def add(self, features: Tensor, labels: Tensor) -> None:
        found = component_statistics(features, features.new_zeros(self.count, 1, features.shape[1]), labels, sums=True)
        assert found.sums is not None
        if self.rows is None:
            self.rows, self.scatter, self.sums = found.counts[:, 0], found.scatter[:, 0], found.sums[:, 0]
        else:
            self.rows += found.counts[:, 0]
            self.scatter += found.scatter[:, 0]
            self.sums += found.sums[:, 0]

    def fit(self, noise: float) -> None:
        """Class means, R_c^2 of all classes, and a Gaussian of each class with the noise on top."""
        assert self.rows is not None
        total, rows = self.rows.sum(), self.rows.clamp_min(1)
        self.means = self.sums / rows[:, None]
        within = (self.scatter - rows * self.means.square().sum(1)).clamp_min(0)  # about the mean of the class
        self.radius = float(within.sum() / total)
        size = self.means.shape[1]
        center = self.sums.sum(0) / total
        self.noise = noise * math.sqrt(max(float(self.scatter.sum() / total - center.square().sum()), 0) / size) + 1e-12
        self.variances = within / rows / size + self.noise**2
        self.weights = self.rows / total

    def information(self, features: Tensor, generator: torch.Generator) -> Tensor:
        draws = torch.randn(features.shape, generator=generator, dtype=torch.float64).to(features.device)
        log_q = mixture_log_prob(
            features + self.noise * draws, self.means[None], self.variances[None], self.weights[None]
        )
        return -log_q - 0.5 * features.shape[1] * math.log(2 * math.pi * math.e * self.noise**2)


def _measured(
    network: nn.Module,
    names: Sequence[str],
    own: tuple[Tensor, Tensor],
    secret: tuple[Tensor, Tensor],
    noise: float,
) -> list[Spread]:
    classes = [_Classes(int(torch.cat([own[1], secret[1]]).max()) + 1) for _ in names]
    for features, labels in _features(network, names, *own):
        for each, rows in zip(classes, features):
            each.add(rows, labels)
    excess: list[list[Tensor]] = [[] for _ in names]
    for each in classes:
        each.fit(noise)
    draws = [torch.Generator().manual_seed(0) for _ in names]  # the same for any other cuts in this pass
    for features, _ in _features(network, names, *secret):
        for index, rows in enumerate(features):
            excess[index].append(classes[index].information(rows, draws[index]))
    return [Spread(each.radius, float(torch.cat(rows).mean())) for each, rows in zip(classes, excess)]


def _features(
    network: nn.Module, names: Sequence[str], images: Tensor, labels: Tensor
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The last results of modules as rows, float64, for some images at a time, and the labels of these."""
    last: dict[str, Any] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, result: Any) -> None:
            last[name] = result[0] if isinstance(result, tuple | list) else result

        return hook

    with ExitStack() as stack, in_eval_mode(network), torch.no_grad():
        for name in names:
            stack.callback(network.get_submodule(name).register_forward_hook(keep(name)).remove)
        for part, own in zip(images.split(CHUNK), labels.split(CHUNK)):
            network(part)
            yield [last[name].flatten(1).double() for name in names], own
