"""Training a split network under a defense, with CEM or without, and measuring what it knows."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cem_fast._support.eval_mode import in_eval_mode
from cem_fast._support.learning_rate import one_cycle
from cem_fast._support.ranks import Ranks
from cem_fast._support.seeding import derived, seeded
from cem_fast.config import RunConfig
from cem_fast.data.splits import Part, Splits
from cem_fast.defenses.base import Defense
from cem_fast.models.split import SplitModel
from cem_fast.training.batch_norm import synchronized
from cem_fast.training.resume import Snapshot, random_state, set_random_state

if TYPE_CHECKING:
    from cem_fast.loss import CEMLoss
    from cem_fast.schedule import CEMSchedule

CHUNK = 256  # images at a time where nothing is learned
SHIFT = 2  # pixels that a training image may be shifted by
HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # what each precision of the settings computes in


def train(
    model: SplitModel,
    splits: Splits,
    defense: Defense,
    *,
    config: RunConfig,
    cem: CEMLoss | None = None,
    schedule: CEMSchedule | None = None,
    on_epoch: Callable[[dict], None] | None = None,
    snapshot: Snapshot | None = None,
    process_group: Any = None,
) -> list[dict]:
    """Minimizes cross-entropy + the defense's penalty + ``weight * L_C``, the paper's Eq. 8, in place.

    From the second epoch on, the mixture of CEM is refitted at the start of every epoch to the clean features of the training images; CEM
    acts on the clean features of a batch, the classifier and the attacker see the released ones. The last network is the result: nothing
    is chosen on any measurement. Modules in eval mode inside a network in training mode, such as frozen normalization, stay so.

    With ``config.accumulate`` parts a batch, and with several processes, which share every part, gradients are those of the whole batch as
    far as it is a mean over images. What a defense measures on a batch as a whole is measured on what is computed at once, and averaged; so
    are the batch statistics of normalization over parts, but not over processes, which take them together. CEM blends every part into its
    mixture alone, which changes a gradient by less than the batch's share of the training images. Noise differs between processes.

    With half precision, the two halves of the network compute in it where that is safe; weights, features at the cut, the defense, CEM and
    the loss keep the precision of the images, and so does everything after training.

    Args:
        model: the network, on the device to train on; some defenses change its encoder.
        splits: the data; only its training part is touched.
        defense: what is done to the features, and what it adds to the loss.
        config: ``epochs``, ``batch_size``, ``accumulate``, ``precision``, ``learning_rate``, ``seed`` and ``cem_by_class``.
        cem: the CEM loss; None trains without it.
        schedule: its weight over the epochs; needed with ``cem``.
        on_epoch: called with every epoch's record as it is made, by the first process alone.
        snapshot: keeps the training after every epoch, written by the first process alone, and is where it goes on after an interruption,
            with the bits of an undisturbed run on as many processes and threads; None keeps nothing.
        process_group: torch.distributed group of processes that train the network together, each called with the same arguments; None
            for a single process. ``cem`` needs the same.

    Returns:
        A record per epoch: ``epoch`` (from 1), ``loss``, ``accuracy`` (on training images as seen), ``cem`` (the mean value of
        L_C, None without CEM or before the first fit), ``learning_rate`` (of the epoch's first step), ``seconds``.

    Raises:
        ValueError: ``cem`` comes without ``schedule``, with another process group, or for a single epoch; a batch has fewer images than
            parts and processes to share it; or the snapshot is damaged or of another training run.
        FloatingPointError: the loss is not finite, and training stops at that step, or the features that CEM is fitted to are not.

    Source:
        Xia et al., CVPR 2025, Algorithm 1.
    """
    if (cem is None) != (schedule is None):
        raise ValueError("cem and schedule must be given together, or neither")
    if cem is not None and config.epochs < 2:
        raise ValueError(
            f"epochs must be at least 2 with CEM, which is first fitted after epoch 1, got {config.epochs}"
        )
    if cem is not None and getattr(cem, "process_group", None) is not process_group:
        raise ValueError("cem must be made with the process_group that it is trained with")
    ranks = Ranks(process_group)
    part = _to(splits.train, model.device)
    steps = -(-len(part) // config.batch_size)
    if len(part) // steps < config.accumulate * ranks.count:
        raise ValueError(
            f"batch_size must give each of {config.accumulate} parts on each of {ranks.count} processes an image, got "
            f"{config.batch_size}, with {len(part) // steps} images in the smallest batch"
        )
    frozen = [module for module in model.modules() if model.training and not module.training]
    with seeded(config.seed, "training"):
        # batches and augmentation have their own generator: they are the same with CEM and without
        generator = torch.Generator().manual_seed(config.seed)
        defense.start(model, part.images)
        run = _Training(model, defense, cem, config, steps=steps, generator=generator)
        history = run.restore(snapshot.load() if snapshot else None)
        with synchronized(model, ranks), defense.trained_over(ranks):
            for epoch in range(len(history), config.epochs):
                started = time.perf_counter()
                defense.before_epoch(model, part.images, part.labels, epoch=epoch, epochs=config.epochs)
                run.follow()
                if cem is not None and epoch > 0:
                    features = clean_features(model, ranks.share(part.images))
                    cem.fit(features, ranks.share(part.labels) if config.cem_by_class else None)
                model.train()
                for module in frozen:
                    module.eval()
                if ranks.rank:  # noise of its own, which the first process alone has to remember
                    torch.manual_seed(derived(config.seed, f"training, rank {ranks.rank}, epoch {epoch}"))
                rate = run.optimizer.param_groups[0]["lr"]
                means = _one_epoch(run, part, ranks, schedule, epoch=epoch, steps=steps, mirror=splits.mirrored)
                history.append(
                    {
                        "epoch": epoch + 1,
                        "loss": means[0],
                        "accuracy": means[1],
                        "cem": means[2] if cem is not None and epoch > 0 else None,
                        "learning_rate": rate,
                        "seconds": time.perf_counter() - started,
                    }
                )
                if ranks.rank:
                    continue
                if on_epoch is not None:
                    on_epoch(history[-1])
                if snapshot is not None:
                    snapshot.save(run.state(history))
    model.eval()
    return history


class _Training:
    """What changes while a network is trained, apart from the history: it can be taken down and restored."""

    def __init__(
        self,
        model: SplitModel,
        defense: Defense,
        cem: CEMLoss | None,
        config: RunConfig,
        *,
        steps: int,
        generator: torch.Generator,
    ):
        self.model, self.defense, self.cem, self.config, self.generator = model, defense, cem, config, generator
        decayed, others = _by_decay(model)
        self.optimizer = torch.optim.SGD(
            [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}],
            lr=config.learning_rate,
            momentum=0.9,
            nesterov=True,
        )
        self.rates = one_cycle(self.optimizer, steps=config.epochs * steps, warmup=0.2)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=config.precision == "fp16")
        self.network = _Pass(model, defense, HALF[config.precision])

    def follow(self) -> None:
        """Makes the optimizer train the parameters that the network has now; those that it had before keep their momentum."""
        for group, parameters in zip(self.optimizer.param_groups, _by_decay(self.model)):
            for gone in {*group["params"]} - {*parameters}:
                self.optimizer.state.pop(gone, None)
            group["params"] = parameters

    def state(self, history: list[dict]) -> dict[str, Any]:
        """Everything that the next epoch depends on, and the history."""
        return {
            "history": history,
            **{name: part.state_dict() for name, part in self._parts().items()},
            "random": random_state(self.model.device),
            "batches": self.generator.get_state(),
        }

    def restore(self, state: dict[str, Any] | None) -> list[dict]:
        """Takes over what :meth:`state` returned, and returns the history; None is the state before the first epoch."""
        if state is None:
            return []
        self.defense.reshape(self.model, {f"encoder.{k}": v.shape for k, v in state["encoder"].items()})
        self.follow()
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                _lay_out_like_parameters(part)
        set_random_state(state["random"], self.model.device)
        self.generator.set_state(state["batches"])
        return state["history"]

    def _parts(self) -> dict[str, Any]:
        parts = {"encoder": self.model.encoder, "decoder": self.model.decoder, "defense": self.defense}
        parts |= {"cem": self.cem} if self.cem is not None else {}
        parts |= {"optimizer": self.optimizer, "rates": self.rates, "scaler": self.scaler}
        return parts | self.defense.optimizers()


class _Pass(nn.Module):
    """The way of a batch of images through a network under training: its features, what is released of them, and logits."""

    def __init__(self, model: SplitModel, defense: Defense, half: torch.dtype | None):
        super().__init__()
        self.model = model
        self.release = defense.release  # the defense's own parameters are not those of the network
        self.half = half

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self._computed(self.model.encoder, images)
        released = self.release(features)
        return features, released, self._computed(self.model.decoder, released)

    def _computed(self, network: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.half, enabled=self.half is not None):
            return network(x).to(x.dtype)


def _one_epoch(
    run: _Training,
    part: Part,
    ranks: Ranks,
    schedule: CEMSchedule | None,
    *,
    epoch: int,
    steps: int,
    mirror: bool,
) -> list[float]:
    """One pass over the training images: mean loss, accuracy and mean value of L_C."""
    config, network = run.config, run.network
    if ranks.count > 1:
        network = DistributedDataParallel(network, process_group=ranks.group)
    sums = torch.zeros(3, dtype=torch.float64)
    for step, batch in enumerate(torch.randperm(len(part), generator=run.generator).tensor_split(steps)):
        images, labels = part.images[batch], part.labels[batch]
        images = augment(images, mirror=mirror, generator=run.generator)
        weight = 0.0
        if schedule is not None:
            weight = schedule.weight_at(epoch=epoch, learning_rate=run.optimizer.param_groups[0]["lr"])
        run.optimizer.zero_grad()
        seen = []
        for index, whole in enumerate(
            zip(images.tensor_split(config.accumulate), labels.tensor_split(config.accumulate))
        ):
            size, (x, y) = len(whole[0]), map(ranks.share, whole)
            last = index == config.accumulate - 1
            with nullcontext() if ranks.count == 1 or last else network.no_sync():
                features, released, logits = network(x)
                # as shares of the batch's means; data-parallel training averages over the ranks
                loss = F.cross_entropy(logits, y) + run.defense.penalty(x, features, released, y)
                loss = loss * (len(x) * ranks.count / len(batch))
                information = torch.zeros(())
                if run.cem is not None:
                    information = run.cem(features, y if config.cem_by_class else None)
                    loss = loss + (size / len(batch) * weight) * information
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the training loss is {loss.item()} at epoch {epoch + 1}, step {step + 1} of {steps}: lower learning_rate "
                        f"(now {config.learning_rate}) or the weights of the defense and of CEM"
                    )
                run.scaler.scale(loss).backward()
            seen.append((x, released.detach()))
            correct = (logits.argmax(1) == y).sum()
            sums += torch.tensor([len(batch) * loss.item(), ranks.count * correct.item(), size * information.item()])
        scale = run.scaler.get_scale()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        if run.scaler.get_scale() >= scale:  # otherwise a gradient has overflowed, and there was no step
            run.rates.step()
        run.defense.after_step(*(parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*seen)))
    return (ranks.sum(sums.to(part.labels.device)) / ranks.count / len(part)).tolist()


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


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Gives what an optimizer has loaded the memory layout that it had before: rounding may depend on the order of the loops."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _encoded(model: SplitModel, images: Tensor) -> Tensor:
    with in_eval_mode(model):
        return torch.cat([model.encoder(part.to(model.device)) for part in images.split(CHUNK)])


def _to(part: Part, device: torch.device) -> Part:
    return Part(part.images.to(device), part.labels.to(device), part.groups)
