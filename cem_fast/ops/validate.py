"""Argument checks shared by the operations: what was expected, and what came."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

PARAMETER_DTYPES = (torch.float32, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)


def tensor(name: str, value: Any, shape: str, *dims: int) -> None:
    """Requires a tensor with one of the given numbers of dimensions; ``shape`` is how the message spells them."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(value).__name__}")
    if value.dim() not in dims:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def same_shape(name: str, value: Tensor, expected: tuple[int, ...], shape: str) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {shape} = {expected}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the features, got {value.device}")


def features(x: Tensor, means: Tensor) -> None:
    """Requires ``x`` ``[N, D]`` that fits means ``[C, K, D]`` in width, dtype and device."""
    tensor("x", x, "[N, D]", 2)
    tensor("means", means, "[C, K, D]", 3)
    if means.dtype not in PARAMETER_DTYPES:
        raise TypeError(f"means must be float32 or float64, got {means.dtype}")
    if 0 in means.shape:
        raise ValueError(f"means must have at least one class, component and dimension, got {tuple(means.shape)}")
    if x.shape[1] != means.shape[2]:
        raise ValueError(f"x must have shape [N, D] with D = {means.shape[2]} as in means, got {tuple(x.shape)}")
    if x.dtype != means.dtype and not (x.dtype in HALF_DTYPES and means.dtype == torch.float32):
        allowed = "float32, float16 or bfloat16" if means.dtype == torch.float32 else "float64"
        raise TypeError(f"x must be {allowed} to go with {means.dtype} means, got {x.dtype}")
    same_device("means", means, x.device)


def spread_and_weights(means: Tensor, variances: Tensor, weights: Tensor) -> None:
    """Requires variances ``[C, K]`` or ``[C, K, D]`` and weights ``[C, K]`` that fit the means."""
    tensor("variances", variances, "[C, K] or [C, K, D]", 2, 3)
    tensor("weights", weights, "[C, K]", 2)
    same_shape("variances", variances, tuple(means.shape[: variances.dim()]), "[C, K] or [C, K, D]")
    same_shape("weights", weights, tuple(means.shape[:2]), "[C, K]")
    for name, value in (("variances", variances), ("weights", weights)):
        if value.dtype != means.dtype:
            raise TypeError(f"{name} must be {means.dtype} like the means, got {value.dtype}")
        same_device(name, value, means.device)


def labels(value: Tensor | None, num_rows: int, num_classes: int, device: torch.device) -> Tensor | None:
    """Requires integer labels ``[N]`` and returns them as int64; None is allowed for a single class.

    The range is checked only where looking costs no wait for a device and is not being traced.
    """
    if value is None:
        if num_classes != 1:
            raise ValueError(f"labels may be None only for one class, got a mixture of {num_classes} classes")
        return None
    tensor("labels", value, "[N]", 1)
    same_shape("labels", value, (num_rows,), "[N]")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"labels must be an integer tensor, got {value.dtype}")
    same_device("labels", value, device)
    value = value.to(torch.int64)
    if value.device.type == "cpu" and _is_concrete(value):
        label_range(value, num_classes)
    return value


def label_range(value: Tensor, num_classes: int) -> None:
    """Requires every label in ``[0, num_classes)``; waits for the device."""
    if value.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(value))
    if low < 0 or high >= num_classes:
        row = int(((value < 0) | (value >= num_classes)).int().argmax())
        raise ValueError(f"labels must lie in [0, {num_classes}), got {int(value[row])} at index {row}")


def _is_concrete(value: Tensor) -> bool:
    """Whether the values can be read: not under torch.compile, export, a fake-tensor mode or a functorch transform."""
    if torch.compiler.is_compiling() or type(value) is not Tensor:
        return False
    return not torch._C._are_functorch_transforms_active()
