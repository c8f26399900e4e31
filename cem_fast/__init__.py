"""Conditional entropy maximization for split inference: fused operations, defenses, attacks and honest reports."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cem_fast import (
        attacks,
        bounds,
        config,
        cost,
        data,
        defenses,
        functional,
        metrics,
        mixture,
        models,
        training,
    )
    from cem_fast.experiments.saved_run import load_run
    from cem_fast.loss import CEMLoss
    from cem_fast.mixture import GaussianMixture, KMeans
    from cem_fast.models.split import SplitModel
    from cem_fast.ops.backend import describe as backends
    from cem_fast.schedule import CEMSchedule

try:
    __version__ = version("cem_fast")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "unknown"

__all__ = [
    "CEMLoss",
    "CEMSchedule",
    "GaussianMixture",
    "KMeans",
    "SplitModel",
    "__version__",
    "attacks",
    "backends",
    "bounds",
    "config",
    "cost",
    "data",
    "defenses",
    "functional",
    "load_run",
    "metrics",
    "mixture",
    "models",
    "training",
]

# PEP 562: torch is imported, and the operators are registered, by the first of these names that needs them
_PLACES = {
    "CEMLoss": ("cem_fast.loss", "CEMLoss"),
    "CEMSchedule": ("cem_fast.schedule", "CEMSchedule"),
    "GaussianMixture": ("cem_fast.mixture", "GaussianMixture"),
    "KMeans": ("cem_fast.mixture", "KMeans"),
    "SplitModel": ("cem_fast.models.split", "SplitModel"),
    "backends": ("cem_fast.ops.backend", "describe"),
    "load_run": ("cem_fast.experiments.saved_run", "load_run"),
}
_MODULES = (
    *("attacks", "bounds", "config", "cost", "data", "defenses", "functional", "metrics", "mixture", "models"),
    "training",
)


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"cem_fast.{name}")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _PLACES[name]
    globals()[name] = value = getattr(import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
