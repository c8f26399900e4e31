"""Learning rate schedules with cosine warm-up and decay, or decay only."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def one_cycle(optimizer: Optimizer, *, steps: int, warmup: float) -> LambdaLR:
    """Scales the optimizer's learning rate from 1/25 to 1 during the warm-up, then down to 0 at the last step.

    Unlike torch's ``OneCycleLR``, it is defined for any number of steps, including one.

    Args:
        optimizer: the optimizer, with the peak learning rate.
        steps: number of steps of the run, at least 1.
        warmup: share of the steps in the warm-up.

    Returns:
        The scheduler; call its ``step`` after every step of the optimizer.

    Source:
        Smith and Topin, "Super-convergence: very fast training of neural networks using large learning rates", 2019.
    """
    rising = max(1, round(warmup * steps))

    def scale(step: int) -> float:
        if step < rising:
            return 1 - 0.96 * (1 + math.cos(math.pi * step / rising)) / 2
        return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2

    return LambdaLR(optimizer, scale)


def falling(optimizer: Optimizer, *, steps: int) -> LambdaLR:
    """Scales the optimizer's learning rate from 1 down to 0 along a cosine.

    Args:
        optimizer: the optimizer, with the peak learning rate.
        steps: number of steps of the run, at least 1.

    Returns:
        The scheduler; call its ``step`` after every step of the optimizer.

    Source:
        Loshchilov and Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017.
    """
    return LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / steps)) / 2)
