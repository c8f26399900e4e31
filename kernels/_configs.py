"""Tile sizes and warps of the kernels, by architecture, dtype and shape. Nothing is tuned at run time.

``BLOCK_N`` rows by ``BLOCK_D`` dimensions is the tile of x that a program holds in registers. The sizes were chosen so that no kernel
spills registers on any architecture of benchmarks/results/ahead_of_time.csv. They have not been timed.
"""

from __future__ import annotations

from typing import NamedTuple

# Components of a class that a forward accumulates at once, for one read of x.
BLOCK_K = 16


class Config(NamedTuple):
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int = 1
    BLOCK_K: int = BLOCK_K


# kernel family -> architecture -> bytes of a parameter (4: float32, 8: float64) -> configuration. "*" is any architecture; a
# compute capability such as "sm_90" or a gfx name overrides it.
TABLE: dict[str, dict[str, dict[int, Config]]] = {
    # x streams through in tiles while the means of one class come from the cache
    "distance": {"*": {4: Config(64, 32, 8), 8: Config(32, 32, 8)}},
    # all dimensions of a block of rows stay in registers between the assignment and the scatter
    "resident_narrow": {"*": {4: Config(64, 128, 8), 8: Config(32, 128, 8)}},
    "resident_wide": {"*": {4: Config(32, 512, 8)}},
    # one tile in, one tile out
    "gradient": {"*": {4: Config(128, 32, 8), 8: Config(64, 32, 8)}},
    "moments": {"*": {4: Config(64, 32, 8), 8: Config(32, 32, 8)}},
    "reduce": {"*": {4: Config(1, 1024, 4), 8: Config(1, 512, 4)}},
    "entropy": {"*": {4: Config(1, 1024, 4), 8: Config(1, 512, 4)}},
    "sort": {"*": {8: Config(256, 32, 8)}},
    "count": {"*": {8: Config(64, 32, 8)}},
    # matrix products: rows by components over dimensions, rows by dimensions over components, components by dimensions over rows
    "product": {"*": {4: Config(64, 16, 4, BLOCK_K=32)}},
    "product_gradient": {"*": {4: Config(64, 32, 8, BLOCK_K=16)}},
    "product_moments": {"*": {4: Config(16, 16, 4, BLOCK_K=64)}},
}

# Registers per thread on NVIDIA, the maximum for eight warps. Without it, ptxas spills in order to fit a second program.
MAX_REGISTERS = 255

# Minimum components and dimensions to evaluate one class by matrix products. Fewer would not fill their tiles.
PRODUCT_COMPONENTS = 128
PRODUCT_DIMENSIONS = 32

# NVIDIA: three TensorFloat-32 products. AMD: float32 products.
PRODUCT_PRECISIONS = ("tf32x3", "ieee")

# Maximum rows to sort by comparing all pairs of labels. Counting them takes a second launch, but less time for more rows.
PAIRWISE_SORT_ROWS = 1024

# Minimum rows per counting program, and maximum counts of all programs, because each program reads all counts.
COUNTED_ROWS = 1024
COUNTS = 1 << 16

# Maximum partial results of all segments (128 MB of float32), unless multiprocessors would be idle.
PARTIALS = 1 << 25

# Maximum rows of a forward that is split by dimensions: more rows fill the multiprocessors.
SPLIT_ROWS = 8192

# Minimum dimensions per program if a forward is split by dimensions, because its segments leave multiprocessors idle.
SPLIT_DIMENSIONS = 512

# Multiprocessors assumed in the interpreter, which has no device.
DEFAULT_MULTIPROCESSORS = 132


def config(family: str, itemsize: int, architecture: str = "*") -> Config | None:
    """Returns the configuration of a kernel family for parameters of ``itemsize`` bytes on one architecture, if it has one."""
    rows = TABLE[family]
    return rows.get(architecture, {}).get(itemsize) or rows["*"].get(itemsize)


def configs(family: str, itemsize: int) -> list[Config]:
    """Every configuration that :func:`config` can return, whatever the architecture."""
    return list(dict.fromkeys(row[itemsize] for row in TABLE[family].values() if itemsize in row))


def takes_products(labeled: bool, components: int, dimension: int, itemsize: int, aligned: bool) -> bool:
    """Whether a mixture is evaluated by matrix products (``global_mixture.py``) instead of component by component.

    The tiles that fill tensor cores leave no registers to fetch what is not aligned.
    """
    large = components >= PRODUCT_COMPONENTS and dimension >= PRODUCT_DIMENSIONS
    return not labeled and large and aligned and config("product", itemsize) is not None


def product_precision(architecture: str = "*") -> str:
    """The ``input_precision`` that gives a product of float32 matrices about float32's precision, on tensor cores."""
    on_nvidia, on_amd = PRODUCT_PRECISIONS
    return on_amd if architecture.startswith("gfx") else on_nvidia
