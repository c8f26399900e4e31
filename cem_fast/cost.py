"""Cost of a split network: parameters, multiplications and time of its parts, and the time added to training by CEM."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from cem_fast._support.counts import require_count
from cem_fast._support.eval_mode import in_eval_mode
from cem_fast._support.seeding import seeded
from cem_fast.loss import CEMLoss
from cem_fast.models.split import SplitModel
from cem_fast.training.measure import fit


@dataclass(frozen=True)
class Cost:
    """Cost of one part of a network.

    Attributes:
        parameters: number of trainable values.
        macs: multiply-accumulate operations of convolutions and matrix products, for one image.
        seconds: median time of a batch.

    Example:
        >>> from cem_fast import cost
        >>> cost.Cost(parameters=10, macs=90, seconds=0.01).macs
        90
    """

    parameters: int
    macs: int
    seconds: float


def measure(model: SplitModel, images: Tensor, *, passes: int = 100) -> dict[str, Cost]:
    """Measures both parts of a network at inference.

    The multiplications exclude biases, normalization, activations and pooling: a percent or two, which tools count differently. The time
    holds for this machine, this batch and torch's number of threads. It excludes the transfer between device and cloud.

    Args:
        model: the network; its modes stay as they were.
        images: a batch ``[N, C, H, W]``, on the device of the network.
        passes: timed passes of the batch through each part, after three untimed ones.

    Returns:
        The cost of the ``encoder`` and of the ``decoder``.

    Raises:
        ValueError: there is no image, or ``passes`` is not positive.

    Source:
        Xia et al., CVPR 2025, the table of efficiency (100 passes of batches of 128).

    Example:
        >>> import torch
        >>> from cem_fast import cost, models
        >>> model = models.build("vgg11", image_shape=(3, 32, 32), num_classes=10, cut=2, bottleneck=8)
        >>> found = cost.measure(model, torch.rand(1, 3, 32, 32), passes=1)
        >>> found["encoder"].parameters, found["encoder"].macs
        (85256, 21233664)
    """
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    require_count("passes", passes)
    with torch.no_grad(), in_eval_mode(model):
        features = model.encoder(images)
        return {
            "encoder": _cost(model.encoder, images, passes),
            "decoder": _cost(model.decoder, features, passes),
        }


@dataclass(frozen=True)
class TrainingCost:
    """Durations of training with CEM and without, in seconds.

    Attributes:
        step: median duration of a step without CEM.
        added: median difference of steps with CEM and without, taken in turn.
        refit: median duration of an epoch's refit of the mixture, with the encoder's pass over all images.

    Example:
        >>> from cem_fast import cost
        >>> cost.TrainingCost(step=0.5, added=0.25, refit=2.0).epoch(4)
        (2.0, 5.0)
    """

    step: float
    added: float
    refit: float

    def epoch(self, steps: int) -> tuple[float, float]:
        """Duration of an epoch without CEM and with it, in seconds.

        Args:
            steps: number of steps of the epoch.

        Example:
            >>> from cem_fast import cost
            >>> cost.TrainingCost(step=0.5, added=0.0, refit=1.0).epoch(10)
            (5.0, 6.0)
        """
        plain = steps * self.step
        return plain, plain + steps * self.added + self.refit


def measure_training(
    model: SplitModel, cem: CEMLoss, images: Tensor, labels: Tensor, *, batch_size: int, steps: int = 20
) -> TrainingCost:
    """Measures the time that CEM adds to training: two copies of the network take the same steps in turn, one with CEM.

    Other load of the machine thus slows both down alike. The loss is cross-entropy after Gaussian noise, without a defense's penalty.

    Args:
        model: the network, which is not changed.
        cem: the CEM loss, which this function fits.
        images: the training images ``[N, C, H, W]``, on the device of the network.
        labels: their classes ``[N]``, int64.
        batch_size: images per step.
        steps: number of timed steps, after one untimed step.

    Returns:
        The durations.

    Raises:
        ValueError: there is no image, or ``steps`` is not positive.

    Example:
        >>> import torch
        >>> from cem_fast import CEMLoss, cost, models
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> cem = CEMLoss(num_classes=3, num_components=1)
        >>> images, labels = torch.rand(12, 1, 16, 16), torch.arange(12) % 3
        >>> cost.measure_training(model, cem, images, labels, batch_size=6, steps=1).step > 0
        True
    """
    if not len(images):
        raise ValueError("images must hold at least one image, got none")
    require_count("steps", steps)
    known = labels if cem.mixture.num_classes > 1 else None
    noise_std = cem.noise_variance.sqrt().to(images.device, images.dtype)
    networks = {with_cem: copy.deepcopy(model).train() for with_cem in (False, True)}
    optimizers = {key: torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9) for key, net in networks.items()}

    def refit() -> None:
        fit(cem, networks[True], images, known)

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


def message_bytes(model: SplitModel, image_shape: Sequence[int]) -> int:
    """Bytes that the device sends for one image, with 4 for each released feature.

    Args:
        model: the network.
        image_shape: ``(channels, height, width)`` of the image.

    Example:
        >>> from cem_fast import cost, models
        >>> shape = {"image_shape": (1, 16, 16), "num_classes": 3, "cut": 2}
        >>> [cost.message_bytes(models.build("slim", **shape, bottleneck=each), (1, 16, 16)) for each in (8, "D64")]
        [512, 256]
    """
    with torch.no_grad(), in_eval_mode(model):
        return 4 * model.encoder(torch.zeros(1, *image_shape, device=model.device)).numel()


def parameters(module: nn.Module) -> int:
    """Number of trainable values of a module.

    Args:
        module: the module.

    Example:
        >>> from torch import nn
        >>> from cem_fast import cost
        >>> cost.parameters(nn.Linear(3, 2))
        8
    """
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
