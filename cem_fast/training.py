"""Training a split network under a defense, with CEM or without, and measuring what it knows."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from cem_fast.config import RunConfig
from cem_fast.data.splits import Part, Splits
from cem_fast.defenses.base import Defense
from cem_fast.rates import one_cycle
from cem_fast.seeding import seeded
from cem_fast.split import SplitModel, in_eval_mode

if TYPE_CHECKING:
    from cem_fast.loss import CEMLoss, CEMSchedule

CHUNK = 256  # images at a time where nothing is learned
SHIFT = 2  # pixels that a training image may be shifted by


def train(
    model: SplitModel,
    splits: Splits,
    defense: Defense,
    *,
    config: RunConfig,
    cem: CEMLoss | None = None,
    schedule: CEMSchedule | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Minimizes cross-entropy + the defense's penalty + ``weight * L_C``, the paper's Eq. 8, in place.

    From the second epoch on, the mixture of CEM is refitted at the start of every epoch to the clean features of the training images; CEM
    acts on the clean features of a batch, the classifier and the attacker see the released ones. The last network is the result: nothing
    is chosen on any measurement.

    Args:
        model: the network, on the device to train on; some defenses change its encoder.
        splits: the data; only its training part is touched.
        defense: what is done to the features, and what it adds to the loss.
        config: ``epochs``, ``batch_size``, ``learning_rate``, ``seed`` and ``cem_by_class``.
        cem: the CEM loss; None trains without it.
        schedule: its weight over the epochs; needed with ``cem``.
        on_epoch: called with every epoch's record as it is made.

    Returns:
        A record per epoch: ``epoch`` (from 1), ``loss``, ``accuracy`` (on training images as seen), ``cem`` (the mean value of
        L_C, None without CEM or before the first fit), ``learning_rate`` (of the epoch's first step), ``seconds``.

    Raises:
        ValueError: ``cem`` comes without ``schedule``.
        FloatingPointError: the loss is not finite, and training stops at that step, or the features that CEM is fitted to are not.

    Source:
        Xia et al., CVPR 2025, Algorithm 1.
    """
    if (cem is None) != (schedule is None):
        raise ValueError("cem and schedule must be given together, or neither")
    part = _to(splits.train, model.device)
    steps = -(-len(part) // config.batch_size)
    history = []
    with seeded(config.seed, "training"):
        # batches and augmentation have their own generator: they are the same with CEM and without
        generator = torch.Generator().manual_seed(config.seed)
        defense.start(model, part.images)
        decayed, others = _by_decay(model)
        optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            momentum=0.9,
            nesterov=True,
        )
        rates = one_cycle(optimizer, steps=config.epochs * steps, warmup=0.2)
        for epoch in range(config.epochs):
            started = time.perf_counter()
            defense.before_epoch(model, part.images, part.labels, epoch=epoch, epochs=config.epochs)
            _follow(optimizer, model)
            if cem is not None and epoch > 0:
                cem.fit(clean_features(model, part.images), part.labels if config.cem_by_class else None)
            model.train()
            sums = torch.zeros(3, dtype=torch.float64)
            rate = optimizer.param_groups[0]["lr"]
            for step, batch in enumerate(torch.randperm(len(part), generator=generator).tensor_split(steps)):
                images, labels = part.images[batch], part.labels[batch]
                images = augment(images, mirror=splits.mirrored, generator=generator)
                features = model.encoder(images)
                released = defense.release(features)
                logits = model.decoder(released)
                loss = F.cross_entropy(logits, labels) + defense.penalty(images, features, released, labels)
                information = torch.zeros(())
                if cem is not None:
                    information = cem(features, labels if config.cem_by_class else None)
                    weight = schedule.weight_at(epoch=epoch, learning_rate=optimizer.param_groups[0]["lr"])
                    loss = loss + weight * information
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the training loss is {loss.item()} at epoch {epoch + 1}, step {step + 1} of {steps}: lower learning_rate "
                        f"(now {config.learning_rate}) or the weights of the defense and of CEM"
                    )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
                defense.after_step(images, released.detach())
                correct = (logits.argmax(1) == labels).sum()
                sums += torch.tensor([len(batch) * loss.item(), correct.item(), len(batch) * information.item()])
            means = (sums / len(part)).tolist()
            record = {
                "epoch": epoch + 1,
                "loss": means[0],
                "accuracy": means[1],
                "cem": means[2] if cem is not None and epoch > 0 else None,
                "learning_rate": rate,
                "seconds": time.perf_counter() - started,
            }
            history.append(record)
            if on_epoch is not None:
                on_epoch(record)
    model.eval()
    return history


