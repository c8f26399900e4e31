"""Differentiable, stateless operations on Gaussian mixtures of several classes."""

from cem_fast.ops.component_statistics import ComponentStatistics, component_statistics
from cem_fast.ops.entropy_bound import conditional_entropy_bound
from cem_fast.ops.log_prob import mixture_log_prob

__all__ = ["ComponentStatistics", "component_statistics", "conditional_entropy_bound", "mixture_log_prob"]
