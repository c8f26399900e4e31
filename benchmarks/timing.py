"""Times contenders side by side: interleaved, on rotated buffers, each call apart from what makes it ready."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch

SETS = 3  # of input buffers, used in turn
SETTLE_S = 0.12  # until the threads of OpenBLAS and OpenMP sleep; 0.03 left the next contender half a core
L2_BYTES = 256 << 20


def nothing(_: int) -> None:
    """Makes nothing ready."""


class Contender(NamedTuple):
    """One who is timed.

    ``run`` gets the number of the buffers to use, ``before`` makes them ready, untimed; ``settles`` says that threads of its own
    go on spinning for a while after a call, which the next one must not pay for.
    """

    key: Hashable
    run: Callable[[int], object]
    before: Callable[[int], object] = nothing
    settles: bool = False


class Quantiles(NamedTuple):
    """20th, 50th and 80th percentile in milliseconds, of so many rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int


class CpuClock:
    """Wall time of a call, in milliseconds."""

    def time(self, contender: Contender, buffers: int) -> float:
        contender.before(buffers)
        start = time.perf_counter()
        contender.run(buffers)
        took = 1e3 * (time.perf_counter() - start)
        if contender.settles:
            time.sleep(SETTLE_S)
        return took


class CudaClock:
    """Time on the device between two events, in milliseconds, after the second-level cache was overwritten."""

    def __init__(self, device: torch.device):
        self.device = device
        self.flushed = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)

    def time(self, contender: Contender, buffers: int) -> float:
        contender.before(buffers)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flushed.zero_()
        start.record()
        contender.run(buffers)
        end.record()
        torch.cuda.synchronize(self.device)
        return start.elapsed_time(end)


def clock_of(device: torch.device) -> CpuClock | CudaClock:
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def race(
    contenders: Sequence[Contender],
    clock: CpuClock | CudaClock,
    *,
    budget_s: float,
    fewest: int = 3,
    most: int = 51,
) -> dict[Hashable, Quantiles]:
    """Times contenders in turn, in an order that changes from round to round.

    Where one of them has to settle, all others' threads have gone to sleep by then, too, and waking them takes the scheduler some
    of its ticks, up to 12 ms. Everyone then makes a call that does not count before each one that does.

    Args:
        contenders: who is timed, warmed up.
        clock: how.
        budget_s: seconds that count for each contender; who takes longer runs in few rounds, spread over the race.
        fewest: rounds of the slowest.
        most: rounds of the fastest.

    Returns:
        The quantiles of every contender, by its key.
    """
    asleep = any(contender.settles for contender in contenders)

    def time_of(contender: Contender, buffers: int) -> float:
        if asleep:  # on other buffers, so that what counts is not found in a cache
            contender.before((buffers + 1) % SETS)
            contender.run((buffers + 1) % SETS)
        return clock.time(contender, buffers)

    wanted = {}
    for contender in contenders:
        once = time_of(contender, 0) / 1e3
        wanted[contender.key] = min(most, max(fewest, int(budget_s / max(once, 1e-9))))
    rounds = max(wanted.values(), default=0)
    times: dict[Hashable, list[float]] = {contender.key: [] for contender in contenders}
    order, shuffle = list(contenders), random.Random(0).shuffle
    for turn in range(rounds):
        shuffle(order)
        for contender in order:
            if len(times[contender.key]) <= turn * wanted[contender.key] // rounds:
                times[contender.key].append(time_of(contender, turn % SETS))
    return {key: quantiles(found) for key, found in times.items()}


def quantiles(times: Sequence[float]) -> Quantiles:
    """Of times in milliseconds, each a value that was measured (nearest rank)."""
    ordered = sorted(times)
    return Quantiles(*(ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8)), len(ordered))
