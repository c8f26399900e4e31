"""Functions run by each of two gloo ranks, in a module that spawned processes can import."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cem_fast import CEMLoss, GaussianMixture
from support.definitions import draw


def model_and_loss(group, covariance_type, variant):
    """A float64 linear encoder and CEM loss with a known mixture, equal on every rank."""
    torch.manual_seed(0)
    encoder = torch.nn.Linear(6, 5).double()
    _, _, mixture = draw(1, 5, 3, 2, diag=covariance_type == "diag")
    loss = CEMLoss(
        num_classes=3,
        num_components=2,
        noise_std=0.1,
        covariance_type=covariance_type,
        variant=variant,
        process_group=group,
    ).double()
    return encoder, loss.load_mixture(
        **mixture._asdict(), class_prior=torch.tensor([0.2, 0.3, 0.5]).double(), num_samples=100
    )


CASES = [
    (sizes, covariance_type, variant)
    for sizes in ((10, 10), (17, 3), (20, 0))
    for covariance_type, variant in (("spherical", "paper"), ("diag", "paper"), ("spherical", "official"))
]


def train(rank: int, folder: str) -> None:
    """One data-parallel step per case on the shard of this rank; rank 0 saves losses and averaged gradients."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for sizes, covariance_type, variant in CASES:
        encoder, loss = model_and_loss(dist.group.WORLD, covariance_type, variant)
        x, labels, _ = draw(sum(sizes), 6, 3, 2, diag=False)
        parallel = DistributedDataParallel(encoder)
        shard = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))
        value = loss(parallel(x[shard]), labels[shard])
        value.backward()
        results.append((value.detach(), encoder.weight.grad))
        del parallel
    if rank == 0:
        torch.save(results, f"{folder}/rank0.pt")
    dist.barrier()  # leaving while the other rank communicates would abort it
    dist.destroy_process_group()
    os._exit(0)  # the interpreter's shutdown aborts while a thread of gloo holds a tensor


FITS = [
    (sizes, algorithm, covariance_type, init)
    for sizes in ((150, 150), (271, 29), (300, 0))
    for algorithm, covariance_type in (("kmeans", "spherical"), ("kmeans", "diag"), ("em", "diag"))
    for init in ("given", "k-means++")
]

WEIGHTED = (FITS[0], FITS[5])


def fit_problem(group, sizes, algorithm, covariance_type, init):
    """Float64 rows of three classes with two components each, and a mixture to fit."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (sum(sizes),), generator=generator)
    component = torch.randint(0, 2, labels.shape, generator=generator)
    centers = torch.randn(3, 2, 4, generator=generator).double() * 2
    x = centers[labels, component] + torch.randn(len(labels), 4, generator=generator).double()
    start = centers.clone()
    if algorithm == "kmeans":
        start[1, 1] = 100  # far from all rows
    mixture = GaussianMixture(
        num_components=2,
        num_classes=3,
        algorithm=algorithm,
        covariance_type=covariance_type,
        init=start if init == "given" else init,
        max_iter=8,
        generator=torch.Generator().manual_seed(2),
        process_group=group,
    ).double()
    return x, labels, mixture


def fit(rank: int, folder: str) -> None:
    """Fits every case to the shard of this rank and saves the results."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results = []
    for sizes, *options in FITS:
        x, labels, mixture = fit_problem(dist.group.WORLD, sizes, *options)
        shard = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))
        mixture.fit(x[shard], labels[shard])
        results.append(dict(mixture.state_dict()))
    mixture = fit_problem(dist.group.WORLD, (300, 0), "em", "diag", "given")[2]
    mixture.fit(x[shard], labels[shard])
    if rank == 0:  # the other rank gathers no rows
        mixture.gather(x + 0.1, labels)
    results.append(dict(mixture.step().state_dict()))
    torch.save(results, f"{folder}/rank{rank}.pt")
    results = []
    for sizes, *options in WEIGHTED:  # the rows of rank 1 have no sample weights
        x, labels, mixture = fit_problem(dist.group.WORLD, sizes, *options)
        shard = slice(0, sizes[0]) if rank == 0 else slice(sizes[0], sum(sizes))
        mixture.fit(x[shard], labels[shard], repeats_of(x)[shard] if rank == 0 else None)
        results.append(dict(mixture.state_dict()))
    torch.save(results, f"{folder}/weighted{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # the interpreter's shutdown aborts while a thread of gloo holds a tensor


def repeats_of(x):
    """Sample weights of the rows of ``fit_problem``: 0 to 2 for the first half, 1 for the others."""
    repeats = torch.randint(0, 3, (len(x),), generator=torch.Generator().manual_seed(3)).double()
    return torch.where(torch.arange(len(x)) < len(x) // 2, repeats, 1.0)


class Protected(torch.nn.Module):
    """An encoder and its loss as one network."""

    def __init__(self, group):
        super().__init__()
        self.encoder, self.cem = model_and_loss(None, "spherical", "paper")
        self.cem = CEMLoss(num_classes=3, num_components=2, noise_std=0.1, process_group=group).double()

    def forward(self, x, labels):
        return self.cem(self.encoder(x), labels)


def load_on_rank_0(rank: int, folder: str) -> None:
    """Rank 0 alone loads a mixture before data-parallel training, with a process group and without one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x, labels, _ = draw(20, 6, 3, 2, diag=False)
    shard, answers = slice(10 * rank, 10 * rank + 10), []
    for group in (dist.group.WORLD, None):
        network = Protected(group)
        if rank == 0:
            network.cem.load_state_dict(model_and_loss(None, "spherical", "paper")[1].state_dict())
        parallel = DistributedDataParallel(network)
        try:
            answers.append(float(parallel(x[shard], labels[shard]).detach()))
        except RuntimeError as error:
            answers.append(str(error))
        dist.barrier()
    torch.save(answers, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def lose_a_rank(rank: int, folder: str, answers) -> None:
    """Rank 1 exits before the fit; rank 0 reports the error of its fit."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )
    x, labels, mixture = fit_problem(dist.group.WORLD, (300, 0), "kmeans", "diag", "given")
    if rank == 0:
        try:
            mixture.fit(x, labels)
        except RuntimeError as error:
            answers.put(str(error))


if __name__ == "__main__":  # a rank started by torchrun
    dist.init_process_group("gloo")
    x, labels, mixture = fit_problem(dist.group.WORLD, (200, 100), "em", "diag", "k-means++")
    shard = slice(0, 200) if dist.get_rank() == 0 else slice(200, 300)
    mixture.fit(x[shard], labels[shard])
    mixture.save(f"{sys.argv[1]}/rank{dist.get_rank()}.safetensors")
    dist.destroy_process_group()
    os._exit(0)  # the interpreter's shutdown aborts while a thread of gloo holds a tensor
