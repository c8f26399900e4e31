"""What a split network costs: parameters, multiplications and time, on the device and in the cloud."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cem_fast.split import SplitModel, in_eval_mode


@dataclass(frozen=True)
class Cost:
    """Cost of one part of a network.

    Attributes:
        parameters: number of trainable numbers.
        macs: multiply-accumulate operations of convolutions and matrix products, for one image.
        seconds: median time of a batch.
    """

    parameters: int
    macs: int
    seconds: float


def measure(model: SplitModel, images: Tensor, *, passes: int = 100) -> dict[str, Cost]:
    """Measures both parts of a network at inference.

    Biases, normalization, activations and pooling are left out of the multiplications: they are a percent or two of them, and tools
    do not agree on what they count for. The time is of this machine, this batch and the threads that torch may use, without the
    network between device and cloud.

    Args:
        model: the network; its modes are left as they were.
        images: a batch ``[N, C, H, W]``, on the device of the network.
        passes: how many times the batch goes through each part, after three times that do not count.

    Returns:
        The cost of the ``encoder`` and of the ``decoder``.

    Raises:
        ValueError: there is no image, or ``passes`` is not positive.

    Source:
        Xia et al., CVPR 2025, the table of efficiency (100 passes of batches of 128).
    """
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    if passes < 1:
        raise ValueError(f"passes must be at least 1, got {passes}")
    with torch.no_grad(), in_eval_mode(model):
        features = model.encoder(images)
        return {
            "encoder": _cost(model.encoder, images, passes),
            "decoder": _cost(model.decoder, features, passes),
        }


def parameters(module: nn.Module) -> int:
    """Number of trainable numbers of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _cost(module: nn.Module, inputs: Tensor, passes: int) -> Cost:
    with FlopCounterMode(display=False) as counter:
        module(inputs[:1])
    for _ in range(3):
        module(inputs)
    seconds = []
    for _ in range(passes):
        _wait(inputs.device)
        start = time.perf_counter()
        module(inputs)
        _wait(inputs.device)
        seconds.append(time.perf_counter() - start)
    return Cost(parameters(module), counter.get_total_flops() // 2, statistics.median(seconds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
