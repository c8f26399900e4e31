"""The training loop of a split network under a defense, with CEM or without."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from cem_fast._support import typed_json
from cem_fast._support.learning_rate import one_cycle
from cem_fast._support.ranks import Ranks
from cem_fast._support.seeding import derived, seeded
from cem_fast.config import RunConfig
from cem_fast.data.splits import Part, Splits
from cem_fast.defenses.base import Defense
from cem_fast.models.split import SplitModel
from cem_fast.training.batch_norm import synchronized
from cem_fast.training.measure import fit
from cem_fast.training.resume import Snapshot, random_state, set_random_state

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from cem_fast.loss import CEMLoss
    from cem_fast.schedule import CEMSchedule

SHIFT = 2  # largest shift of a training image, in pixels
HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}  # dtype of autocast for each precision


@dataclass(frozen=True)
class Epoch:
    """Record of one epoch of training.

    Attributes:
        epoch: number of the epoch, from 1.
        loss: mean training loss, the penalties included.
        accuracy: share of the augmented training images that were classified correctly, in [0, 1].
        cem: mean value of L_C; None without CEM and before its first fit.
        learning_rate: learning rate of the epoch's first step.
        seconds: duration.

    Example:
        >>> from cem_fast import training
        >>> record = training.Epoch(1, loss=0.7, accuracy=0.5, cem=None, learning_rate=0.1, seconds=2.0)
        >>> training.Epoch.from_json(record.to_json()) == record
        True
    """

    epoch: int
    loss: float
    accuracy: float
    cem: float | None
    learning_rate: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns the record as JSON.

        Example:
            >>> from cem_fast import training
            >>> list(training.Epoch(1, 0.7, 0.5, None, 0.1, 2.0).to_json())
            ['epoch', 'loss', 'accuracy', 'cem', 'learning_rate', 'seconds']
        """
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Epoch:
        """Returns the record that ``to_json`` wrote.

        Args:
            record: the JSON.

        Raises:
            ValueError: an entry is missing or of another type.

        Example:
            >>> from cem_fast import training
            >>> saved = {"epoch": 1, "loss": 0.7, "accuracy": 0.5, "cem": None, "learning_rate": 0.1, "seconds": 2.0}
            >>> training.Epoch.from_json(saved).loss
            0.7
        """
        return typed_json.read_fields(cls, record, "epoch")


