"""Interleaved timing of contenders on rotated buffers, without the preparation of each call."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, Protocol

import torch

SETS = 3  # sets of input buffers, used in turn
SETTLE_S = 0.12  # until idle threads of OpenBLAS and OpenMP sleep; after 0.03 they still occupied half a core
L2_BYTES = 256 << 20


def nothing(_: int) -> None:
    """The default preparation: none."""


class Contender(NamedTuple):
    """A function to time.

    Args:
        key: identifies the contender in the results.
        run: the timed call; it gets the number of the buffers to use.
        before: prepares the call on the same buffers, untimed.
        settles: whether its threads keep spinning after a call; the clock then waits until they sleep.
    """

    key: Hashable
    run: Callable[[int], object]
    before: Callable[[int], object] = nothing
    settles: bool = False


class Quantiles(NamedTuple):
    """20th, 50th and 80th percentile in milliseconds, and the number of rounds."""

    p20: float
    p50: float
    p80: float
    rounds: int


class Clock(Protocol):
    """Times one call of a contender."""

    def time(self, contender: Contender, buffers: int) -> float: ...


class CpuClock:
    """Wall time of a call in milliseconds."""

    def time(self, contender: Contender, buffers: int) -> float:
        contender.before(buffers)
        start = time.perf_counter()
        contender.run(buffers)
        took = 1e3 * (time.perf_counter() - start)
        if contender.settles:
            time.sleep(SETTLE_S)
        return took


class CudaClock:
    """Device time between two events in milliseconds; the L2 cache is overwritten before."""

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


def clock_of(device: torch.device) -> Clock:
    """The clock of a device type: events on CUDA, wall time on the CPU."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


def race(
    contenders: Sequence[Contender],
    clock: Clock,
    *,
    budget_s: float,
    fewest: int = 3,
    most: int = 51,
) -> dict[Hashable, Quantiles]:
    """Times contenders round by round, in a new random order each round.

    If one contender has to settle, the idle threads of all others sleep meanwhile, and waking them takes up to 12 ms.
    Every timed call then follows an untimed call of the same contender.

    Args:
        contenders: warmed-up contenders.
        clock: times one call.
        budget_s: timed seconds per contender; slow contenders get fewer rounds, spread over the run.
        fewest: rounds of the slowest contender.
        most: rounds of the fastest contender.

    Returns:
        Quantiles of each contender by its key.

    Example:
        >>> from cem_fast.benchmarks.timing import Contender, CpuClock, race
        >>> contenders = [Contender("sum", lambda _: sum(range(1_000))), Contender("list", lambda _: list(range(1_000)))]
        >>> found = race(contenders, CpuClock(), budget_s=0.01, most=5)
        >>> {key: times.rounds for key, times in found.items()}
        {'sum': 5, 'list': 5}
    """
    asleep = any(contender.settles for contender in contenders)

    def time_of(contender: Contender, buffers: int) -> float:
        if asleep:  # on other buffers: the timed call must not find its rows in a cache
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
    """Quantiles of times in milliseconds by nearest rank.

    Example:
        >>> from cem_fast.benchmarks.timing import quantiles
        >>> quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
        Quantiles(p20=2.0, p50=3.0, p80=5.0, rounds=6)
    """
    ordered = sorted(times)
    p20, p50, p80 = (ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8))
    return Quantiles(p20, p50, p80, len(ordered))
