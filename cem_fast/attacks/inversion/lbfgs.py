"""L-BFGS for many small problems at once, each with a step size and a memory of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

MEMORY = 20  # pairs of steps and changes of the gradient
DECREASE = 1e-4  # share of the expected decrease at which a step is taken
SHRINK = 0.3  # of a step that is not taken
CURVED = 1e-10  # curvature of a pair that is kept, relative to the squared change of the gradient
ROUND = 10  # steps after which a row ends, unless it came far enough

Function = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Pair = tuple[Tensor, Tensor, Tensor]


def lbfgs(function: Function, start: Tensor, *, steps: int, tolerance: float) -> Tensor:
    """Minimizes a function of each row, all rows together.

    ``x <- x - t H g``, with H the inverse Hessian that the last steps imply, and t the first of 1, 0.3, 0.09, ... that decreases the
    function enough. A row does not depend on other rows, which ``torch.optim.LBFGS`` would give one step size, and ends by itself.

    Args:
        function: function from points ``[n, P]`` and the rows that they belong to ``[n]`` to their values ``[n]`` and gradients
            ``[n, P]``.
        start: where to start, ``[N, P]``.
        steps: evaluations of the function after the first, at most.
        tolerance: decrease of the function in 10 evaluations below which a row ends.

    Returns:
        The lowest points that were found, ``[N, P]``; rows without a finite value stay at the start.

    Source:
        Liu and Nocedal, "On the limited memory BFGS method for large scale optimization", Mathematical Programming 1989.

    Example:
        >>> import torch
        >>> from cem_fast.attacks.inversion.lbfgs import lbfgs
        >>> curvature = torch.tensor([1.0, 100.0, 10000.0])
        >>> def bowls(x, rows):
        ...     return (curvature * (x - 1) ** 2).sum(1), 2 * curvature * (x - 1)
        >>> lbfgs(bowls, torch.zeros(2, 3), steps=30, tolerance=1e-9).round(decimals=3)
        tensor([[1., 1., 1.],
                [1., 1., 1.]])
    """
    lowest, rows, x = start.clone(), torch.arange(len(start), device=start.device), start
    value, gradient = function(x, rows)
    pairs: deque[Pair] = deque(maxlen=MEMORY)
    scale = 1 / torch.linalg.vector_norm(gradient, dim=1).clamp_min(1e-30)  # the first step has length 1
    direction, size, before = -scale[:, None] * gradient, torch.ones_like(value), value
    for count in range(1, steps + 1):
        trial = x + size[:, None] * direction
        trial_value, trial_gradient = function(trial, rows)
        taken = trial_value <= value + DECREASE * size * _dot(direction, gradient)
        step = torch.where(taken[:, None], trial - x, 0)
        change = torch.where(taken[:, None], trial_gradient - gradient, 0)
        curvature, length = _dot(step, change), _dot(change, change)
        useful = curvature > CURVED * length
        # a pair with the inverse 0 has no effect
        pairs.append((step, change, torch.where(useful, 1 / curvature, 0)))
        scale = torch.where(useful, curvature / length, scale)
        x = torch.where(taken[:, None], trial, x)
        value = torch.where(taken, trial_value, value)
        gradient = torch.where(taken[:, None], trial_gradient, gradient)
        direction = torch.where(taken[:, None], -_newton(pairs, scale, gradient), direction)
        size = torch.where(taken, 1, SHRINK * size)
        if count % ROUND == 0:
            moving = before - value > tolerance
            lowest[rows] = x
            if not moving.any():
                break
            if moving.all():
                before = value
                continue
            rows, x, value, gradient = (t[moving] for t in (rows, x, value, gradient))
            scale, direction, size, before = scale[moving], direction[moving], size[moving], value
            pairs = deque(((s[moving], c[moving], i[moving]) for s, c, i in pairs), maxlen=MEMORY)
    lowest[rows] = x
    return lowest


def _newton(pairs: deque[Pair], scale: Tensor, gradient: Tensor) -> Tensor:
    """The gradient times the inverse Hessian that the pairs imply."""
    shares: list[Tensor] = []
    result = gradient.clone()
    for step, change, inverse in reversed(pairs):
        shares.append(inverse * _dot(step, result))
        result.addcmul_(shares[-1][:, None], change, value=-1)
    result.mul_(scale[:, None])
    for (step, change, inverse), share in zip(pairs, reversed(shares)):
        result.addcmul_((share - inverse * _dot(change, result))[:, None], step)
    return result


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)
