"""Checks of arguments: errors give the argument, the expected value and the actual value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from cem_fast._support.counts import require_number
from cem_fast.ops.autograd import is_transformed

if TYPE_CHECKING:
    from cem_fast.ops.entropy_bound import BoundOptions

PARAMETER_DTYPES = (torch.float32, torch.float64)
HALF_DTYPES = (torch.float16, torch.bfloat16)
_STRIDED, _INT64 = torch.strided, torch.int64  # look-ups in torch take longer


def tensor(name: str, value: Any, shape: str, *dims: int) -> None:
    """Requires a tensor with one of the given numbers of dimensions; the message shows ``shape``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {shape}, got {type(value).__name__}")
    dense(name, value)
    if value.dim() not in dims:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")


def dense(name: str, value: Tensor) -> None:
    """Requires a tensor that is not sparse, nested or quantized."""
    if value.layout is not torch.strided or value.is_nested or value.is_quantized:
        kind = "nested" if value.is_nested else "quantized" if value.is_quantized else "sparse"
        raise TypeError(f"{name} must be a dense tensor, got a {kind} one")


def rows(name: str, value: Any) -> None:
    """Requires dense floating-point rows ``[N, ...]`` with at least one number each."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor of shape [N, ...], got {type(value).__name__}")
    dense(name, value)
    if value.dim() < 2:
        raise ValueError(f"{name} must have shape [N, ...] with at least two dimensions, got {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {value.dtype}")
    if 0 in value.shape[1:]:
        raise ValueError(f"{name} must have at least one number per row, got {tuple(value.shape)}")


def same_shape(name: str, value: Tensor, expected: tuple[int, ...], shape: str) -> None:
    """Requires a shape; the message also shows ``shape``, its symbolic form."""
    if tuple(value.shape) != expected:
        raise ValueError(f"{name} must have shape {shape} = {expected}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, device: torch.device) -> None:
    """Requires the device of the features."""
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like the features, got {value.device}")


def features(x: Tensor, means: Tensor, name: str = "x") -> None:
    """Requires ``x`` ``[N, D]`` that fits means ``[C, K, D]`` in width, dtype and device."""
    tensor(name, x, "[N, D]", 2)
    tensor("means", means, "[C, K, D]", 3)
    shape, of_means, dtype, of_x = x.shape, means.shape, means.dtype, x.dtype
    if dtype not in PARAMETER_DTYPES:
        raise TypeError(f"means must be float32 or float64, got {dtype}")
    if 0 in of_means:
        raise ValueError(f"means must have at least one class, component and dimension, got {tuple(of_means)}")
    if shape[1] != of_means[2]:
        raise ValueError(f"{name} must have shape [N, D] with D = {of_means[2]} as in means, got {tuple(shape)}")
    if of_x != dtype and not (of_x in HALF_DTYPES and dtype == torch.float32):
        allowed = "float32, float16 or bfloat16" if dtype == torch.float32 else "float64"
        raise TypeError(f"{name} must be {allowed} to go with {dtype} means, got {of_x}")
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


def normal(variances: Tensor) -> None:
    """Requires variances whose inverse is finite, if reading them does not wait for the device.

    They are read once for each of their versions, not in each call; compiled code reads them in each call.
    """
    smallest = torch.finfo(variances.dtype).tiny
    expected = f"variances must be at least {smallest:.3g}, the least normal {variances.dtype}"
    if torch.compiler.is_compiling() and variances.is_cpu:
        torch._assert_async((variances.detach() >= smallest).all(), expected)
        return
    if not is_readable(variances) or variances.is_inference() or variances.numel() == 0:
        return
    if getattr(variances, "_normal_in", None) == variances._version:
        return
    least = float(variances.detach().amin())
    if not least >= smallest:
        raise ValueError(f"{expected}, got {least:.3g}")
    variances._normal_in = variances._version  # type: ignore[attr-defined]


def standard_deviation(name: str, value: Any) -> Tensor:
    """Requires a positive number or a ``[D]`` tensor of them, and returns a float64 copy."""
    wanted = f"{name} must be a number or a [D] tensor, got"
    if isinstance(value, Tensor) and (value.is_complex() or value.dtype == torch.bool):
        raise TypeError(f"{wanted} a tensor of {value.dtype}")
    if isinstance(value, bool):
        raise TypeError(f"{wanted} {value}")
    value = require_number(name, value) if isinstance(value, int) else value
    try:
        std = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{wanted} {value!r}") from error
    variance = std.square()
    if std.dim() > 1 or not bool(((std > 0) & (variance > 0) & variance.isfinite()).all()):
        raise ValueError(f"{name} must be a positive number or a [D] tensor of them, got {value}")
    return std


def noise_variance(value: Tensor, dimension: int, name: str = "noise_variance") -> None:
    """Requires noise variances ``[1]`` or ``[D]``, float32 or float64."""
    tensor(name, value, "[1] or [D]", 1)
    if value.dtype not in PARAMETER_DTYPES:
        raise TypeError(f"{name} must be float64 or float32, got {value.dtype}")
    if value.shape[0] not in (1, dimension):
        raise ValueError(f"{name} must have shape [1] or [{dimension}], got {tuple(value.shape)}")


def integer_labels(value: Tensor | None, num_rows: int, num_classes: int, device: torch.device) -> Tensor | None:
    """Requires integer labels ``[N]`` and returns them as int64; None is allowed for a single class."""
    if value is None:
        if num_classes != 1:
            raise ValueError(f"labels may be None only for one class, got a mixture of {num_classes} classes")
        return None
    tensor("labels", value, "[N]", 1)
    if value.shape[0] != num_rows:
        raise ValueError(f"labels must have shape [N] = ({num_rows},), got {tuple(value.shape)}")
    if value.dtype != torch.int64:
        if value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool:
            raise TypeError(f"labels must be an integer tensor, got {value.dtype}")
        value = value.to(torch.int64)
    same_device("labels", value, device)
    return value


def labels(value: Tensor | None, num_rows: int, num_classes: int, device: torch.device) -> Tensor | None:
    """Requires labels as ``integer_labels`` does, and their range if reading it does not wait for the device."""
    value = integer_labels(value, num_rows, num_classes, device)
    if value is not None and is_readable(value):
        label_range(value, num_classes)
    return value


def sample_weight(value: Tensor, num_rows: int, device: torch.device) -> Tensor:
    """Requires sample weights ``[N]``, finite and not negative; waits for the device, once."""
    tensor("sample_weight", value, "[N]", 1)
    same_shape("sample_weight", value, (num_rows,), "[N]")
    if value.dtype.is_complex or value.dtype == torch.bool:
        raise TypeError(f"sample_weight must be numbers, got {value.dtype}")
    same_device("sample_weight", value, device)
    value = value.detach() if value.is_floating_point() else value.double()
    if not bool(((value >= 0) & value.isfinite()).all()):
        bad = "negative numbers" if bool((value < 0).any()) else "NaN or infinity"
        raise ValueError(f"sample_weight must be finite and not negative, got {bad}")
    return value


def label_range(value: Tensor, num_classes: int) -> None:
    """Requires every label in ``[0, num_classes)``; waits for the device, once."""
    if value.numel() == 0:
        return
    low, high = torch.stack(torch.aminmax(value)).tolist()
    if low < 0 or high >= num_classes:
        row = int(((value < 0) | (value >= num_classes)).int().argmax())
        raise ValueError(f"labels must lie in [0, {num_classes}), got {int(value[row])} at index {row}")


def finite(name: str, value: Tensor) -> None:
    """Requires rows without NaN or infinity; waits for the device, and is skipped where code is compiled or exported."""
    if torch.compiler.is_compiling():
        return
    bad = ~torch.isfinite(value).all(1)
    if bool(bad.any()):
        raise ValueError(
            f"{name} must be finite, got NaN or infinity in {int(bad.sum())} rows, first row {int(bad.int().argmax())}"
        )


def is_readable(value: Tensor) -> bool:
    """Whether values can be read without a wait: on the CPU, outside torch.compile, export and other transforms."""
    return value.is_cpu and type(value) is Tensor and not is_transformed()


class Checked(NamedTuple):
    """What the features of a batch were checked against. Those that are like them need no check again.

    The checks take the host longer than a GPU takes for a small batch.
    """

    means: Tensor
    noise_variance: Tensor
    options: BoundOptions
    arguments: tuple[Any, ...]  # of the operators, for these options
    dtype: torch.dtype
    device: torch.device
    dimension: int

    @classmethod
    def of(cls, x: Tensor, means: Tensor, noise_variance: Tensor, options: BoundOptions) -> Checked | None:
        """Features that passed every check, unless torch transforms the code."""
        if type(x) is not Tensor or is_transformed():
            return None
        return cls(means, noise_variance, options, options.arguments(), x.dtype, x.device, means.shape[2])

    def rows(self, x: Any, labels: Any) -> Tensor | None:
        """Rows ``[N, D]`` of features ``[N, ...]`` if no check of them and their labels ``[N]`` can fail, but the labels' range.

        None where torch transforms the code.
        """
        if type(x) is not Tensor or type(labels) is not Tensor or is_transformed():
            return None
        device, strided = self.device, _STRIDED
        if (
            x.dtype is not self.dtype
            or x.device != device
            or x.layout is not strided
            or labels.dtype is not _INT64
            or labels.device != device
            or labels.layout is not strided
        ):
            return None
        try:
            shape, of_labels = x.shape, labels.shape
        except RuntimeError:  # nested tensors have none
            return None
        if len(of_labels) != 1 or len(shape) < 2 or shape[0] != of_labels[0]:
            return None
        if len(shape) > 2 and 0 not in shape:
            x = x.flatten(1)
            shape = x.shape
        return x if len(shape) == 2 and shape[1] == self.dimension else None
