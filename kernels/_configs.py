"""Which tile sizes and warps a kernel gets, by architecture, dtype and shape. One table; nothing is tuned at run time.

``BLOCK_N`` rows by ``BLOCK_D`` dimensions is the tile of x that a program holds in registers. The figures were chosen to keep
tiles in registers; not every architecture has been checked for spills, and nothing has been timed.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int = 1


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
}

# Registers of a thread on NVIDIA, all there are for eight warps: left to itself, ptxas spills to fit a second program.
MAX_REGISTERS = 255

# Components of a class that are accumulated at once; a forward reads x once for so many.
BLOCK_K = 16

# Rows beyond which sorting by counting every pair of labels costs more than a proper sort.
PAIRWISE_SORT_ROWS = 8192

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
