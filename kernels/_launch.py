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

# Maximum elements of [rows, K] that a backward recomputes at a time if the forward kept no responsibilities.
RECOMPUTED_ELEMENTS = 1 << 22


class Kernel:
    """One kernel, compiled in at most two versions for every choice of dtypes and constants.

    ``aligned`` assumes that every argument named in ``wide``, an address or a number of elements, is a multiple of 16. It accesses
    memory in 128-bit words. ``general`` assumes nothing. By default, Triton compiles a version for every combination of multiples
    of 16 and ones, which are too many to check ahead of time.
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
    """Decorator of a kernel, with the names of the arguments that are multiples of 16 in the aligned version."""
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
    """x, copied if the elements of a row are not adjacent. Rows may have any stride."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def aligned(x: Tensor, *others: Tensor) -> bool:
    """Whether 128-bit reads are possible in every row of x and in contiguous tensors with as many columns."""
    sizes = (x.shape[1], x.stride(0), x.data_ptr(), *(t.data_ptr() for t in others))
    return all(size % 16 == 0 for size in sizes)


@functools.cache
def options(config: Config) -> dict[str, Any]:
    """Compiler options. All are explicit, because defaults differ between releases of Triton."""
    limit = {} if torch.version.hip else {"maxnreg": _configs.MAX_REGISTERS}
    return dict(num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True, **limit)


def launch(kernel: Kernel, programs: int, config: Config, like: Tensor, /, **arguments: Any) -> None:
    """Runs ``programs`` programs on the current stream of ``like``'s device.

    Raises:
        RuntimeError: a CUDA graph is being captured, which forbids loading a kernel.
    """
    # CPU tensors are for the interpreter, whose numpy warns about values that a GPU accepts
    with torch.cuda.device(like.device) if like.is_cuda else np.errstate(all="ignore"):
        try:
            # positional, because Triton copies keyword arguments several times
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
    """Windows of rows whose ``[rows, components]`` responsibilities are few enough to be recomputed in a backward."""
    size = max(1, RECOMPUTED_ELEMENTS // components)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def cdiv(a: int, b: int) -> int:
    return triton.cdiv(a, b)
