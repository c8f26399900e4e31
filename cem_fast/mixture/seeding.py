"""Initial means of a fit: greedy k-means++, or random rows, of all classes at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cem_fast.mixture.rows import Rows, class_totals, running_sum
from cem_fast.ops.fits import OPERATORS as FITS
from cem_fast.ops.fits import draw_rows
from cem_fast.ops.library import OPERATORS

_LOG_PROB = OPERATORS["mixture_log_prob_fwd"]
_CANDIDATE_DISTANCES = FITS["candidate_distances"]
_KMEANS_PLUS_PLUS = FITS["kmeans_plus_plus"]


def squared_distance(x: Tensor, means: Tensor, labels: Tensor | None) -> Tensor:
    """Squared distance ``[N]`` of each row to the one mean ``[C, D]`` of its class.

    A Gaussian of variance ``1 / (2 pi)`` has no normalizing constant, so its log-likelihood is ``-pi |x - mu|^2``.
    """
    C = means.shape[0]
    variances = means.new_full((C, 1), 1 / (2 * math.pi))
    log_prob, _ = _LOG_PROB(x, means.unsqueeze(1), variances, means.new_ones(C, 1), labels, False)
    distance: Tensor = (log_prob / -math.pi).clamp_min(0)
    return distance


class Draws:
    """Random rows of every class, the same ones however the rows are divided into chunks and shards.

    Args:
        rows: chunks of all ranks.
        num_classes: classes C.
        like: a tensor of the means' dtype and device, ``[D]``.
        generator: source of randomness; the numbers of rank 0 are used.
    """

    def __init__(self, rows: Rows, num_classes: int, like: Tensor, generator: torch.Generator | None):
        self.rows, self.num_classes, self.like, self.generator = rows, num_classes, like, generator
        device = like.device
        self.chunks: list[tuple[Tensor, Tensor]] = []
        masses, self.chunk_ends = [], [0]
        for x, labels, mass in rows:
            labels = torch.zeros(len(x), dtype=torch.int64, device=device) if labels is None else labels
            self.chunks.append((x, labels))
            masses.append(torch.ones_like(labels, dtype=torch.float64) if mass is None else mass.double())
            self.chunk_ends.append(self.chunk_ends[-1] + len(x))
        self.labels = torch.cat([like.new_empty(0, dtype=torch.int64), *(labels for _, labels in self.chunks)])
        self.mass = torch.cat([like.new_empty(0, dtype=torch.float64), *masses])
        self.order = self.labels.argsort(stable=True)
        self.ends = torch.searchsorted(self.labels[self.order], torch.arange(num_classes, device=device), right=True)
        self.sizes = self.ends.diff(prepend=self.ends.new_zeros(1))
        self.starts = self.ends - self.sizes
        # one class in one piece on the CPU needs neither an order of the rows nor shares of the ranks
        self.plain = num_classes == 1 and rows.in_one_piece and self.mass.is_cpu and len(self.mass) > 0

    def total_of(self, mass: Tensor) -> Tensor:
        C = self.num_classes
        return class_totals(mass, self.labels, C) if mass.is_cpu or C > 1 else mass.sum().view(1)

    def uniform(self, trials: int) -> Tensor:
        """Uniform numbers ``[trials, C]``, those of rank 0."""
        device = self.like.device
        source = device if self.generator is None else self.generator.device
        shape = (trials, self.num_classes)
        if torch.device(source).type == "cpu":
            u = torch.rand(shape, dtype=torch.float64, generator=self.generator).to(device)
        else:  # the numbers of a GPU's generator depend on the size of a draw
            draws = [
                torch.rand(shape[1:], dtype=torch.float64, device=source, generator=self.generator)
                for _ in range(trials)
            ]
            u = torch.stack(draws).to(device)
        if self.rows.group is not None:
            u = self.rows.reduce(u if self.rows.rank == 0 else torch.zeros_like(u))
        return u

    def locate(self, mass: Tensor, trials: int) -> tuple[Tensor, Tensor]:
        """Rows of each class, drawn with probability proportional to their mass ``[N]``, or to their sample weights where a
        class has no mass left: indices ``[trials, C]`` of this rank's rows, and which of them are this rank's."""
        rows, labels = self.rows, self.labels
        if self.plain:
            index = draw_rows(mass, self.mass, self.uniform(trials))
            return index, torch.ones_like(index, dtype=torch.bool)
        everywhere = rows.reduce(self.total_of(mass))
        mass = torch.where(everywhere[labels] > 0, mass, self.mass)
        table = torch.zeros(rows.ranks, self.num_classes, dtype=torch.float64, device=mass.device)
        table[rows.rank] = self.total_of(mass)
        table = rows.reduce(table).cumsum(0)  # the ranks' shares of each class, end to end
        after, everywhere = table[rows.rank], table[-1]
        before = table[rows.rank - 1] if rows.rank else torch.zeros_like(after)
        target = self.uniform(trials) * everywhere
        mine = (self.sizes > 0) & (target >= before) & (target < after)
        if not len(labels):
            return self.starts.expand_as(target), mine
        cumulative = running_sum(mass[self.order])
        start = torch.where(self.starts > 0, cumulative[(self.starts - 1).clamp_min(0)], 0.0)
        position = torch.searchsorted(cumulative, start + (target - before), right=True)
        position = torch.minimum(torch.maximum(position, self.starts), self.ends - 1).clamp(0, len(labels) - 1)
        return self.order[position], mine

    def pick(self, index: Tensor, mine: Tensor) -> Tensor:
        """Rows ``[trials, C, D]`` at the indices, sent by the rank that holds each."""
        if self.plain:
            return self.chunks[0][0][index].to(self.like.dtype)
        values = torch.zeros(*index.shape, len(self.like), dtype=torch.float64, device=index.device)
        for (x, _), begin, end in zip(self.chunks, self.chunk_ends, self.chunk_ends[1:]):
            if begin < end:
                here = mine & (index >= begin) & (index < end)
                values = torch.where(here.unsqueeze(-1), x[(index - begin).clamp(0, len(x) - 1)].double(), values)
        return self.rows.reduce(values).to(self.like.dtype)

    def closer(self, candidates: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
        """How near rows would come to the means with each of the candidates ``[T, C, D]`` as one more: the smaller one of
        ``nearest`` ``[N]`` and the squared distance, ``[T, N]``, and its sum over all rows of each class ``[T, C]``."""
        if nearest.is_cpu:
            by_class = candidates.transpose(0, 1).contiguous()
            parts = [
                _CANDIDATE_DISTANCES(x, by_class, y if self.num_classes > 1 else None, nearest[a:b], self.mass[a:b])
                for (x, y), a, b in zip(self.chunks, self.chunk_ends, self.chunk_ends[1:])
            ]
            nothing = candidates.new_zeros(candidates.shape[:2], dtype=torch.float64)
            distances = (
                parts[0][0]
                if len(parts) == 1
                else torch.cat([nearest.new_empty(len(candidates), 0), *(d for d, _ in parts)], 1)
            )
            return distances, self.rows.reduce(sum((p for _, p in parts), nothing))
        found, potentials = [], []
        for candidate in candidates:
            square = [nearest[:0], *(squared_distance(x, candidate, y) for x, y in self.chunks)]
            found.append(torch.minimum(nearest, torch.cat(square)))
            potentials.append(self.total_of(found[-1].double() * self.mass))
        return torch.stack(found), self.rows.reduce(torch.stack(potentials))


@torch.no_grad()
def random_rows(
    rows: Rows, num_classes: int, num_components: int, *, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Initial means ``[C, K, D]``: different rows of each class, drawn with probability proportional to their sample weights.

    A class with fewer rows than components repeats a row; one without rows gets zeros. Arguments as for ``kmeans_plus_plus``.
    """
    draws = Draws(rows, num_classes, like, generator)
    mass = draws.mass.clone()
    means = like.new_zeros(num_classes, num_components, len(like))
    for k in range(num_components):
        index, mine = draws.locate(mass, 1)
        means[:, k] = draws.pick(index, mine)[0]
        mass[index[mine]] = 0
    return means


