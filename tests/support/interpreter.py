"""Records kernels in Triton's interpreter: launches, argument types, and bytes loaded and stored."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton.runtime.interpreter as interpreter
from cem_fast.kernels._launch import Kernel

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


@dataclass
class Seen:
    """Launches and memory traffic recorded by ``watching``."""

    launches: Counter[str] = field(default_factory=Counter)  # per kernel
    loaded: Counter[str] = field(default_factory=Counter)  # bytes per argument
    stored: Counter[str] = field(default_factory=Counter)
    configurations: set[tuple[Any, ...]] = field(default_factory=set)  # kernel, aligned, types, constants

    @property
    def bytes(self) -> int:
        return self.loaded.total() + self.stored.total()


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "i32" if abs(value) < 2**31 else "i64"


@contextlib.contextmanager
def watching() -> Iterator[Seen]:
    """Records the kernels that run inside the block."""
    seen = Seen()
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store, run, version = (
        builder.create_masked_load,
        builder.create_masked_store,
        executor.__call__,
        Kernel.version,
    )
    # address ranges of the running kernel's arguments: first byte, one past the last, name
    arguments: list[tuple[int, int, str]] = []
    aligned = False

    def count(where: Counter[str], pointers: Any, mask: Any, itemsize: int) -> None:
        touched = pointers.data[mask.data.astype(bool)]
        if touched.size:
            address = int(touched.flat[0])
            name = next((name for first, last, name in arguments if first <= address < last), "outside")
            where[name] += touched.size * itemsize

    def counted_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        result = load(self, pointers, mask, *args)
        count(seen.loaded, pointers, mask, result.data.dtype.itemsize)
        return result

    def counted_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        count(seen.stored, pointers, mask, value.data.dtype.itemsize)
        return store(self, pointers, value, mask, *args)

    def noted_version(self: Kernel, arguments: dict[str, Any]) -> Any:
        nonlocal aligned
        chosen = version(self, arguments)
        aligned = chosen is self.aligned
        return chosen

    def watched_run(self: Any, *args: Any, **_: Any) -> Any:
        values = dict(zip(self.arg_names, args, strict=True))
        constants = {name: values[name] for name in self.constexprs}
        given = {name: value for name, value in values.items() if name not in constants}
        types = tuple((name, _type(value)) for name, value in given.items())
        name = self.fn.__name__
        seen.launches[name] += 1
        seen.configurations.add((name, aligned, types, tuple(sorted(constants.items()))))
        arguments[:] = [
            (t.data_ptr(), t.untyped_storage().data_ptr() + t.untyped_storage().nbytes(), name)
            for name, t in given.items()
            if isinstance(t, torch.Tensor)
        ]
        return run(self, *args)

    replaced = counted_load, counted_store, watched_run, noted_version
    builder.create_masked_load, builder.create_masked_store, executor.__call__, Kernel.version = replaced
    try:
        yield seen
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__, Kernel.version = (
            load,
            store,
            run,
            version,
        )
