"""Host code shared by the launchers: configurations of the device at hand, contiguous arguments, and the launch itself."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton
from cem_fast.kernels import _configs
from cem_fast.kernels._configs import Config
from torch import Tensor

# Where the forward kept no responsibilities, the backward makes them for at most this many elements of [rows, K] at a time.
RECOMPUTED_ELEMENTS = 1 << 22


class Kernel:
    """One kernel, compiled in at most two versions for every choice of dtypes and constants.

    ``aligned`` may take every argument named in ``wide``, an address or a number of elements, for a multiple of 16, and so
    touch memory in 128-bit pieces; ``general`` takes nothing for granted. Left to itself, Triton would compile a version for
    every combination of multiples of 16 and ones that comes along, more than can be checked beforehand.
    """

    def __init__(self, function: Callable[..., None], wide: tuple[str, ...]):
        self.name = function.__name__
        self.wide = wide
        names = list(inspect.signature(function).parameters)
        given = [name for name in names if name not in function.__annotations__]  # constants are annotated
        self.in_order = operator.itemgetter(*names)
        self.aligned = triton.jit(function, do_not_specialize=[name for name in given if name not in wide])
        self.general = triton.jit(function, do_not_specialize=given)

    def version(self, arguments: dict[str, Any]) -> Any:
        if not self.wide:
            return self.general
        for name in self.wide:
            value = arguments[name]
            if (value.data_ptr() if isinstance(value, Tensor) else value) % 16:
                return self.general
        return self.aligned


def kernel(*wide: str) -> Callable[[Callable[..., None]], Kernel]:
    """Decorator of a kernel: the names of the arguments that the aligned version relies on."""
    return lambda function: Kernel(function, wide)


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def configuration(family: str, like: Tensor) -> Config | None:
    architecture = _architecture(like.device.index) if like.is_cuda else "*"
    return _configs.config(family, like.element_size(), architecture)


def multiprocessors(like: Tensor) -> int:
    return _multiprocessors(like.device.index) if like.is_cuda else _configs.DEFAULT_MULTIPROCESSORS


def product_precision(like: Tensor) -> str:
    return _configs.product_precision(_architecture(like.device.index) if like.is_cuda else "*")


def unit_stride(x: Tensor) -> Tensor:
    """Rows may lie anywhere, but the elements of one must be neighbors."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def aligned(x: Tensor, *others: Tensor) -> bool:
    """Whether 128 bits at a time can be read of every row of x and of contiguous tensors with as many columns."""
    sizes = (x.shape[1], x.stride(0), x.data_ptr(), *(t.data_ptr() for t in others))
    return all(size % 16 == 0 for size in sizes)


@functools.cache
def options(config: Config) -> dict[str, Any]:
    """How a kernel is compiled; everything that would otherwise be a default of the Triton at hand is spelled out."""
    limit = {} if torch.version.hip else {"maxnreg": _configs.MAX_REGISTERS}
    return dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True, **limit)


def launch(kernel: Kernel, programs: int, config: Config, like: Tensor, /, **arguments: Any) -> None:
    """Runs ``programs`` programs on the current stream of ``like``'s device.

    Raises:
        RuntimeError: a CUDA graph is being captured, which forbids loading a kernel.
    """
    # tensors on the CPU mean the interpreter, whose numpy warns where a GPU would not
    with torch.cuda.device(like.device) if like.is_cuda else np.errstate(all="ignore"):
        try:
            # by place, because Triton copies what it is given by name several times
            kernel.version(arguments).run(
                *kernel.in_order(arguments), grid=(programs,), warmup=False, **options(config)
            )
        except Exception as failure:
            if like.is_cuda and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"{kernel.name} failed while a CUDA graph was captured; run the same operation once with the same "
                    "shapes, types and strides before the capture, because a capture cannot load kernels"
                ) from failure
            raise


def row_windows(rows: int, components: int) -> list[slice]:
    """Cuts rows into windows whose ``[rows, components]`` responsibilities are few enough to be made again in a backward."""
    size = max(1, RECOMPUTED_ELEMENTS // components)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def cdiv(a: int, b: int) -> int:
    return triton.cdiv(a, b)