def train(
    model: SplitModel,
    splits: Splits,
    defense: Defense,
    *,
    config: RunConfig,
    cem: CEMLoss | None = None,
    schedule: CEMSchedule | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
    snapshot: Snapshot | None = None,
    process_group: ProcessGroup | None = None,
) -> list[Epoch]:
    """Minimizes cross-entropy + the defense's penalty + ``weight * L_C``, the paper's Eq. 8, in place.

    From the second epoch on, each epoch first refits the mixture of CEM to the clean features of the training images. CEM acts on the
    clean features of a batch; the classifier and the attacker see the released ones. The result is the last network: nothing is selected
    by any measurement. Modules in eval mode inside a network in training mode, such as frozen normalization, stay in eval mode.

    ``config.accumulate`` splits every batch into parts, and several processes share every part. The gradient is that of the whole batch as
    far as the loss is a mean over images. Penalties that are not are computed per part and process, and averaged. Batch normalization
    takes its statistics per part, over all processes. CEM blends every part into its mixture separately, which changes a gradient by less
    than the batch's share of the training images. Each process draws its own noise.

    Half precision applies to the two halves of the network, by autocast. Weights, features at the cut, the defense, CEM and the loss keep
    the dtype of the images, and so does everything after training.

    Args:
        model: the network, on the device to train on; some defenses change its encoder.
        splits: the data; only its training part is used.
        defense: the defense, whose ``release`` and ``penalty`` are applied.
        config: ``epochs``, ``batch_size``, ``accumulate``, ``precision``, ``learning_rate``, ``seed`` and ``cem_by_class``.
        cem: the CEM loss; None trains without it.
        schedule: weight of ``cem`` at each epoch; required with ``cem``.
        on_epoch: called with the record of every epoch, in the first process only.
        snapshot: file that the first process writes after every epoch, and from which an interrupted training continues with the bits of
            an uninterrupted one on as many processes and threads; None saves nothing.
        process_group: torch.distributed group of processes that train the network together, each called with the same arguments; None
            for a single process. ``cem`` needs the same.

    Returns:
        A record per epoch.

    Raises:
        ValueError: ``cem`` comes without ``schedule``, with another process group, or for a single epoch; a batch has fewer images than
            parts times processes; or the snapshot is damaged or of another training run.
        FloatingPointError: the loss is not finite, and training stops at that step, or the features that CEM is fitted to are not.

    Source:
        Xia et al., CVPR 2025, Algorithm 1.

    Example:
        >>> import torch
        >>> from cem_fast import CEMLoss, CEMSchedule, data, defenses, models, training
        >>> from cem_fast.config import RunConfig
        >>> part = data.Part(torch.rand(12, 1, 16, 16), torch.arange(12) % 3, torch.arange(12))
        >>> splits = data.Splits("random", part, part, part, 3, ("a", "b", "c"))
        >>> model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=4)
        >>> defense = defenses.GaussianNoise(noise_std=0.1)
        >>> cem = CEMLoss(num_classes=3, num_components=1, noise_std=0.1)
        >>> config = RunConfig(epochs=2, batch_size=6)
        >>> history = training.train(model, splits, defense, config=config, cem=cem, schedule=CEMSchedule(1.0))
        >>> [record.epoch for record in history], history[0].cem
        ([1, 2], None)
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
    with seeded(config.seed, "training"):
        mirror = splits.mirrored or config.mirror
        run = _Training(model, defense, cem, schedule, config, ranks, part, steps=steps, mirror=mirror)
        history = run.restore(snapshot.load() if snapshot else None)
        with synchronized(model, ranks), defense.trained_over(ranks):
            for epoch in range(len(history), config.epochs):
                history.append(run.epoch(epoch))
                if ranks.rank:
                    continue
                if on_epoch is not None:
                    on_epoch(history[-1])
                if snapshot is not None:
                    snapshot.save(run.state(history))
    model.eval()
    return history


class _Training:
    """A training run: its state, which can be saved and restored between two epochs, and its steps."""

    def __init__(
        self,
        model: SplitModel,
        defense: Defense,
        cem: CEMLoss | None,
        schedule: CEMSchedule | None,
        config: RunConfig,
        ranks: Ranks,
        part: Part,
        *,
        steps: int,
        mirror: bool,
    ):
        self.model, self.defense, self.cem, self.schedule, self.config = model, defense, cem, schedule, config
        self.ranks, self.part, self.steps, self.mirror = ranks, part, steps, mirror
        # batches and augmentation have a generator of their own: they are the same with CEM and without
        self.generator = torch.Generator().manual_seed(config.seed)
        self.frozen = [module for module in model.modules() if model.training and not module.training]
        defense.start(model, part.images)
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

    def state(self, history: list[Epoch]) -> dict[str, Any]:
        """Returns the history and everything that the next epoch depends on."""
        return {
            "history": [record.to_json() for record in history],
            **{name: part.state_dict() for name, part in self._parts().items()},
            "random": random_state(self.model.device),
            "batches": self.generator.get_state(),
        }

    def restore(self, state: dict[str, Any] | None) -> list[Epoch]:
        """Restores what ``state`` returned, and returns the history; None is the state before the first epoch."""
        if state is None:
            return []
        self.defense.reshape(self.model, {f"encoder.{k}": v.shape for k, v in state["encoder"].items()})
        self._follow()
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
            if isinstance(part, torch.optim.Optimizer):
                _lay_out_like_parameters(part)
        set_random_state(state["random"], self.model.device)
        self.generator.set_state(state["batches"])
        return [Epoch.from_json(record) for record in state["history"]]

    def epoch(self, index: int) -> Epoch:
        """Trains for one epoch (from 0)."""
        started = time.perf_counter()
        model, part, ranks, by_class = self.model, self.part, self.ranks, self.config.cem_by_class
        self.defense.before_epoch(model, part.images, part.labels, epoch=index, epochs=self.config.epochs)
        self._follow()
        cem = self.cem if index > 0 else None
        if cem is not None:
            fit(cem, model, part.images, part.labels if by_class else None, ranks=ranks)
        model.train()
        for module in self.frozen:
            module.eval()
        if ranks.rank:  # each rank draws its own noise; only the state of the first one's is saved
            torch.manual_seed(derived(self.config.seed, f"training, rank {ranks.rank}, epoch {index}"))
        rate = self.optimizer.param_groups[0]["lr"]
        loss, accuracy, information = self._pass(index)
        return Epoch(
            epoch=index + 1,
            loss=loss,
            accuracy=accuracy,
            cem=None if cem is None else information,
            learning_rate=rate,
            seconds=time.perf_counter() - started,
        )

    def _pass(self, epoch: int) -> list[float]:
        """One pass over the training images: mean loss, accuracy and mean value of L_C."""
        part, ranks = self.part, self.ranks
        network: nn.Module = self.network
        if ranks.count > 1:
            network = DistributedDataParallel(network, process_group=ranks.group)
        sums = torch.zeros(3, dtype=torch.float64)
        batches = torch.randperm(len(part), generator=self.generator).tensor_split(self.steps)
        for step, batch in enumerate(batches, start=1):
            images = augment(part.images[batch], mirror=self.mirror, generator=self.generator)
            where = f"epoch {epoch + 1}, step {step} of {self.steps}"
            for measured in self._step(network, images, part.labels[batch], epoch=epoch, where=where):
                sums += measured
        return (ranks.sum(sums.to(part.labels.device)) / ranks.count / len(part)).tolist()

    def _step(self, network: nn.Module, images: Tensor, labels: Tensor, *, epoch: int, where: str) -> list[Tensor]:
        """One optimizer step; returns sums of loss, correct images and L_C over each part of the batch."""
        weight = 0.0
        if self.schedule is not None:
            rate = self.optimizer.param_groups[0]["lr"]
            weight = self.schedule.weight_at(epoch=epoch, learning_rate=rate)
        self.optimizer.zero_grad()
        seen, sums = [], []
        parts = [batch.tensor_split(self.config.accumulate) for batch in (images, labels)]
        for index, (some, theirs) in enumerate(zip(*parts), start=1):
            more = index < self.config.accumulate
            with network.no_sync() if more and isinstance(network, DistributedDataParallel) else nullcontext():
                x, y = self.ranks.share(some), self.ranks.share(theirs)
                released, measured = self._backward(
                    network, x, y, rows=len(some), batch=len(images), weight=weight, where=where
                )
            seen.append((x, released))
            sums.append(measured)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= scale:  # otherwise a gradient has overflowed, and there was no step
            self.rates.step()
        self.defense.after_step(*(each[0] if len(each) == 1 else torch.cat(each) for each in zip(*seen)))
        return sums

    def _backward(
        self, network: nn.Module, x: Tensor, y: Tensor, *, rows: int, batch: int, weight: float, where: str
    ) -> tuple[Tensor, Tensor]:
        """Adds the gradients of one part of a batch; returns the released features and the sums of the part.

        Args:
            network: the pass through the network.
            x: this rank's share of the part's images.
            y: their labels.
            rows: images of the part, over all ranks.
            batch: images of the whole batch, over all parts and ranks.
            weight: weight of CEM.
            where: epoch and step, for the error.
        """
        ranks = self.ranks
        features, released, logits = network(x)
        # as shares of the batch's means; data-parallel training averages over the ranks
        loss = F.cross_entropy(logits, y) + self.defense.penalty(x, features, released, y)
        loss = loss * (len(x) * ranks.count / batch)
        information = torch.zeros(())
        if self.cem is not None:
            information = self.cem(features, y if self.config.cem_by_class else None)
            loss = loss + (rows / batch * weight) * information
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the training loss is {loss.item()} at {where}: lower learning_rate (now {self.config.learning_rate}) or the weights of "
                "the defense and of CEM"
            )
        self.scaler.scale(loss).backward()
        correct = (logits.argmax(1) == y).sum()
        sums = torch.tensor([batch * loss.item(), ranks.count * correct.item(), rows * information.item()])
        return released.detach(), sums

    def _follow(self) -> None:
        """Makes the optimizer train the network's current parameters; those that stay keep their momentum."""
        for group, parameters in zip(self.optimizer.param_groups, _by_decay(self.model)):
            for gone in {*group["params"]} - {*parameters}:
                self.optimizer.state.pop(gone, None)
            group["params"] = parameters

    def _parts(self) -> dict[str, Any]:
        """Objects with a ``state_dict``, by the names that a snapshot gives them."""
        parts: dict[str, Any] = {"encoder": self.model.encoder, "decoder": self.model.decoder, "defense": self.defense}
        parts |= {"cem": self.cem} if self.cem is not None else {}
        parts |= {"optimizer": self.optimizer, "rates": self.rates, "scaler": self.scaler}
        return parts | self.defense.optimizers()


