"""Random numbers that depend only on a seed and do not affect the caller's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cem_fast._support.counts import require_count


@contextmanager
def seeded(seed: int, purpose: str = "") -> Iterator[None]:
    """Seeds torch's global generators inside the block and restores them afterwards.

    Args:
        seed: seed of every draw inside the block.
        purpose: purpose of the draws. Blocks of one seed and different purposes draw independent numbers, so that an attack is never
            fitted to the noise that it is tested on.

    Raises:
        TypeError: the seed is no integer.
        ValueError: the seed is negative, or above ``2**64 - 1``.
    """
    require_count("seed", seed, 0, 2**64 - 1)
    seed = derived(seed, purpose) if purpose else seed
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def derived(seed: int, purpose: str) -> int:
    """Returns the seed of one purpose, independent of those of other purposes."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose}".encode()).digest()[:8], "little")
