"""What every CUDA C++ kernel asks of a device, from its code: the longest path through a block and the bytes of memory.

Parameters of a mixture, and what a kernel has just written, come from the second-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from aot.device import L1, L2, Launch, Work, spilled
from cem_fast.benchmarks.gpu_profile import Shape

THREADS, WARPS = 128, 4
LABEL, PLACE = 8, 4  # bytes of a label or an assignment, and of a place in an order
SEARCHED = 512  # rows that are not sorted
SORTED_ROWS, SORTED_CLASSES = 1 << 14, 1023  # most that the statistics sort themselves
RUNS = 8  # partial results that are read at a time


def _rows_of_block(shape: Shape, launch: Launch) -> int:
    return ceil(shape.N / launch.blocks / THREADS) * THREADS


def count(shape: Shape, launch: Launch) -> Work:
    """A histogram in shared memory: the block's labels, two loads under way at a time."""
    turns = _rows_of_block(shape, launch) // THREADS
    return Work(hbm=ceil(turns / 2), barriers=3 + turns, cycles=20 * ceil(shape.C / THREADS), read=LABEL * shape.N)


def _find_places(shape: Shape, launch: Launch) -> dict[str, float]:
    """A thread adds up neighboring groups, a scan over the block, the groups again, and warps write them and their runs.

    Then four warps take turns at the rows.
    """
    groups, turns = shape.C + 1, _rows_of_block(shape, launch) // THREADS
    each, written = ceil(groups / THREADS), ceil(groups / (WARPS * launch.blocks))
    return {
        "l2": turns,
        "shuffles": 2 * 5,
        "barriers": 5 + WARPS * turns,
        "cycles": 160 * each + 200 + 350 * written + 180 * turns,
    }


def place(shape: Shape, launch: Launch) -> Work:
    """The counts of all blocks for every class, eight at a time, and their places."""
    work = _find_places(shape, launch)
    chunks = ceil((shape.C + 1) / THREADS)
    work["l2"] += chunks * ceil(launch.blocks / 8)
    work["cycles"] += 100 * chunks
    return Work(hbm=1, written=PLACE * shape.N, **work)


def sort(shape: Shape, launch: Launch) -> Work:
    """A block for 128 rows counts all rows, sixteen loads of a thread under way at a time, and finds the places of its own."""
    launch = launch._replace(blocks=ceil(shape.N / THREADS))
    work = _find_places(shape, launch)
    turns, chunks = ceil(shape.N / THREADS), ceil((shape.C + 1) / THREADS)
    work["l2"] += ceil(turns / 16) - 1
    work["cycles"] += 30 * turns + 60 * chunks
    work["barriers"] += 2
    return Work(hbm=1, read=LABEL * shape.N, written=PLACE * shape.N, **work)


def busy_blocks(shape: Shape, launch: Launch) -> int:
    """Blocks that have rows: runs of at most ``size`` rows of a class. A launch has N / size + C + 1 blocks."""
    if launch.kernel != "statistics_kernel" or shape.N <= SEARCHED or shape.C == 1:
        return launch.blocks
    size = ceil(shape.N / max(1, launch.blocks - shape.C - 1))
    return min(launch.blocks, shape.C * ceil(shape.N / shape.C / size))


