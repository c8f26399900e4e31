"""A context in which networks are in eval mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval_mode(*networks: nn.Module) -> Iterator[None]:
    """Puts networks into eval mode inside the block, then restores the mode of every module, such as frozen normalization."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    if not any(mode for _, mode in modes):  # setting the mode of a module costs as much as a small layer
        yield
        return
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
