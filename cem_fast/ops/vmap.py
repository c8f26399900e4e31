"""Rules of every operator for ``torch.vmap``: the batch is folded into the class axis, so that one call suffices.

The two operators that return one scalar per batch entry cannot be folded and run once per entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cem_fast.ops.library import LIBRARY

# For each operator: the axis into which each argument and result is folded. "row" and "class" are leading axes, "labels" is
# a row axis whose values are classes, "scale" multiplies the first argument, and "-" is not a tensor (or an optional one).
AXES = {
    "mixture_log_prob_fwd": ("row class class class labels -", "row row"),
    "mixture_log_prob_bwd": ("row row class class class labels row row", "row"),
    "mixture_moments": ("row row class class class labels row row", "class class class"),
    "mixture_statistics": ("row class class class labels", "class class class class"),
    "component_statistics_fwd": ("row class labels class class - -", "class class class row"),
    "kmeans": ("row class labels - - -", "class class class class class"),
    "component_statistics_bwd": ("class scale row class labels row", "row"),
}
PER_ENTRY = ("entropy_bound", "cem_fwd")


def _lead(value: Any, dim: int | None, batch: int) -> Any:
    """Tensor with the batch as its first axis."""
    if not isinstance(value, Tensor):
        return value
    return value.movedim(dim, 0) if dim is not None else value.expand(batch, *value.shape)


def _folded(operator: Any, axes: list[str], result_axes: list[str]) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        B = info.batch_size
        values = [_lead(value, dim, B) for value, dim in zip(args, in_dims)]
        N = values[axes.index("row")].shape[1]
        C = values[axes.index("class")].shape[1]
        if "scale" in axes and values[1] is not None:
            scale = values[1].reshape(B, *[1] * (values[0].dim() - 1))
            values[0], values[1] = values[0] * scale, None
        at = axes.index("labels")
        labels = values[at]
        if labels is None:
            labels = torch.zeros(B, N, dtype=torch.int64, device=values[0].device)
        offset = C * torch.arange(B, device=labels.device).unsqueeze(1)
        # a label out of range must stay out of range, not become a class of the next batch entry
        values[at] = torch.where((labels >= 0) & (labels < C), labels + offset, -1)
        flat = [value.flatten(0, 1) if isinstance(value, Tensor) else value for value in values]
        results = operator(*flat)
        single = isinstance(results, Tensor)
        sizes = {"row": N, "class": C}
        unfolded, out_dims = [], []
        for result, axis in zip((results,) if single else results, result_axes):
            empty = result.dim() == 1 and result.shape[0] == 0 and axis == "class"
            unfolded.append(result if empty else result.unflatten(0, (B, sizes[axis])))
            out_dims.append(None if empty else 0)
        return (unfolded[0], 0) if single else (tuple(unfolded), tuple(out_dims))

    return rule


def _per_entry(operator: Any) -> Callable[..., Any]:
    def rule(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        entries = [
            operator(*(value if dim is None else value.select(dim, entry) for value, dim in zip(args, in_dims)))
            for entry in range(info.batch_size)
        ]
        results = tuple(torch.stack(parts) for parts in zip(*entries))
        return results, (0,) * len(results)

    return rule


for _name, (_axes, _result_axes) in AXES.items():
    _operator = getattr(torch.ops.cem_fast, _name)
    torch.library.register_vmap(
        f"cem_fast::{_name}", _folded(_operator, _axes.split(), _result_axes.split()), lib=LIBRARY
    )
for _name in PER_ENTRY:
    torch.library.register_vmap(f"cem_fast::{_name}", _per_entry(getattr(torch.ops.cem_fast, _name)), lib=LIBRARY)
