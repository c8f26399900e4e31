"""What a split network costs: parameters, multiplications and time of its parts, and the time that CEM adds to its training."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cem_fast._support.eval_mode import in_eval_mode
from cem_fast._support.seeding import seeded
from cem_fast.loss import CEMLoss
from cem_fast.models.split import SplitModel
from cem_fast.training import clean_features


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


@dataclass(frozen=True)
class TrainingCost:
    """Seconds that training takes with CEM and without.

    Attributes:
        step: of a step without CEM, the median.
        added: by how much CEM lengthens a step, the median of the differences of steps taken in turn.
        refit: of fitting the mixture to all images once more, with the encoder's pass over them, as every epoch does; the median.
    """

    step: float
    added: float
    refit: float

    def epoch(self, steps: int) -> tuple[float, float]:
        """An epoch of so many steps without CEM, and with it."""
        plain = steps * self.step
        return plain, plain + steps * self.added + self.refit


def measure_training(
    model: SplitModel, cem: CEMLoss, images: Tensor, labels: Tensor, *, batch_size: int, steps: int = 20
) -> TrainingCost:
    """Measures what CEM adds to training: copies of the network take the same steps in turn, one with CEM and one without.

    So whatever else the machine does slows both down alike. The loss is cross-entropy behind Gaussian noise, without a defense's penalty.

    Args:
        model: the network, which stays as it is.
        cem: the CEM loss, which is fitted here.
        images: the training images ``[N, C, H, W]``, on the device of the network.
        labels: their classes ``[N]``, int64.
        batch_size: images per step.
        steps: how many steps are timed, after one that is not.

    Returns:
        The times.

    Raises:
        ValueError: there is no image, or ``steps`` is not positive.
    """
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    known = labels if cem.mixture.num_classes > 1 else None
    noise_std = cem.noise_variance.sqrt().to(images)
    networks = {with_cem: copy.deepcopy(model).train() for with_cem in (False, True)}
    optimizers = {key: torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9) for key, net in networks.items()}

    def refit() -> None:
        cem.fit(clean_features(networks[True], images), known)

    def step(with_cem: bool, rows: Tensor) -> None:
        features = networks[with_cem].encoder(images[rows])
        noise = noise_std * torch.randn_like(features.flatten(1))
        loss = F.cross_entropy(networks[with_cem].decoder(features + noise.view_as(features)), labels[rows])
        if with_cem:
            loss = loss + cem(features, None if known is None else known[rows])
        optimizers[with_cem].zero_grad()
        loss.backward()
        optimizers[with_cem].step()

    times: dict[bool, list[float]] = {False: [], True: []}
    with seeded(0, "cost of training"):
        refits = [_seconds(images.device, refit) for _ in range(4)]
        for index in range(steps + 1):
            rows = torch.randperm(len(images), device=images.device)[:batch_size]
            for with_cem in (False, True) if index % 2 else (True, False):
                times[with_cem].append(_seconds(images.device, step, with_cem, rows))
    added = [longer - plain for longer, plain in zip(times[True][1:], times[False][1:])]
    return TrainingCost(statistics.median(times[False][1:]), statistics.median(added), statistics.median(refits[1:]))


def parameters(module: nn.Module) -> int:
    """Number of trainable numbers of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def _cost(module: nn.Module, inputs: Tensor, passes: int) -> Cost:
    with FlopCounterMode(display=False) as counter:
        module(inputs[:1])
    for _ in range(3):
        module(inputs)
    seconds = [_seconds(inputs.device, module, inputs) for _ in range(passes)]
    return Cost(parameters(module), counter.get_total_flops() // 2, statistics.median(seconds))


def _seconds(device: torch.device, function: Callable[..., object], *arguments: object) -> float:
    _wait(device)
    start = time.perf_counter()
    function(*arguments)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
