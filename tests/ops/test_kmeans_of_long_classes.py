"""k-means of long classes of many dimensions: threads share the rows, and bounds leave most rows out of a search."""

import pytest
import torch
from support.blobs import blobs

import cem_fast
from cem_fast.ops import reference

OPS = torch.ops.cem_fast
pytestmark = pytest.mark.skipif(
    cem_fast.backends()["on CPU tensors"].startswith("reference"),
    reason="plain torch searches all rows, in its own order",
)
WIDE = 70  # more dimensions than rows side by side in a vector pay for


def nearest(x, means):
    return OPS.component_statistics_fwd(x, means, None, None, None, False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-22, 1e15, 1e19])
def test_clusters_have_the_rows_nearest_to_them(scale, dtype):
    for spread in (0.3, 3.0):
        x, _, _, _ = blobs(rows=2000, dimension=WIDE, classes=1, components=6, spread=spread)
        x = (x.double() * scale).to(dtype)
        means, counts, scatter, n_iter, _ = OPS.kmeans(x, x[None, :6], None, 6, 0.0, False)
        expected = nearest(x, means)
        assert n_iter > 1
        assert torch.equal(counts, expected[0])
        if 1e-15 < scale < 1e19:
            torch.testing.assert_close(scatter, expected[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("components", [2, 7, 40])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_iterations_at_once_are_those_of_one_call_each(components, dtype, offset):
    x, _, _, _ = blobs(rows=1500, dimension=WIDE, classes=1, components=5, spread=1.0)
    x = x.double() * (1e-2 if offset else 1) + offset
    x[::5] = x[0]  # many equal rows
    x = x.to(dtype)
    means = x[None, 1 : components + 1].clone()
    at_once = OPS.kmeans(x, means, None, 60, 0.0, False)
    for _ in range(60):
        means, counts, scatter, *_ = OPS.kmeans(x, means, None, 1, 0.0, False)
    eps = torch.finfo(dtype).eps
    assert at_once[4] == 1  # converged means do not move at all
    assert torch.equal(at_once[1], counts)
    torch.testing.assert_close(at_once[0], means, rtol=64 * eps, atol=64 * eps)
    torch.testing.assert_close(at_once[2], scatter, rtol=1e-2 if offset else 64 * eps, atol=64 * eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_between_two_means_joins_the_lower_index(dtype):
    x = torch.zeros(1200, WIDE, dtype=dtype)
    x[:400, 0], x[400:800, 0] = 1, -2
    start = torch.zeros(1, 2, WIDE, dtype=dtype)
    start[0, 0, 0], start[0, 1, 0] = 2, -1
    x = x[torch.randperm(1200, generator=torch.Generator().manual_seed(0))]
    assert nearest(x, start)[0].tolist() == [[400, 800]]
    # the means move to 1 and -1, at the same distance from the rows at 0
    means, counts, *_ = OPS.kmeans(x, start, None, 1, 0.0, False)
    assert means[0, :, 0].tolist() == [1, -1]
    assert counts.tolist() == [[800, 400]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [1e6, 1e10, 1e15])
def test_a_far_row_that_leaves_costs_no_precision(far, dtype):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1100, WIDE, generator=g, dtype=torch.float64)
    x[700] = far
    x = x.to(dtype)
    means = x[None, [1, 1, 2, 3]]  # the double one moves onto the far row
    means, counts, *_ = OPS.kmeans(x, means, None, 100, 0.0, False)
    assignment = nearest(x, means)[3]
    sums = torch.zeros(4, WIDE, dtype=torch.float64).index_add_(0, assignment, x.double())
    assert torch.equal(counts[0], torch.bincount(assignment, minlength=4).to(dtype))
    torch.testing.assert_close(means[0].double(), sums / counts[0].unsqueeze(-1).double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("per_dimension", [False, True])
def test_classes_of_different_lengths_equal_the_reference(dtype, per_dimension):
    x, _, _, _ = blobs(rows=2400, dimension=WIDE, classes=1, components=9, spread=0.5)
    x = x.to(dtype)
    labels = torch.tensor([0] * 1700 + [1] * 8 + [3] * 692)  # none of class 2
    labels = labels[torch.randperm(2400, generator=torch.Generator().manual_seed(1))]
    means = torch.stack([x[labels == c][:4] if c != 2 else x[:4] for c in range(4)])
    means = means.to(torch.promote_types(dtype, torch.float32))
    means[0, 2] = 1e4  # no row is near: moves onto the farthest row
    got = OPS.kmeans(x, means, labels, 5, 1e-3, per_dimension)
    truth = reference.kmeans(x.double(), means.double(), labels, 5, 1e-3, per_dimension)
    rtol = 1e-10 if dtype == torch.float64 else 1e-4
    for a, b in zip(got, truth):
        torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("spread", [0.3, 3.0])  # rows that bounds decide; rows that keep changing
def test_bits_do_not_depend_on_threads(spread, per_dimension, dtype):
    x, _, _, _ = blobs(rows=9000, dimension=WIDE, classes=1, components=12, spread=spread)
    x = x.to(dtype)
    start = x[None, :12].to(torch.promote_types(dtype, torch.float32)).clone()
    start[0, 5] = 1e4
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(OPS.kmeans(x, start, None, 5, 0.0, per_dimension))
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("row", [0, 1999])
def test_a_row_that_is_not_finite_shows_in_the_scatter(row, value):
    x, _, _, _ = blobs(rows=2000, dimension=WIDE, classes=1, components=6)
    start = x[None, 100:106].clone()
    x[row, 3] = value
    assert not OPS.kmeans(x, start, None, 5, 0.0, False)[2].isfinite().all()