class _Pass(nn.Module):
    """The pass of images through a network under training: features, released features and logits."""

    def __init__(self, model: SplitModel, defense: Defense, precision: torch.dtype | None):
        super().__init__()
        self.model = model
        self.release = defense.release  # the defense's own parameters are not those of the network
        self.precision = precision

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self._computed(self.model.encoder, images)
        released = self.release(features)
        return features, released, self._computed(self.model.decoder, released)

    def _computed(self, network: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self.precision, enabled=self.precision is not None):
            return network(x).to(x.dtype)


def augment(images: Tensor, *, mirror: bool, generator: torch.Generator) -> Tensor:
    """Shifts every image by up to two pixels each way, with its border repeated, and mirrors half of the images if asked to.

    Args:
        images: ``[N, C, H, W]``.
        mirror: whether to mirror; wrong for images that change their class, such as digits.
        generator: source of the random choices, on the CPU.

    Returns:
        ``[N, C, H, W]``.

    Example:
        >>> import torch
        >>> from cem_fast import training
        >>> images = torch.rand(5, 3, 8, 8)
        >>> training.augment(images, mirror=True, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([5, 3, 8, 8])
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
    """Parameters with weight decay, and those without: biases and normalization."""
    parameters = list(model.parameters())
    return [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]


def _lay_out_like_parameters(optimizer: torch.optim.Optimizer) -> None:
    """Gives loaded optimizer state the memory layout of its parameters: rounding may depend on the order of the loops."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _to(part: Part, device: torch.device) -> Part:
    return Part(part.images.to(device), part.labels.to(device), part.groups)