@torch.no_grad()
def clean_features(model: SplitModel, images: Tensor) -> Tensor:
    """Features of the encoder before anything is done to them, with batch normalization in eval mode.

    Args:
        model: the network; its mode is left as it was.
        images: ``[N, C, H, W]``.

    Returns:
        ``[N, ...]``.

    Raises:
        FloatingPointError: a feature is not finite.
    """
    features = _encoded(model, images)
    if not torch.isfinite(features).all():
        raise FloatingPointError(
            "the features are not finite: the images are not, or training diverged, and a lower learning_rate or lower weights of the "
            "defense and of CEM may help"
        )
    return features


def observer(model: SplitModel, defense: Defense) -> Callable[[Tensor], Tensor]:
    """Returns what an attacker observes: images ``[N, C, H, W]`` -> released features, with fresh noise at every call.

    The encoder is not random, so the same tensor goes through it once however often it is observed. Images that require a gradient get
    one, through the encoder and the defense; several observations of the same tensor then share one backward pass.

    Args:
        model: the network, which must not change while it is observed.
        defense: what is done to its features.
    """
    last: tuple[Tensor, int, Tensor] | None = None

    def observe(images: Tensor) -> Tensor:
        nonlocal last
        differentiated = images.requires_grad and torch.is_grad_enabled()
        with torch.set_grad_enabled(differentiated):
            if images.is_inference():  # nobody counts its changes
                return defense.release(clean_features(model, images))
            known = last is not None and last[0] is images and last[1] == images._version
            if not known or last[2].requires_grad != differentiated:
                features = _encoded(model, images) if differentiated else clean_features(model, images)
                if features.requires_grad:
                    features.register_hook(forget)
                last = (images, images._version, features)
            return defense.release(last[2])

    def forget(_: Tensor) -> None:
        """Lets go of features whose graph a backward pass is about to free."""
        nonlocal last
        last = None

    return observe


@torch.no_grad()
def correctness(model: SplitModel, defense: Defense, part: Part, *, draws: int, seed: int) -> Tensor:
    """How often every image is classified correctly from its released features, over draws of the defense's noise.

    Args:
        model: the network; its mode is left as it was, and batch normalization is in eval mode meanwhile, as is the defense.
        defense: what is done to its features.
        part: images and labels.
        draws: how many times every image is released.
        seed: seed of the draws.

    Returns:
        ``[N]`` float64, the share of the draws in which each image is classified correctly.

    Raises:
        ValueError: ``draws`` is not positive, or there is no image.
    """
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    if not len(part):
        raise ValueError("part must hold at least one image, got none")
    features, labels = clean_features(model, part.images), part.labels.to(model.device)
    hits = torch.zeros(len(part), dtype=torch.float64, device=model.device)
    with in_eval_mode(model, defense), seeded(seed, "accuracy"):
        for _ in range(draws):
            released = defense.release(features)
            predicted = torch.cat([model.decoder(rows).argmax(1) for rows in released.split(CHUNK)])
            hits += predicted == labels
    return hits.cpu() / draws


def evaluate_accuracy(model: SplitModel, defense: Defense, part: Part, *, draws: int, seed: int) -> float:
    """Accuracy on released features, a number in [0, 1]: the mean of :func:`correctness`, which has the arguments."""
    return float(correctness(model, defense, part, draws=draws, seed=seed).mean())


def augment(images: Tensor, *, mirror: bool, generator: torch.Generator) -> Tensor:
    """Shifts every image by up to two pixels each way, repeating its border, and mirrors half of them where that makes sense.

    Args:
        images: ``[N, C, H, W]``.
        mirror: whether to mirror.
        generator: source of the random choices, on the CPU.

    Returns:
        ``[N, C, H, W]``.
    """
    count, _, height, width = images.shape
    down, right = (torch.randint(-SHIFT, SHIFT + 1, (count, 1), generator=generator) for _ in range(2))
    rows = (torch.arange(height) + down).clamp(0, height - 1)
    columns = (torch.arange(width) + right).clamp(0, width - 1)
    if mirror:
        mirrored = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    every = torch.arange(count, device=images.device)[:, None, None]
    picked = images.permute(0, 2, 3, 1)[
        every, rows[:, :, None], columns[:, None, :]
    ]  # [N, H, W, C], so channels_last after this
    return picked.permute(0, 3, 1, 2)


def _by_decay(model: SplitModel) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters that decay, and the others: biases and normalization."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]


def _follow(optimizer: torch.optim.Optimizer, model: SplitModel) -> None:
    """Makes the optimizer train the parameters that a network has now; those that it had before keep their momentum."""
    for group, parameters in zip(optimizer.param_groups, _by_decay(model)):
        for gone in {*group["params"]} - {*parameters}:
            optimizer.state.pop(gone, None)
        group["params"] = parameters


def _encoded(model: SplitModel, images: Tensor) -> Tensor:
    with in_eval_mode(model):
        return torch.cat([model.encoder(part.to(model.device)) for part in images.split(CHUNK)])


def _to(part: Part, device: torch.device) -> Part:
    return Part(part.images.to(device), part.labels.to(device), part.groups)
