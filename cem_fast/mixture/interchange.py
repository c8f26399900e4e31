"""Mixtures in other formats: safetensors files and scikit-learn models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cem_fast._support import optional, typed_json
from cem_fast._support.files import require_path, write_atomically

if TYPE_CHECKING:
    from sklearn.mixture import GaussianMixture as SklearnMixture

KEY = "gaussian_mixture"  # of the metadata entry that holds everything but tensors


def write(path: str | Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Writes tensors and settings to a safetensors file, atomically."""
    import safetensors.torch

    require_path("path", path)
    tensors = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
    }  # share nothing
    write_atomically(path, safetensors.torch.save(tensors, {KEY: json.dumps(settings)}))


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and settings that ``write`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has another format.
    """
    import safetensors
    import safetensors.torch

    require_path("path", path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"path must be a file that GaussianMixture.save wrote, got {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            settings = typed_json.parse((file.metadata() or {})[KEY], "its metadata")
        if not isinstance(settings, dict):
            raise ValueError(f"its metadata must hold an object, got {type(settings).__name__}")
        return safetensors.torch.load_file(path), settings
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise ValueError(f"path must be a file that GaussianMixture.save wrote, got {path}: {error}") from error


def require_parameters(state: dict[str, Tensor], num_classes: Any, num_components: Any) -> None:
    """Requires parameters of a mixture of these many classes and components, before anything of that size is allocated.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a shape or value does not fit.
    """
    weights, prior, means = state["weights"], state["class_prior"], state["means"]
    if tuple(weights.shape) != (num_classes, num_components) or tuple(prior.shape) != (num_classes,):
        raise ValueError(
            f"weights and class_prior must be of num_classes {num_classes!r} and num_components {num_components!r}, got shapes "
            f"{tuple(weights.shape)} and {tuple(prior.shape)}"
        )
    if means.dim() == 3 and means.shape[2] == 0:  # not fitted
        return
    for name, value in state.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise ValueError(f"{name} must be finite floating-point numbers, got {value.dtype} or other values")
    for name in ("weights", "class_prior", "variances"):
        if name in state and bool((state[name] < 0).any()):
            raise ValueError(f"{name} must not be negative, got {float(state[name].min())}")
    totals = torch.where(prior > 0, weights.sum(1), 1.0)  # classes without rows have no weights
    if not bool(((totals - 1).abs() < 1e-3).all() & ((prior.sum() - 1).abs() < 1e-3)):
        raise ValueError("weights and class_prior must each sum to 1, and they do not")


def to_sklearn(
    means: Tensor, spread: Tensor, weights: Tensor, *, covariance_type: str, reg_covar: float
) -> SklearnMixture:
    """A fitted scikit-learn model of one class: means ``[K, D]``, variances or covariances, weights ``[K]``."""
    package = optional.load("sklearn.mixture", "to_sklearn", "scikit-learn")
    matrices, spread = covariance_type in ("tied", "full"), spread.double().cpu()
    if matrices:
        identity = torch.eye(means.shape[1], dtype=torch.float64)
        inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(spread), identity, upper=False).mT
    else:
        inverse = spread.rsqrt()
    model: SklearnMixture = package.GaussianMixture(len(weights), covariance_type=covariance_type, reg_covar=reg_covar)
    model.weights_, model.means_ = weights.double().cpu().numpy(), means.double().cpu().numpy()
    model.covariances_, model.precisions_cholesky_ = spread.numpy(), inverse.numpy()
    model.precisions_ = (inverse @ inverse.mT if matrices else 1 / spread).numpy()
    model.n_features_in_ = means.shape[1]
    return model


def from_sklearn(model: SklearnMixture) -> tuple[Tensor, Tensor, Tensor]:
    """Means ``[1, K, D]``, variances or covariances, and weights ``[1, K]`` of a fitted scikit-learn model, float64.

    Raises:
        ValueError: the model is not fitted.
    """
    if not hasattr(model, "means_"):
        raise ValueError("model must be a fitted sklearn.mixture.GaussianMixture, got one that is not fitted")
    means, spread, weights = (
        torch.as_tensor(value, dtype=torch.float64).unsqueeze(0)
        for value in (model.means_, model.covariances_, model.weights_)
    )
    return means, spread, weights
