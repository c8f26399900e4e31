"""One class of many components by matrix products, rounded as tensor cores round, within twice the error of eager torch."""

import numpy as np
import pytest
import torch
from cem_fast.kernels import _configs, _launch
from support import far
from support.error_budget import PLACES, case, within_budget
from support.interpreter import watching
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from cem_fast.functional import mixture_log_prob
from cem_fast.ops import reference

OPS = torch.ops.cem_fast
SHAPE = (6, 48, 1, 130)  # N, D, C, K: a block of rows, one of dimensions and a half, several tiles of components

long = pytest.mark.long
QUICK = {
    ("offset 1000, spread 1e-3", True),
    ("mean 100 sigma from zero", True),  # what the products give is good enough
    ("means 100 sigma apart", False),  # what they give is not
}
HARD = [
    pytest.param(place, diag, marks=() if (place, diag) in QUICK else long, id=f"{place}-{'diag' * diag}")
    for place in PLACES
    for diag in (False, True)
]


def tf32(values):
    """The nearest of the numbers that TensorFloat-32 has."""
    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64) + 0x1000
    return (bits & 0xFFFFE000).astype(np.uint32).view(np.float32)


def product(a, b, precision):
    if precision == "IEEE":
        return a @ b
    high_a, high_b = tf32(a), tf32(b)
    if precision == "TF32":
        return high_a @ high_b
    low_a, low_b = tf32(a - high_a), tf32(b - high_b)
    return low_a @ high_b + high_a @ low_b + high_a @ high_b


