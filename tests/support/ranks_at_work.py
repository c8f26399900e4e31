"""The training of each of two processes in the tests, in a module that a spawned process can import."""

from __future__ import annotations

import os
from dataclasses import asdict, replace

import torch
import torch.distributed as dist
from torch import nn

from cem_fast import CEMLoss, CEMSchedule, defenses, models, training
from cem_fast.config import RunConfig
from cem_fast.data import Part, Splits
from cem_fast.models.split import SplitModel
from cem_fast.training import batch_norm
from cem_fast.training.resume import Snapshot

CONFIG = RunConfig(epochs=2, batch_size=9, learning_rate=0.02, noise_std=0.1, pruned_channels=0.3, adversary_weight=3.0)
# defense, its noise, arguments of CEM, and settings; batches of 9 and 8 images, so that shares differ
CASES = {
    "cem": ("bottleneck", 0.0, {"num_classes": 3, "num_components": 2, "covariance_type": "diag"}, {}),
    "without labels": ("bottleneck", 0.0, {"num_classes": 1, "num_components": 1}, {"cem_by_class": False}),
    "adversarial": ("adversarial", 0.0, None, {}),
    "parts": ("bottleneck", 0.0, None, {"accumulate": 2}),
    "patrol": ("patrol", 0.0, {"num_classes": 3, "num_components": 2}, {}),
    "noise": ("noise", 0.1, {"num_classes": 3, "num_components": 2}, {}),
}
EXACT = ("cem", "without labels", "adversarial", "parts")


def images() -> Splits:
    """26 double-precision images of three classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(26) % 3
    pixels = 0.5 * torch.rand(26, 1, 16, 16, generator=generator).double()
    for row, label in zip(pixels, labels.tolist()):
        row[:, 4:12, 5 * label : 5 * label + 5] += 0.4
    part = Part(pixels, labels, torch.arange(26))
    return Splits("tiny", part, part, part, 3, ("a", "b", "c"), mirrored=True)


def unnormalized(*, num_classes: int) -> SplitModel:
    """A network for 16x16 images without batch normalization, which would take its statistics over parts of a batch."""
    network = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(64, num_classes),
    )
    return SplitModel.from_sequential(network, cut=4)


class Counted(Snapshot):
    """A snapshot that counts its writes."""

    kept = 0

    def save(self, state):
        self.kept += 1
        super().save(state)


def train(name: str, group, snapshot: Snapshot | None = None, *, stop: int | None = None):
    """State and history of one case."""
    kind, noise, mixture, own = CASES[name]
    config = replace(CONFIG, **own)
    splits = images()
    torch.manual_seed(0)
    if name == "parts":
        model = unnormalized(num_classes=3)
    else:
        model = models.build("slim", image_shape=(1, 16, 16), num_classes=3, cut=2, bottleneck=8)
    model = model.double()
    settings = {key: asdict(config)[key] for key in defenses.settings()} | {"noise_std": noise}
    defense = defenses.build(kind, **settings).double()
    attach = defense.attach
    defense.attach = lambda *arguments: (model.float(), attach(*arguments), model.double(), defense.double())
    cem = {}
    if mixture is not None:
        loss = CEMLoss(**mixture, noise_std=0.1, process_group=group).double()
        cem = {"cem": loss, "schedule": CEMSchedule(0.5)}
    if stop is not None:
        before_epoch = defense.before_epoch

        def interrupted(*arguments, epoch, epochs):
            if epoch == stop:
                raise InterruptedError
            before_epoch(*arguments, epoch=epoch, epochs=epochs)

        defense.before_epoch = interrupted
    history = training.train(model, splits, defense, config=config, **cem, snapshot=snapshot, process_group=group)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    state |= {f"defense.{key}": value for key, value in defense.state_dict().items()}
    assert not any(isinstance(module, batch_norm._Synchronized) for module in model.modules())
    return state, [{**entry.to_json(), "seconds": 0} for entry in history]


def train_cases(rank: int, folder: str) -> None:
    """Trains every case and saves the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = {}
    for name in CASES:
        snapshot = Counted(f"{folder}/{name}", {})
        state, history = train(name, dist.group.WORLD, snapshot)
        results[name] = {"state": state, "history": history, "kept": snapshot.kept}
    drawn = []
    release = defenses.GaussianNoise.release
    defenses.GaussianNoise.release = lambda self, features: drawn.append(release(self, features) - features) or features
    train("noise", dist.group.WORLD)
    defenses.GaussianNoise.release = release
    results["noise"]["drawn"] = drawn[-1]
    snapshot = Snapshot(f"{folder}/again", {})
    try:
        train("noise", dist.group.WORLD, snapshot, stop=1)
    except InterruptedError:
        dist.barrier()
    results["noise"]["resumed"], _ = train("noise", dist.group.WORLD, snapshot)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()  # a process that leaves early would abort the other
    dist.destroy_process_group()
    os._exit(0)  # the interpreter's shutdown aborts while a thread of gloo holds a tensor
