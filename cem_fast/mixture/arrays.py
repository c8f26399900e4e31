"""NumPy arrays in place of tensors: methods that are called with arrays return arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def tensor_of(value: Any) -> Any:
    """A tensor of an array's values; anything else as it is."""
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def rows_of(value: Any, like: Tensor | None = None) -> Any:
    """A tensor of an array of rows, with the dtype and device of ``like``; anything else as it is.

    Numbers that are not floating-point become float64, as in scikit-learn.
    """
    if not isinstance(value, np.ndarray):
        return value
    rows: Tensor = tensor_of(value)
    if like is None:
        return rows if rows.is_floating_point() else rows.double()
    return rows.to(like)


def array_of(value: Any) -> Any:
    """The array of a tensor's values, and the arrays of a tuple of tensors; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(array_of(part) for part in value)
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value


def numpy_too(method: Callable[P, R]) -> Callable[P, R]:
    """Lets a method of a mixture take rows, labels and sample weights as NumPy arrays, and return arrays then.

    Rows take the dtype and device of a fitted mixture; methods that replace the fit take them as they are.
    """
    replaces = method.__name__ in ("fit", "fit_predict", "select")

    @functools.wraps(method)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        owner: Any
        owner, *rest = args
        x = rest[0] if rest else kwargs.get("x")
        if replaces:
            owner.fitted_on_arrays = isinstance(x, np.ndarray)
        if not isinstance(x, np.ndarray):
            return method(*args, **kwargs)
        means: Tensor = owner.means
        rows = rows_of(x, means if means.shape[2] > 0 and not replaces else None)

        def other(value: Any) -> Any:  # labels are integers, sample weights are numbers
            return tensor_of(value).to(rows.device) if isinstance(value, np.ndarray) else value

        named = {name: rows if name == "x" else other(value) for name, value in kwargs.items()}
        placed = (rows, *map(other, rest[1:])) if rest else ()
        result: R = array_of(method(owner, *placed, **named))
        return result

    return called
