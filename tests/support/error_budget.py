"""Inputs that are hard for rounding, and an error budget: at most twice the error of eager torch in the same dtype.

Errors are relative to the norm of the result. One unit of rounding is always allowed.
"""

import torch

from cem_fast.ops import reference

OPS = torch.ops.cem_fast
# Center of the features, standard deviation of a component, distance between components in standard deviations.
PLACES = {
    "unit cube": (0.0, 0.3, 3.0),
    "offset 1000, spread 1e-3": (1000.0, 1e-3, 1.0),
    "mean 100 sigma from zero": (1.0, 0.01, 0.3),
    "means 100 sigma apart": (0.0, 1.0, 100.0),
}


def case(place, shape, diag, dtype):
    """Features close to their components, and the parameters of the mixture, at one of ``PLACES``."""
    center, spread, separation = PLACES[place]
    N, D, C, K = shape
    parameters = torch.promote_types(dtype, torch.float32)
    labels = torch.randint(0, C, (N,))
    means = center + spread * separation * torch.randn(C, K, D, dtype=torch.float64)
    x = means[labels, torch.randint(0, K, (N,))] + spread * torch.randn(N, D, dtype=torch.float64)
    variances = spread**2 * (0.5 + torch.rand(*((C, K, D) if diag else (C, K)), dtype=torch.float64))
    weights = torch.rand(C, K, dtype=torch.float64) + 0.2
    weights = weights / weights.sum(1, keepdim=True)
    return x.to(dtype), means.to(parameters), variances.to(parameters), weights.to(parameters), labels


def exact(arguments):
    """The arguments with floating-point tensors in float64."""
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def results(function, arguments):
    """The floating-point outputs of a function."""
    found = function(*arguments)
    return [found] if isinstance(found, torch.Tensor) else [r for r in found if r.is_floating_point()]


def error(value, truth):
    """Error of a result relative to the norm of the true one."""
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm().clamp_min(1e-300)) if truth.numel() else 0.0


def within_budget(name, arguments, truths=None):
    """Asserts that the errors of an operator, against float64, are within the budget."""
    truths = results(getattr(reference, name), exact(arguments)) if truths is None else truths
    ours, eager = results(getattr(OPS, name), arguments), results(getattr(reference, name), arguments)
    for index, (got, torchs, truth) in enumerate(zip(ours, eager, truths, strict=True)):
        rounding = torch.finfo(got.dtype).eps
        budget = 2 * error(torchs, truth) + rounding
        assert error(got, truth) <= budget, f"{name}, output {index}: {error(got, truth):.2e} > {budget:.2e}"


def sums_at_an_offset(component_statistics_fwd):
    """Largest relative error of sums over many rows close to 1000 with a standard deviation of 1e-3."""
    x, means, _, _, labels = case("offset 1000, spread 1e-3", (400, 40, 1, 2), False, torch.float32)
    arguments = [x, means, labels, None, None, False, True]
    _, _, sums, assignment = component_statistics_fwd(*arguments)
    member = torch.nn.functional.one_hot(assignment, 2).double()
    truth = member.T @ x.double()
    return float(((sums[0].double() - truth) / truth).abs().max())
