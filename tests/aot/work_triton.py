"""What every Triton kernel asks of a device, from its code: the longest path through a program and the bytes of memory.

Matrices that a kernel has just written, and the parameters of a mixture, come from the second-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, log2

from aot.device import Launch, Work, spilled
from cem_fast.benchmarks.gpu_profile import Shape

ROWS_INDEX = 8  # bytes of a label or of a place in an order


Numbers = dict[str, int]


def _search(shape: Shape, of: Numbers) -> Work:
    """The rows of a segment: a binary search of the classes, or two passes over all labels; then the order."""
    if of["grouping"] == 2:
        return Work(hbm=1, l2=ceil(log2(shape.C + 1)) + 2)
    if of["grouping"] == 1:
        return Work(l2=2, cycles=2 * ceil(shape.N / 16) * 300)
    return Work()


def _tile_steps(shape: Shape, diag: bool, tiles: float) -> dict[str, float]:
    """Distances of tiles of x: a wait for x, then for each component its mean and a sum over the warp's dimensions."""
    K = shape.K
    return dict(hbm=tiles, l2=tiles * K, shuffles=tiles * K * (6 + 4 * diag))


def _added(*parts: Work, **fields: float | bool) -> Work:
    names = ("hbm", "l2", "shuffles", "barriers", "cycles", "instructions")
    return Work(**{name: sum(getattr(part, name) for part in parts) for name in names}, **fields)


def pairwise_sort(shape: Shape, of: Numbers) -> Work:
    """Every program compares its rows with all others, a chunk at a time."""
    steps = ceil(shape.N / of["CHUNK"])
    return Work(hbm=1, l2=steps, cycles=steps * 430, read=ROWS_INDEX * shape.N, written=ROWS_INDEX * shape.N)


def _placed(shape: Shape, of: Numbers) -> Work:
    """Chunks of rows, each compared with itself, which takes CHUNK^2 comparisons in one program."""
    chunks = ceil(of["rows_of_program"] / of["CHUNK"])
    instructions = 2833 * (of["CHUNK"] / 128) ** 2 * chunks
    # two warps share an issue slot
    return Work(hbm=1, l2=3 * chunks, barriers=4 * chunks, cycles=2 * instructions, instructions=instructions)


def count(shape: Shape, of: Numbers) -> Work:
    return _added(_placed(shape, of), read=ROWS_INDEX * shape.N)


def place(shape: Shape, of: Numbers) -> Work:
    table = Work(l2=ceil((shape.C + 1) / of["SPAN"]) * ceil(of["programs"] / of["SPAN"]))
    return _added(_placed(shape, of), table, read=ROWS_INDEX * shape.N, written=ROWS_INDEX * shape.N)


def statistics_forward(shape: Shape, of: Numbers) -> Work:
    tiles = ceil(shape.D / of["BLOCK_D"])
    blocks = _rows_blocks(shape, of, of["BLOCK_N"])
    if of["splits"] > 1:
        own = Work(l2=blocks * (of["splits"] + 2), barriers=4 * blocks)
        return _added(_search(shape, of), own, read=ROWS_INDEX * shape.N, written=ROWS_INDEX * shape.N)
    own = Work(**{name: blocks * value for name, value in _tile_steps(shape, bool(of["DIAG"]), tiles).items()})
    return _added(
        _search(shape, of),
        own,
        read=shape.features + shape.means + ROWS_INDEX * shape.N,
        written=ROWS_INDEX * shape.N,
        requested=4 * of["BLOCK_N"] * of["BLOCK_D"],
    )


def distance(shape: Shape, of: Numbers) -> Work:
    tiles = ceil(of["split_size"] / of["BLOCK_D"])
    return _added(
        _search(shape, of),
        Work(**_tile_steps(shape, bool(of["DIAG"]), tiles)),
        read=shape.features + shape.means,
        requested=4 * of["BLOCK_N"] * of["BLOCK_D"],
    )


