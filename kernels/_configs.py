"""Which tile sizes and warps a kernel gets, by architecture, dtype and shape. One table; nothing is tuned at run time.

``BLOCK_N`` rows by ``BLOCK_D`` dimensions is the tile of x that a program holds in registers. The figures were chosen to keep
tiles in registers: nothing spills on any architecture of benchmarks/results/ahead_of_time.csv, and nothing has been timed.
"""

from __future__ import annotations

from typing import NamedTuple

# Components of a class that are accumulated at once; a forward reads x once for so many.
BLOCK_K = 16


class Config(NamedTuple):
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int = 1
    BLOCK_K: int = BLOCK_K


# kernel family -> bytes of a parameter (4: float32, 8: float64) -> configuration. The key "*" is every architecture; a compute
# capability such as "sm_90" or a gfx name overrides it.
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
    "count": {"*": {8: Config(128, 32, 8)}},
    # matrix products: rows by components over dimensions, rows by dimensions over components, components by dimensions over rows
    "product": {"*": {4: Config(64, 16, 4, BLOCK_K=32)}},
    "product_gradient": {"*": {4: Config(64, 32, 8, BLOCK_K=16)}},
    "product_moments": {"*": {4: Config(16, 32, 4, BLOCK_K=64)}},
}

# Registers of a thread on NVIDIA, all there are for eight warps: left to itself, ptxas spills to fit a second program.
MAX_REGISTERS = 255

# One class is evaluated by matrix products from so many components and dimensions on: fewer would not fill their tiles.
PRODUCT_COMPONENTS = 128
PRODUCT_DIMENSIONS = 32

# Three products of TensorFloat-32 on NVIDIA; AMD multiplies float32 as it is.
PRODUCT_PRECISIONS = ("tf32x3", "ieee")

# Rows beyond which comparing every pair of labels costs more than counting them, which takes one launch more.
PAIRWISE_SORT_ROWS = 8192

# Rows that a program counts at least, and counts of all programs together, each of which reads them all.
COUNTED_ROWS = 1024
COUNTS = 1 << 16

# Partial results that segments leave in all, unless multiprocessors would be idle: 128 MB of float32.
PARTIALS = 1 << 25

# A forward is split by dimensions, at least this many to a program, while its segments leave multiprocessors idle.
SPLIT_DIMENSIONS = 512

# Multiprocessors assumed where there is no device to ask (the interpreter).
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