@pytest.fixture(autouse=True)
def tensor_cores(monkeypatch):
    def create_dot(self, a, b, d, precision, _):
        with np.errstate(all="ignore"):
            return TensorHandle(product(a.data, b.data, precision.name) + d.data, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def problem(place="unit cube", diag=True, dtype=torch.float32, shape=SHAPE):
    return [*case(place, shape, diag, dtype)[:4], None]


@pytest.mark.parametrize("multiprocessors", [1, 132], ids=["one share", "many shares"])
@pytest.mark.parametrize("place, diag", HARD)
def test_forward(place, diag, multiprocessors, monkeypatch):
    monkeypatch.setattr(_configs, "DEFAULT_MULTIPROCESSORS", multiprocessors)
    arguments = problem(place, diag)
    with watching() as seen:
        within_budget("mixture_log_prob_fwd", [*arguments, False])
    assert seen.launches == {"global_floor_kernel": 1, "global_log_prob_kernel": 1}


def test_few_components_are_taken_directly():
    """A component far below a row's highest density is not, though the component of the row comes last."""
    N, D, _, K = SHAPE
    means, variances = torch.rand(1, K, D), torch.full((1, K, D), 1e-3)
    x = means[0, -N:] + 1e-2 * torch.randn(N, D)
    with watching() as seen:
        OPS.mixture_log_prob_fwd(x, means, variances, torch.full((1, K), 1 / K), None, False)
    tiles = -(-K // _configs.config("product", 4).BLOCK_K)
    assert seen.loaded["x_ptr"] <= (2 * tiles + N) * x.nbytes  # two passes, and a column for every row


@pytest.mark.parametrize("place, diag", HARD)
def test_backward(place, diag):
    arguments = problem(place, diag)
    log_prob, nothing = OPS.mixture_log_prob_fwd(*arguments, False)
    grad = torch.rand(len(log_prob)) - 0.3
    within_budget("mixture_log_prob_bwd", [grad, *arguments, log_prob, nothing])
    within_budget("mixture_moments", [grad, *arguments, log_prob, nothing])


@long
@pytest.mark.parametrize(
    "shape, diag, dtype",
    [
        ((70, 64, 1, 128), True, torch.float32),
        ((40, 1040, 1, 200), False, torch.float32),  # so many rows that no luck decides
        ((9, 32, 1, 300), True, torch.bfloat16),
        ((9, 32, 1, 300), False, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["unit cube", "means 100 sigma apart"])
def test_shapes_and_types(place, shape, diag, dtype):
    arguments = problem(place, diag, dtype, shape)
    within_budget("mixture_log_prob_fwd", [*arguments, True])
    log_prob, nothing = OPS.mixture_log_prob_fwd(*arguments, False)
    grad = torch.rand(len(log_prob)) - 0.3
    within_budget("mixture_log_prob_bwd", [grad, *arguments, log_prob, nothing])
    within_budget("mixture_moments", [grad, *arguments, log_prob, nothing])


@long
def test_kept_responsibilities():
    arguments = problem()
    within_budget("mixture_log_prob_fwd", [*arguments, True])
    kept = OPS.mixture_log_prob_fwd(*arguments, True)
    grad = torch.rand(len(kept[0]))
    with watching() as seen:
        within_budget("mixture_log_prob_bwd", [grad, *arguments, *kept])
        within_budget("mixture_moments", [grad, *arguments, *kept])
    assert not seen.launches["global_responsibilities_kernel"]


def test_no_matrix_of_rows_by_components(monkeypatch):
    arguments = problem("means 100 sigma apart")
    N, _, _, K = SHAPE
    log_prob, nothing = OPS.mixture_log_prob_fwd(*arguments, False)
    given = [torch.rand(N), *arguments, log_prob, nothing]
    whole = OPS.mixture_log_prob_bwd(*given)
    monkeypatch.setattr(_launch, "RECOMPUTED_ELEMENTS", 4 * K + 1)
    with watching() as seen:
        windows = OPS.mixture_log_prob_bwd(*given)
        within_budget("mixture_moments", given)
    assert torch.equal(whole, windows)
    assert seen.launches["global_responsibilities_kernel"] == 2 * 2  # windows of four rows
    assert seen.stored["responsibilities_ptr"] == 2 * 4 * N * K


@pytest.mark.parametrize("diag", [False, pytest.param(True, marks=long)], ids=["spherical", "diag"])
def test_values_that_are_not_finite(diag):
    x, means, variances, weights, _ = problem(diag=diag)
    x[0, 0], x[1, 1], x[2, 2] = torch.nan, torch.inf, 1e30
    weights[0, :5] = 0
    log_prob, _ = OPS.mixture_log_prob_fwd(x, means, variances, weights, None, False)
    expected, _ = reference.mixture_log_prob_fwd(x, means, variances, weights, None, False)
    assert torch.equal(log_prob.isnan(), expected.isnan())
    assert torch.equal(log_prob.isinf(), expected.isinf())
    torch.testing.assert_close(log_prob, expected, equal_nan=True)
    dx = OPS.mixture_log_prob_bwd(torch.ones_like(log_prob), x, means, variances, weights, None, log_prob, x[:, :0])
    assert not dx[3:].isnan().any()


def test_features_too_large_to_square_have_right_densities():
    x, means = far.case(32)
    weights = torch.full((1, 129), 1 / 129)
    arguments = [x.clamp(-1e20, 1e20), means.repeat(1, 43, 1), 1e38 * torch.ones(1, 129), weights, None]
    log_prob, _ = OPS.mixture_log_prob_fwd(*arguments, False)
    assert log_prob.isfinite().all()
    torch.testing.assert_close(log_prob, reference.mixture_log_prob_fwd(*arguments, False)[0])


@long
@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_features_too_large_to_square_have_right_densities_and_gradients(diag):
    far.check_densities(OPS, 48, diag=diag, components=129)


def test_a_component_of_infinite_distance_takes_no_part():
    x, means, variances, weights, _ = problem("means 100 sigma apart")
    means[0, 3, 0] = torch.inf
    log_prob, _ = OPS.mixture_log_prob_fwd(x, means, variances, weights, None, False)
    expected, _ = reference.mixture_log_prob_fwd(x, means, variances, weights, None, False)
    torch.testing.assert_close(log_prob, expected)


def test_what_is_not_multiplied():
    """Few components, few dimensions, labels, float64, and rows at addresses that are not aligned."""
    x, means, variances, weights, _ = problem()
    labels = torch.zeros(len(x), dtype=torch.int64)
    skewed = torch.zeros(len(x), 64)[:, 1:49].copy_(x)
    for arguments in (
        (x, means[:, :9], variances[:, :9], weights[:, :9], None),
        (x[:, :16], means[..., :16], variances[..., :16], weights, None),
        (x, means, variances, weights, labels),
        (*(t.double() for t in (x, means, variances, weights)), None),
        (skewed, means, variances, weights, None),
    ):
        with watching() as seen:
            OPS.mixture_log_prob_fwd(*arguments, False)
        assert "global_log_prob_kernel" not in seen.launches
        assert seen.launches["mixture_log_prob_fwd_kernel"] == 1


@long
def test_through_the_public_function():
    x, means, variances, weights, _ = problem()
    tensors = [t.requires_grad_() for t in (x, means, variances, weights)]
    with watching() as seen:
        found = torch.autograd.grad(mixture_log_prob(*tensors).sum(), tensors)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    log_prob, _ = reference.mixture_log_prob_fwd(*exact, None, False)
    for got, want in zip(found, torch.autograd.grad(log_prob.sum(), exact), strict=True):
        assert (got.double() - want).norm() <= 2e-6 * want.norm()
    assert all(name.startswith(("global_", "component_terms")) for name in seen.launches)
