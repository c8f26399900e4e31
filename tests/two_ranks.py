"""What each of two gloo ranks runs in test_distributed.py; in its own module so that a spawned process can import it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from definitions import draw
from torch.nn.parallel import DistributedDataParallel

from cem_fast import CEMLoss


def model_and_loss(group, covariance_type, variant):
    """A linear encoder and a CEM loss with a known mixture, float64, the same on every rank."""
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
    """One data-parallel step on this rank's shard for each case; rank 0 saves the losses and the averaged gradients."""
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
    dist.barrier()  # a rank that leaves while the other still talks to it would abort it
    dist.destroy_process_group()