def statistics(shape: Shape, launch: Launch) -> Work:
    """Pairs of rows by the warp, or by all warps where rows are long: the next pair is read ahead. Then the class's bound.

    The run of the block, its means and its rows come first. The last block of a class adds up the runs, the last of all
    classes the terms. Few rows are sorted before, and every block looks at the counters of the sort.
    """
    turns = shape.C > 1 and SEARCHED < shape.N <= SORTED_ROWS and shape.C <= SORTED_CLASSES
    together = shape.D > 512
    rows = shape.N / busy_blocks(shape, launch)
    pairs = ceil(rows / 2 / (1 if together else WARPS))
    loads, K = 4, shape.K
    # a mean of four dimensions, and two operations for each of two rows; sums over the warp, the choice, the bookkeeping
    instructions = loads * K * 17 + 220 + 160 * shape.diag
    columns = K * ceil(shape.D / (4 * THREADS)) if shape.diag else 0
    terms = ceil(shape.C * K / THREADS / RUNS)
    return Work(
        # pairs after the first have been read ahead
        hbm=3 + (pairs - 1) / 2,
        l2=5 + columns + 2 * turns,
        shuffles=8 * pairs,
        barriers=8 + pairs * together + 2 * turns,
        cycles=pairs * instructions + 2000 + 400 * columns,
        instructions=pairs * instructions + 600,
        read=shape.features + shape.means + (shape.variances if shape.diag else 0) + PLACE * shape.N,
        written=LABEL * shape.N + spilled(4 * launch.blocks * K * shape.D * shape.diag),
        requested=WARPS * 2 * min(4 * shape.D, 2048),
        pipelined=pairs > 2,
        first=2,
        last=terms * L2,
        before=sort(shape, launch) if turns else None,
    )


def scatter_gradient(shape: Shape, launch: Launch) -> Work:
    """A row by the warp, 512 dimensions at a time: the row with its label and component, then its mean and slope."""
    return Work(
        hbm=1,
        l2=1,
        cycles=150,
        instructions=150,
        read=shape.features + 2 * LABEL * shape.N,
        written=shape.features,
        requested=WARPS * min(4 * shape.D, 2048),
    )


def _distances(shape: Shape, weighted: bool) -> Work:
    """Four rows of a warp to all means, eight at a time, 128 dimensions at a time.

    The first-level cache keeps the rows of a tile and, of one class with few components, its parameters.
    """
    steps, passes = ceil(shape.D / THREADS), ceil(shape.K / 8)
    return Work(
        hbm=steps,
        shuffles=31 * passes,
        cycles=steps * shape.K * 24 + L1 * steps * (passes - 1 + passes * (1 + weighted)),
        instructions=steps * shape.K * (20 + 4 * weighted) * 2,
    )


def _times(work: Work, count: float, **more: float) -> Work:
    names = ("hbm", "l2", "shuffles", "barriers", "cycles", "instructions")
    fields = {name: count * getattr(work, name) for name in names}
    for name, value in more.items():
        fields[name] = fields.get(name, 0.0) + value
    return Work(**fields)


def assign(shape: Shape, launch: Launch) -> Work:
    """Sixteen rows of a block at a time: their nearest means, then their deviations by dimension, eight rows at a time."""
    tiles = ceil(shape.N / launch.blocks / 16)
    sums = ceil(shape.D / THREADS) * 2
    return _times(
        _distances(shape, False),
        tiles,
        l2=3,
        barriers=3 * tiles + 4,
        cycles=(100 + 2 * sums * L1) * tiles,
        read=shape.features + PLACE * shape.N,
        written=PLACE * shape.N,
        requested=WARPS * 4 * min(4 * shape.D, 512),
    )


def _sum_over_segments(shape: Shape, segments: int) -> float:
    """Loads of a sum over the segments that four shares of a block split, sixteen at a time."""
    return segments / 4 / 16


def move_means(shape: Shape, launch: Launch) -> Work:
    steps = _sum_over_segments(shape, 512)
    return Work(l2=6 + steps, barriers=12, cycles=800 + 20 * steps)


def nothing(shape: Shape, launch: Launch) -> Work:
    """Blocks that find nothing to do."""
    return Work(l2=2)


def expect(shape: Shape, launch: Launch) -> Work:
    """Sixteen rows of a block at a time: log-densities of all components, their largest, and the posteriors."""
    tiles = ceil(shape.N / launch.blocks / 16)
    return _times(
        _distances(shape, shape.diag),
        tiles,
        l2=3 + tiles,
        shuffles=6 * tiles,
        cycles=600 * tiles,
        barriers=4,
        read=shape.features + PLACE * shape.N,
        requested=WARPS * 4 * min(4 * shape.D, 512),
    )


