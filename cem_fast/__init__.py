"""Conditional entropy maximization for split inference: fused operations, defenses, attacks and honest reports."""

from cem_fast.cli import signals

with signals.starting():  # these imports take their time, and read the environment
    from cem_fast import bounds, functional
    from cem_fast.experiments.provenance import package_version
    from cem_fast.experiments.saved_run import load_run
    from cem_fast.loss import CEMLoss
    from cem_fast.mixture import GaussianMixture
    from cem_fast.models.split import SplitModel
    from cem_fast.ops.backend import describe as backends
    from cem_fast.schedule import CEMSchedule

__version__ = package_version()

__all__ = [
    "CEMLoss",
    "CEMSchedule",
    "GaussianMixture",
    "SplitModel",
    "__version__",
    "backends",
    "bounds",
    "functional",
    "load_run",
]
