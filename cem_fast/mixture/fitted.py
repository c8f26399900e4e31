"""Modules with tensors that a fit gives their shape: precision, state dicts, copies, and averages of models."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

FOLLOWER = "_follower"
DATA = Tensor.data.__get__  # type: ignore[attr-defined]  # of the properties, the one that is written to


class Follower(Tensor):
    """A buffer through which a copy of a model follows its original; not 0 once its module is fitted.

    Averages of models, such as ``AveragedModel``, write the buffers of one model into those of another, which fails for tensors
    whose shape a fit sets. These are no buffers. If a follower is written into another one, the module of the
    other one takes over the fit instead.
    """

    modules: tuple[weakref.ref[FittedModule], ...]

    @classmethod
    def of(cls, module: FittedModule, value: Tensor) -> Follower:
        """A follower for a module."""
        follower: Follower = Tensor._make_subclass(cls, value)
        follower.modules = (weakref.ref(module),)
        return follower

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if (
            name.endswith("_") and not name.endswith("__") and len(args) > 1
        ):  # in place; torch._foreach_lerp_ takes lists
            lists = (part if isinstance(part, (list, tuple)) else [part] for part in args[:2])
            for written, read in zip(*lists):
                if isinstance(written, Follower) and isinstance(read, Follower):
                    written._follow(read)
        elif isinstance(result, Tensor) and not isinstance(result, Follower) and (name != "__get__" or func == DATA):
            result = Tensor._make_subclass(cls, result)
            sources = [m for part in args if isinstance(part, Follower) for m in getattr(part, "modules", ())]
            result.modules = tuple(dict.fromkeys(sources))
        return result

    def _follow(self, other: Follower) -> None:
        (mine,) = self.modules
        for source in other.modules:
            follower, leader = mine(), source()
            if follower is not None and leader is not None and leader is not follower:
                follower.follow(leader)


class FittedModule(nn.Module):
    """A module with tensors whose shape is known after the first fit.

    They are no buffers, so that other processes or copies of the module may have them in another shape. They are part of the
    ``state_dict`` and follow ``.to``, ``.float`` and ``.double``, as buffers do. Neither they nor buffers become half: means and
    variances rounded to 8 or 11 bits do not describe the mixture. Those named in ``always_double`` stay float64.

    Pickling leaves out ``process_group``, which belongs to its process.
    """

    always_double: frozenset[str] = frozenset()
    fitted_tensors: tuple[str, ...] = ()
    fitted_values: tuple[str, ...] = ()  # attributes of the fit that are not tensors
    process_group: torch.distributed.ProcessGroup | None
    is_fitted: bool

    def declare_fitted(self, **tensors: Tensor) -> None:
        """Declares the tensors of the fit, with their values before it."""
        self.fitted_tensors = tuple(tensors)
        self.__dict__.update(tensors)
        self.register_buffer(FOLLOWER, Follower.of(self, torch.zeros(())), persistent=False)

    def follow(self, other: FittedModule) -> None:
        """Takes over the fit of another module of the same kind, in place where the shapes allow it."""
        with torch.no_grad(), torch.inference_mode(False):
            for name in self.fitted_tensors:
                mine, theirs = getattr(self, name), getattr(other, name)
                if mine.shape != theirs.shape or mine.is_inference():
                    mine = self.__dict__[name] = mine.new_empty(theirs.shape)
                mine.copy_(theirs)
        for name in self.fitted_values:
            setattr(self, name, getattr(other, name))

    def mark_fitted(self) -> None:
        """Makes the follower 1, which data-parallel training copies to the other ranks."""
        with torch.no_grad():
            self.get_buffer(FOLLOWER).fill_(1)

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        """Lets the methods of ``nn.Module`` treat the tensors of the fit as buffers."""
        for name in self.fitted_tensors:
            self._buffers[name] = self.__dict__.pop(name)
        try:
            yield
        finally:
            self.__dict__.update((name, self._buffers.pop(name)) for name in self.fitted_tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FittedModule:
        with self._as_buffers():
            before = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, old in before.items():
                new = self._buffers[name]
                assert new is not None
                if old.is_floating_point() and (
                    name in self.always_double or new.dtype not in (torch.float32, torch.float64)
                ):
                    self._buffers[name] = new.to(old.dtype) if old.is_meta else old.to(device=new.device)
        return self

    def _save_to_state_dict(self, *args: Any) -> None:
        with self._as_buffers():
            super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        with self._as_buffers():
            super()._load_from_state_dict(*args)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {name: buffer for name, buffer in self._buffers.items() if name != FOLLOWER}
        if "process_group" in state:
            state["process_group"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        device = getattr(self, self.fitted_tensors[0]).device
        value = torch.full((), float(self.is_fitted), device=device)
        self.register_buffer(FOLLOWER, Follower.of(self, value), persistent=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FittedModule:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        if "process_group" in self.__dict__:
            copied.process_group = self.process_group
        return copied