def fit_moments(shape: Shape, launch: Launch) -> Work:
    """A segment in 128 dimensions: its posteriors, then its rows again, four at a time, for all components."""
    wide = ceil(shape.D / THREADS)
    rows = shape.N * wide / launch.blocks
    turns = ceil(rows / 4)
    return Work(
        l2=4 + turns,
        barriers=4,
        cycles=turns * 4 * shape.K * 5 + 400,
        instructions=turns * 4 * shape.K * 5,
        read=spilled(shape.features),
    )


def maximize(shape: Shape, launch: Launch) -> Work:
    steps = 2 * _sum_over_segments(shape, 256)
    return Work(l2=8 + steps, barriers=20, cycles=1500 + 20 * steps)


def _global_tiles(shape: Shape, launch: Launch, of_tile: int, of_dimensions: int) -> dict[str, float]:
    """Tiles of 128 rows and 32 components, one after the other; of 32 dimensions at a time, what they need is read first.

    A warp's instructions, counted in the machine code for sm_90: 3,344 for the distances in so many dimensions, and what is
    given for reading them and for the end of a tile.
    """
    tiles = ceil(shape.N / 128) * ceil(shape.K / 32) / launch.blocks
    steps = ceil(shape.D / 32)
    instructions = tiles * (steps * (3344 + of_dimensions) + of_tile)
    return {
        "hbm": steps,
        "l2": ceil(tiles - 1) * steps,
        "barriers": tiles * (2 * steps + 1),
        "cycles": instructions,  # a block has one warp for each of four schedulers
        "instructions": instructions,
        "read": shape.features + shape.means + shape.variances,
        "requested": 4 * 128 * 32,
    }


def global_log_prob(shape: Shape, launch: Launch) -> Work:
    """Then the last block of a sixteenth of the rows adds up the shares of the components, four at a time, twice."""
    shares = launch.blocks / ceil(shape.N / 128)
    turns = ceil(shape.N / 16 / THREADS)
    return Work(**_global_tiles(shape, launch, 1120, 360), last=turns * (shares * (2 * L2 / 4 + 60) + 400))


def global_posterior(shape: Shape, launch: Launch) -> Work:
    return Work(**_global_tiles(shape, launch, 910, 360), written=spilled(4 * shape.N * shape.K))


def global_gradient(shape: Shape, launch: Launch) -> Work:
    """A tile of 32 rows and 64 dimensions: 32 components at a time, with x and the posterior that were read or written before."""
    steps = ceil(shape.K / 32)
    instructions = steps * (1704 + 190) + 350
    return Work(
        l2=1 + steps,
        barriers=2 * steps + 2,
        cycles=instructions,
        instructions=instructions,
        read=spilled(shape.features) + spilled(4 * shape.N * shape.K),
        written=shape.features,
    )


KERNELS: dict[str, Callable[[Shape, Launch], Work]] = {
    "count_kernel": count,
    "place_kernel": place,
    "sort_kernel": sort,
    "statistics_kernel": statistics,
    "scatter_gradient_kernel": scatter_gradient,
    "assign_kernel": assign,
    "move_means_kernel": move_means,
    "reseed_kernel": nothing,
    "expect_kernel": expect,
    "fit_moments_kernel": fit_moments,
    "maximize_kernel": maximize,
    "global_log_prob_kernel": global_log_prob,
    "global_posterior_kernel": global_posterior,
    "global_gradient_kernel": global_gradient,
}


def work_of(shape: Shape, launch: Launch) -> Work:
    """What a launch asks of a device.

    Raises:
        KeyError: the kernel is not described.
    """
    return KERNELS[launch.kernel](shape, launch)