@torch.no_grad()
def kmeans_plus_plus(
    rows: Rows, num_classes: int, num_components: int, *, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Initial means ``[C, K, D]`` of all classes at once, by greedy k-means++ on squared distances.

    Each new mean is the best of ``2 + log K`` rows drawn with probability proportional to the squared distance to the
    nearest mean so far, times the row's sample weight. A class with fewer distinct rows than components repeats a row; one
    without rows gets zeros.

    Args:
        rows: chunks of all ranks; draws do not depend on how the rows are divided.
        num_classes: classes C.
        num_components: components K of each class.
        like: a tensor of the means' dtype and device, ``[D]``.
        generator: source of randomness; the numbers of rank 0 are used.

    Source: Arthur and Vassilvitskii, "k-means++: The advantages of careful seeding", SODA 2007, section 4.
    """
    draws = Draws(rows, num_classes, like, generator)
    trials = 2 + int(math.log(num_components))
    if draws.plain:
        uniform = draws.uniform(1 + (num_components - 1) * trials).flatten()
        chosen: Tensor = _KMEANS_PLUS_PLUS(draws.chunks[0][0], draws.mass, uniform, num_components)
        return chosen
    means = like.new_zeros(num_classes, num_components, len(like))
    nearest = torch.full((len(draws.labels),), math.inf, dtype=like.dtype, device=like.device)
    for k in range(num_components):
        mass = draws.mass if k == 0 else nearest.double() * draws.mass
        candidates = draws.pick(*draws.locate(mass, 1 if k == 0 else trials))
        distances, potentials = draws.closer(candidates, nearest)
        choice = potentials.argmin(0)  # the first of several
        means[:, k] = candidates[choice, torch.arange(num_classes, device=choice.device)]
        if num_classes == 1:
            nearest = distances.index_select(0, choice).squeeze(0)
        else:
            nearest = distances.gather(0, choice[draws.labels].unsqueeze(0)).squeeze(0)
    return means
