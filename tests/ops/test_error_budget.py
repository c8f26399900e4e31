"""Every operation errs from float64 at most twice as much as eager torch does in the same dtype, in hard places, too.

The error is relative to the result's norm; a few units of rounding are allowed where eager torch happens to be exact.
"""

import math

import pytest
import torch

from cem_fast.ops import reference

OPS = torch.ops.cem_fast
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Center of the features, spread of a component, distance between components in spreads.
PLACES = {
    "unit cube": (0.0, 0.3, 3.0),
    "offset 1000, spread 1e-3": (1000.0, 1e-3, 1.0),
    "mean 100 sigma from zero": (1.0, 0.01, 0.3),
}
# N, D, C, K
SHAPES = [(256, 512, 4, 5), (64, 2048, 2, 10), (33, 97, 3, 3), (40, 300, 1, 80)]


def case(place, shape, diag, dtype):
    """Features near the components they belong to; the parameters are exact in their dtype."""
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
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def results(function, arguments):
    found = function(*arguments)
    return [found] if isinstance(found, torch.Tensor) else [r for r in found if r.is_floating_point()]


def error(value, truth):
    value, truth = value.double(), truth.double()
    return float((value - truth).norm() / truth.norm().clamp_min(1e-300)) if truth.numel() else 0.0


def within_budget(name, arguments, truths=None):
    """Compares operator and eager reference on the same inputs with the float64 truth."""
    truths = results(getattr(reference, name), exact(arguments)) if truths is None else truths
    ours, eager = results(getattr(OPS, name), arguments), results(getattr(reference, name), arguments)
    for index, (got, torchs, truth) in enumerate(zip(ours, eager, truths, strict=True)):
        rounding = torch.finfo(got.dtype).eps
        budget = 2 * error(torchs, truth) + rounding
        assert error(got, truth) <= budget, f"{name}, output {index}: {error(got, truth):.2e} > {budget:.2e}"


def float64_digits_matter(dtype):
    if dtype == torch.float64:
        pytest.skip("the float64 truth has no digits to spare: see the oracle tests")


@pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:], ids=str)
@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_mixture_log_prob(place, shape, diag, dtype):
    arguments = case(place, shape, diag, dtype)
    keep = shape[3] <= 64
    within_budget("mixture_log_prob_fwd", [*arguments, keep])
    kept = OPS.mixture_log_prob_fwd(*arguments, keep)
    grad = torch.rand(shape[0]) - 0.3
    # given the same responsibilities; those that are computed again start from the exact inputs
    within_budget("mixture_log_prob_bwd", [grad, *arguments, *kept])
    within_budget("mixture_moments", [grad, *arguments, *kept])


@pytest.mark.parametrize("dtype", DTYPES[:1] + DTYPES[2:], ids=str)
@pytest.mark.parametrize("per_dimension", [False, True], ids=["total", "per dimension"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_component_statistics(place, shape, per_dimension, dtype):
    x, means, _, _, labels = case(place, shape, False, dtype)
    arguments = [x, means, labels, None, None, per_dimension, True]
    chosen = [f(*arguments)[3] for f in (OPS.component_statistics_fwd, reference.component_statistics_fwd)]
    truth = reference.component_statistics_fwd(*exact(arguments))[3]
    assert (chosen[0] != truth).sum() <= (chosen[1] != truth).sum()
    if torch.equal(chosen[0], truth) and torch.equal(chosen[1], truth):
        within_budget("component_statistics_fwd", arguments)
    grad = torch.rand(means.shape if per_dimension else means.shape[:2])
    within_budget("component_statistics_bwd", [grad, torch.tensor(0.7), x, means, labels, truth])


@pytest.mark.parametrize("official", [False, True], ids=["paper", "official"])
@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("place", PLACES)
def test_bound(place, diag, official):
    if official and diag:
        pytest.skip("the official variant is spherical")
    x, means, variances, weights, labels = case(place, SHAPES[0], diag, torch.float32)
    options = [official, 10.0 if official else 1.0, True, True, 0.125, 0.01]
    noise = torch.tensor([float(variances.mean()) * 0.1], dtype=torch.float64)
    prior, samples = torch.full((4,), 0.25), torch.tensor(5000.0, dtype=torch.float64)
    within_budget("cem_fwd", [x, means, labels, variances, weights, prior, samples, noise, *options])


@pytest.mark.parametrize("place", PLACES)
def test_float64_is_float64(place):
    """Against sums of exact products by math.fsum: within a few units in the last place."""
    x, means, variances, weights, labels = case(place, (6, 700, 2, 3), True, torch.float64)
    log_prob, _ = OPS.mixture_log_prob_fwd(x, means, variances, weights, labels, True)
    for n, c in enumerate(labels.tolist()):
        joint = [
            math.log(weights[c, k])
            - 0.5
            * math.fsum(
                (a - m) ** 2 / v + math.log(2 * math.pi * v)
                for a, m, v in zip(x[n].tolist(), means[c, k].tolist(), variances[c, k].tolist(), strict=True)
            )
            for k in range(3)
        ]
        top = max(joint)
        expected = top + math.log(math.fsum(math.exp(j - top) for j in joint))
        assert abs(float(log_prob[n]) - expected) <= 4e-15 * max(abs(j) for j in joint)
