"""The speed model: the time of a kernel launch from what it asks of a device. docs/internals/gpu_model.md explains it.

Every constant is an assumption. The first device can refute each of them with ``benchmarks/gpu_profile.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, sqrt
from typing import NamedTuple

# Cycles until a dependent instruction can use a result
HBM = 700  # a load that misses the cache, on an idle memory
L2 = 270  # a load from the second-level cache
L1 = 40  # a load from the first-level cache or from shared memory
SHUFFLE = 25  # between the threads of a warp
BARRIER = 40  # of a block, with the shared memory behind it
LOADED = 1400  # a load that misses the cache while memory is busy: what bytes in flight must bridge

# Bytes that one kernel reads or writes and the next reads without a trip to memory: two thirds of the second-level cache
KEPT_BYTES = 40e6

# Microseconds
LAUNCH_US = 1.0  # from the end of a kernel to the first instruction of the next one in a graph or a busy stream
TORCH_US = 4.0  # a small torch operation: the host launches more slowly than the device works
WAIT_US = 10.0  # the host waits for the device, and the device then for the host
CPP_CALL_US = 2.2  # the driver's call of a launch from C++
TRITON_CALL_US = 6.0  # Triton's launcher: arguments, checks of their addresses, the driver's call


@dataclass(frozen=True)
class Device:
    """A GPU: its multiprocessors, and the rate at which copies move bytes."""

    name: str
    architecture: int
    multiprocessors: int
    clock_ghz: float
    memory_tb_s: float  # read and written, as a copy reaches it
    shared_kib: int
    warps: int

    def resident(self, launch: Launch) -> int:
        """Blocks that a multiprocessor holds at a time."""
        warps = ceil(launch.threads / 32)
        # registers are handed out in units of 256 to a warp; the driver keeps a KiB of shared memory in every block
        by_registers = 65536 // (ceil(launch.registers / 8) * 256) // warps
        by_shared = (self.shared_kib + 1) * 1024 // (launch.shared + 1024)
        return max(1, min(by_registers, by_shared, self.warps // warps, 32))


H200 = Device("H200", 90, 132, 1.98, 4.3, 227, 64)
A100 = Device("A100", 80, 108, 1.41, 1.3, 163, 64)
DEVICES = (H200, A100)


def spilled(size: float) -> float:
    """Bytes of memory behind a temporary buffer of a size: none if the second-level cache keeps it."""
    return size if size > KEPT_BYTES else 0.0


class Launch(NamedTuple):
    """One kernel launch."""

    kernel: str
    blocks: int
    threads: int  # of a block
    registers: int  # of a thread
    shared: int  # bytes of a block
    configuration: str = ""  # template arguments
    numbers: dict[str, int] = {}  # noqa: RUF012 (arguments of a Triton kernel, without tensors; never changed)


@dataclass(frozen=True)
class Work:
    """What one launch asks of a device.

    Args:
        hbm: dependent loads that miss the cache, on the longest path through a block.
        l2: dependent loads from the second-level cache on that path.
        shuffles: dependent shuffles on that path.
        barriers: barriers on that path.
        cycles: other cycles on that path.
        instructions: instructions of a warp.
        read: bytes of memory that the launch reads.
        written: bytes of memory that it writes.
        requested: bytes of the streamed operand that a block requests at a time.
        pipelined: whether they are requested again before the last ones are used up.
        first: dependent loads that miss the cache before the stream begins.
        last: cycles that the last block alone needs at the end.
        before: what some blocks do at the beginning while all others wait for them.
    """

    hbm: float = 0
    l2: float = 0
    shuffles: float = 0
    barriers: float = 0
    cycles: float = 0
    instructions: float = 0
    read: float = 0
    written: float = 0
    requested: float = 0
    pipelined: bool = False
    first: float = 0
    last: float = 0
    before: Work | None = None

    @property
    def path(self) -> float:
        """Cycles of the longest path through a block."""
        return self.hbm * HBM + self.l2 * L2 + self.shuffles * SHUFFLE + self.barriers * BARRIER + self.cycles

    @property
    def steps(self) -> float:
        """Dependent memory steps of a block."""
        return self.hbm + self.l2 + (self.before.steps if self.before else 0)

    @property
    def moved(self) -> float:
        return self.read + self.written + (self.before.moved if self.before else 0)


def in_flight(launch: Launch, work: Work, device: Device) -> float:
    """Bytes of the streamed operand that the blocks on a multiprocessor request before they wait for them."""
    return _at_once(launch, device) * work.requested


def _at_once(launch: Launch, device: Device) -> int:
    """Blocks at a time on the busiest multiprocessor."""
    return min(device.resident(launch), ceil(launch.blocks / device.multiprocessors))


def utilization(launch: Launch, work: Work, device: Device) -> float:
    """Share of the memory's rate that the resident blocks can ask for.

    A load takes HBM cycles on an idle memory and LOADED on a busy one; in between, its time rises linearly with the rate:
    ``rate = bytes / (path + waits (LOADED - HBM) u)``, which is a quadratic equation for ``u = rate / most``.
    """
    most = device.memory_tb_s * 1e3 / device.clock_ghz / device.multiprocessors  # bytes per cycle
    at_once = _at_once(launch, device)
    if work.pipelined:
        bytes_at_once, path, waits = at_once * work.requested, float(HBM), 1.0
    else:
        bytes_at_once, path, waits = at_once * work.moved / launch.blocks, work.path, work.hbm
    rising, asked = waits * (LOADED - HBM), bytes_at_once / most
    if rising == 0:
        return min(1.0, asked / path)
    return min(1.0, (sqrt(path * path + 4 * rising * asked) - path) / (2 * rising))


def microseconds(launch: Launch, work: Work, device: Device, busy: int | None = None) -> float:
    """Time of a launch: the longest of its dependent steps, its instructions and its bytes of memory.

    ``busy`` blocks have something to do; all of them by default.
    """
    clock = device.clock_ghz * 1e3
    launch = launch._replace(blocks=busy or launch.blocks)
    waves = ceil(launch.blocks / (device.resident(launch) * device.multiprocessors))
    warps = launch.blocks * ceil(launch.threads / 32)
    times = [waves * work.path / clock, warps * work.instructions / (4 * device.multiprocessors) / clock]
    if work.moved:
        rate = device.memory_tb_s * 1e6 * utilization(launch, work, device)
        times.append(work.moved / rate + work.first * HBM / clock)
    alone = work.last + (work.before.path if work.before else 0)
    return LAUNCH_US + max(times) + alone / clock