def _rows_blocks(shape: Shape, of: Numbers, block: int) -> int:
    """Tiles of rows that one segment has."""
    return max(1, of.get("rows_per_segment", block) // block)


def resident(shape: Shape, of: Numbers) -> Work:
    """x stays in registers between the assignment and the scatter; sums over rows go through shared memory."""
    blocks, K = _rows_blocks(shape, of, of["BLOCK_N"]), shape.K
    own = Work(hbm=blocks, l2=2 * blocks * K, shuffles=6 * blocks * K, barriers=8 * blocks * K)
    return _added(
        _search(shape, of),
        own,
        read=shape.features + shape.means,
        written=spilled(4 * of["segments"] * of["width"]),
        requested=4 * of["BLOCK_N"] * shape.D,
    )


def scatter(shape: Shape, of: Numbers) -> Work:
    """The second read of x: for each tile and component, a sum over rows through shared memory."""
    tiles = ceil(of["d_size"] / of["BLOCK_D"]) * _rows_blocks(shape, of, of["BLOCK_N"])
    own = Work(hbm=tiles, l2=tiles * shape.K, barriers=10 * tiles * shape.K)
    segments = of.get("segments", ceil(shape.N / of["BLOCK_N"]))
    return _added(
        _search(shape, of),
        own,
        read=shape.features + shape.means,
        written=spilled(4 * segments * of["width"]),
        requested=4 * of["BLOCK_N"] * of["BLOCK_D"],
    )


def reduce(shape: Shape, of: Numbers) -> Work:
    """The segments of a class one after the other: the size of each, then its sums."""
    segments = of["segments"] / shape.C
    return Work(hbm=1, l2=2 + 2 * segments, cycles=100 * segments, written=4 * shape.C * of["width"])


def spherical_bound(shape: Shape, of: Numbers) -> Work:
    """One program: a sum of the counts, then every component."""
    turns = ceil(shape.C * shape.K / of["BLOCK"])
    return Work(hbm=2 + turns, l2=2 * turns, cycles=1000 + 1200 * turns)


def bound(shape: Shape, of: Numbers) -> Work:
    """One program a component; with partial sums, the segments of its class twice, for the counts and for the scatter."""
    turns = ceil(shape.D / of["BLOCK"])
    segments = of["segments"] / shape.C if of["FROM_PARTIALS"] else 1
    return Work(
        hbm=2,
        l2=2 + 2 * segments * (1 + turns),
        cycles=100 * segments * (1 + turns) + 300 * turns,
        read=shape.means,
        written=shape.means,
    )


def total(shape: Shape, of: Numbers) -> Work:
    return Work(hbm=1, l2=1, cycles=500)


def statistics_backward(shape: Shape, of: Numbers) -> Work:
    """One tile: its rows, their components, then x, means and slopes; every row its own, or those of the class in turn."""
    rows = dict(
        read=shape.features + shape.means * (1 + shape.diag) + 2 * ROWS_INDEX * shape.N,
        written=shape.features,
        requested=4 * of["BLOCK_N"] * of["BLOCK_D"],
    )
    if of["GATHER"]:
        return _added(_search(shape, of), Work(hbm=1, l2=3, cycles=200), **rows)
    return _added(_search(shape, of), Work(hbm=2, l2=shape.K, cycles=200), **rows)


def log_prob_forward(shape: Shape, of: Numbers) -> Work:
    tiles = ceil(shape.D / of["BLOCK_D"])
    kept = spilled(4 * shape.N * shape.K) * of["with_responsibilities"]
    return _added(
        _search(shape, of),
        Work(**_tile_steps(shape, bool(of["DIAG"]), tiles)),
        Work(l2=2, barriers=2, cycles=400),
        read=shape.features + 2 * shape.means,
        written=kept,
        requested=4 * of["BLOCK_N"] * of["BLOCK_D"],
    )


def log_prob_backward(shape: Shape, of: Numbers) -> Work:
    """One tile: for each component its responsibilities and its mean."""
    return _added(
        _search(shape, of),
        Work(hbm=1, l2=2 * shape.K, cycles=50 * shape.K),
        read=shape.features + 2 * shape.means + spilled(4 * shape.N * shape.K),
        written=shape.features,
        requested=4 * of["BLOCK_N"] * of["BLOCK_D"],
    )


def moments(shape: Shape, of: Numbers) -> Work:
    """One tile of dimensions: for each component its responsibilities, its mean, and two sums over rows."""
    blocks = _rows_blocks(shape, of, of["BLOCK_N"])
    own = Work(hbm=blocks, l2=blocks * (1 + shape.K), barriers=12 * blocks * shape.K)
    return _added(
        _search(shape, of),
        own,
        read=shape.features + shape.means,
        written=spilled(4 * of["segments"] * of["width"]),
        requested=4 * of["BLOCK_N"] * of["BLOCK_D"],
    )


def component_terms(shape: Shape, of: Numbers) -> Work:
    return Work(hbm=2, shuffles=10, cycles=300, read=2 * shape.means)


# Of all columns, those that some row of a tile takes directly: with a floor of the maximum known and, in version 0.1, with the
# maximum of the columns so far. Counted by simulation on uniform rows, means and variances, 4,096 x 128 and 1,000 components.
DIRECT, DIRECT_BEFORE = 0.06, 0.94


def _share_of_products(shape: Shape, of: Numbers, direct: float) -> Work:
    """Tiles of components: products over the dimensions, then one column after the other directly."""
    turns = ceil(shape.D / of["BLOCK_D"])
    columns = of["share_size"] * direct
    tiles = of["share_size"] / of["BLOCK_K"]
    own = Work(l2=columns * turns + tiles * turns, cycles=80 * columns * turns + 500 * tiles * turns)
    return _added(own, read=shape.features + 2 * shape.means, requested=4 * of["BLOCK_N"] * of["BLOCK_D"])


def global_floor(shape: Shape, of: Numbers) -> Work:
    return _share_of_products(shape, of, 0)


def global_log_prob(shape: Shape, of: Numbers) -> Work:
    return _share_of_products(shape, of, DIRECT)


def global_log_prob_before(shape: Shape, of: Numbers) -> Work:
    return _share_of_products(shape, of, DIRECT_BEFORE)


def global_responsibilities(shape: Shape, of: Numbers) -> Work:
    turns = ceil(shape.D / of["BLOCK_D"])
    columns = of["BLOCK_K"] * DIRECT
    own = Work(hbm=1, l2=(1 + columns) * turns, cycles=(600 + 80 * columns) * turns + 1000)
    return _added(own, read=shape.features + 2 * shape.means, written=spilled(4 * shape.N * shape.K))


def global_gradient(shape: Shape, of: Numbers) -> Work:
    """For every tile of components its responsibilities and means, two products, and what is taken directly."""
    tiles = ceil(shape.K / of["BLOCK_K"])
    columns = of["BLOCK_K"] * DIRECT
    own = Work(l2=tiles * (2 + 2 * columns), barriers=tiles * 12, cycles=tiles * (1300 + 500 * columns))
    return _added(own, read=shape.features + 2 * shape.means + spilled(4 * shape.N * shape.K), written=shape.features)


_KERNELS: dict[str, Callable[[Shape, Numbers], Work]] = {
    "pairwise_sort_kernel": pairwise_sort,
    "count_kernel": count,
    "place_kernel": place,
    "component_statistics_fwd_kernel": statistics_forward,
    "distance_kernel": distance,
    "resident_statistics_kernel": resident,
    "scatter_kernel": scatter,
    "reduce_kernel": reduce,
    "entropy_bound_spherical_kernel": spherical_bound,
    "entropy_bound_kernel": bound,
    "sum_kernel": total,
    "component_statistics_bwd_kernel": statistics_backward,
    "mixture_log_prob_fwd_kernel": log_prob_forward,
    "mixture_log_prob_bwd_kernel": log_prob_backward,
    "mixture_moments_kernel": moments,
    "component_terms_kernel": component_terms,
    "global_floor_kernel": global_floor,
    "global_log_prob_kernel": global_log_prob,
    "global_log_prob_kernel of version 0.1": global_log_prob_before,
    "global_responsibilities_kernel": global_responsibilities,
    "global_gradient_kernel": global_gradient,
}


def work_of(shape: Shape, launch: Launch) -> Work:
    """What a launch asks of a device.

    Raises:
        KeyError: the kernel is not described.
    """
    return _KERNELS[launch.kernel](shape, launch.numbers)
