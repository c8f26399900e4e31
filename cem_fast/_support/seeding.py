"""Random numbers that depend on a seed alone and leave the caller's own untouched."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int, purpose: str = "") -> Iterator[None]:
    """Seeds torch's global generators inside the block and restores them after it.

    Args:
        seed: seed of every draw inside the block.
        purpose: what the draws are for; blocks of the same seed and different purposes draw independent numbers, so that an attack
            never learns on the very noise that it is tested on.
    """
    seed = derived(seed, purpose) if purpose else seed
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def derived(seed: int, purpose: str) -> int:
    """Returns a seed for one purpose, which shares no draws with those for others."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "little")
