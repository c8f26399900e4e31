"""Every operation errs from float64 at most twice as much as eager torch does in the same dtype, in hard places, too."""

import math

import pytest
import torch
from support.error_budget import OPS, PLACES, case, exact, sums_at_an_offset, within_budget

from cem_fast.ops import reference

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# N, D, C, K
SHAPES = [(256, 512, 4, 5), (64, 2048, 2, 10), (33, 97, 3, 3), (40, 300, 1, 80)]


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


def test_sums_keep_a_small_spread_about_a_large_offset():
    # the counts times the means and the deviations are rounded once each
    assert sums_at_an_offset(OPS.component_statistics_fwd) <= torch.finfo(torch.float32).eps


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
