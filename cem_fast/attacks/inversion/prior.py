"""The last stage: the most probable image, given messages and a Gaussian about the reconstruction so far."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from cem_fast.attacks.inversion.lbfgs import lbfgs
from cem_fast.attacks.view import View

RANK = 512  # directions of the covariance, at most; isotropic in the others
CONTINUED = 6  # steps with the first weight per step with a further one
FEWEST = 10  # steps that a further weight has at least
TOLERANCE = 0.1  # decrease in nats in 10 steps of L-BFGS that is worth them
FLOOR = 0.02  # variance of the isotropic part, in units of the mean variance


class Errors:
    """The distribution of a reconstruction's errors: a Gaussian of low rank plus isotropic.

    Args:
        errors: errors on held-out images ``[N, C, H, W]``.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.inversion.prior import Errors
        >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
        <torch...>
        >>> errors = torch.randn(4000, 1, 2, 2) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 2, 2)
        >>> colored = Errors(errors).colored(torch.randn(4000, 1, 2, 2))
        >>> colored.std(0).round().flatten()
        tensor([1., 2., 3., 4.])
    """

    def __init__(self, errors: Tensor):
        flat = errors.flatten(1)
        total = float(flat.square().mean()) + 1e-12
        _, values, axes = torch.linalg.svd(flat / len(flat) ** 0.5, full_matrices=False)
        self.axes = axes[:RANK]  # [r, P]
        self.base = (FLOOR * total) ** 0.5
        self.gains = (values[:RANK].square() + FLOOR * total).sqrt() - self.base

    def colored(self, white: Tensor) -> Tensor:
        """Returns errors of this distribution from independent standard normal numbers.

        Args:
            white: ``[N, C, H, W]``.
        """
        flat = white.flatten(1)
        return (self.base * flat + (flat @ self.axes.T * self.gains) @ self.axes).view_as(white)


def most_probable(
    view: View, messages: Tensor, start: Tensor, errors: Errors, *, weights: Sequence[float], steps: int
) -> list[Tensor]:
    """Minimizes ``-log p(messages | start + S u) + weight / 2 ||u||^2`` over u by L-BFGS, with ``S S^T`` the covariance of errors.

    Every further search starts where the one before has ended, and has a sixth of the steps of the first. An image that gains less than
    0.1 nats in 10 steps ends.

    Args:
        view: the network under attack, differentiable.
        messages: ``[R, N, ...]``.
        start: reconstructions so far, ``[N, C, H, W]``.
        errors: the distribution of their errors.
        weights: weights of the prior; 1 is that of Bayes' rule.
        steps: steps of L-BFGS with the first of them, at most.

    Returns:
        Images ``[N, C, H, W]`` for every weight.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.inversion.prior import Errors, most_probable
        >>> from cem_fast.attacks.view import View
        >>> images = torch.rand(50, 1, 4, 4, generator=torch.Generator().manual_seed(0))
        >>> view = View(lambda x: x + 0.01 * torch.randn(x.shape), images)
        >>> start = torch.full_like(images, 0.5)
        >>> [found] = most_probable(view, view.messages(images), start, Errors(images - start), weights=[1.0], steps=30)
        >>> bool((found - images).square().mean() < 0.02)
        True
    """

    @torch.enable_grad()
    def objective(weight: float, white: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        white = white.detach().requires_grad_()
        images = start[rows] + errors.colored(white.view(-1, *start.shape[1:]))
        densities = view.log_density(messages[:, rows], view.features(images))
        values = 0.5 * weight * white.square().sum(1) - densities
        (slopes,) = torch.autograd.grad(values.sum(), white)
        return values.detach(), slopes

    found, white = [], torch.zeros_like(start.flatten(1))
    amounts = [steps] + [max(min(steps, FEWEST), steps // CONTINUED)] * (len(weights) - 1)
    for weight, amount in zip(weights, amounts):
        white = lbfgs(partial(objective, weight), white, steps=amount, tolerance=TOLERANCE)
        found.append(start + errors.colored(white.view_as(start)))
    return found
