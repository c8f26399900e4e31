"""Allowed errors of a backend against the float64 definitions, relative to the norm of the result, by dtype."""

import torch

RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """``|value - truth| / |truth|`` in the Euclidean norm; infinity if not finite."""
    assert value.shape == truth.shape, (value.shape, truth.shape)
    value, truth = value.detach().double(), truth.detach().double()
    error = (value - truth).norm() / truth.norm().clamp_min(1e-12)
    return float(error) if torch.isfinite(error) else float("inf")
