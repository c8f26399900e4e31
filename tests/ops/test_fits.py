"""Operators that only fits use: the compiled kernels agree with plain torch, and give the same bits for any threads."""

import pytest
import torch

from cem_fast.ops import fits

OPS = torch.ops.cem_fast
SHAPES = [(1, 1, 1, 1), (40, 3, 1, 4), (200, 5, 4, 3), (37, 17, 2, 2), (90, 64, 1, 3), (65, 130, 3, 2), (5, 2, 9, 1)]


def problem(N, D, C, K, tied, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(N, D, generator=g, dtype=torch.float64)
    means = torch.randn(C, K, D, generator=g, dtype=torch.float64)
    root = torch.randn(C * (1 if tied else K), D, D, generator=g, dtype=torch.float64)
    covariances = root @ root.mT / D + torch.eye(D)
    labels = torch.randint(0, C, (N,), generator=g) if C > 1 else None
    r = torch.rand(N, K, generator=g, dtype=torch.float64)
    return x, means, covariances, labels, torch.where(r > 0.3, r, 0.0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_operators_of_matrices_equal_plain_torch(shape, tied):
    _, D, C, K = shape
    x, means, covariances, labels, r = problem(*shape, tied)
    close = dict(rtol=1e-9, atol=1e-9)
    roots, half_logdets = OPS.inverse_roots(covariances)
    truth = fits.inverse_roots(covariances)
    torch.testing.assert_close(roots, truth[0], **close)
    torch.testing.assert_close(half_logdets, truth[1], **close)
    shaped, constants = roots.view((C, D, D) if tied else (C, K, D, D)), torch.rand(C, K, dtype=torch.float64)
    joint = OPS.matrix_log_joint(x, means, shaped, constants, labels)
    torch.testing.assert_close(joint, fits.matrix_log_joint(x, means, shaped, constants, labels), **close)
    for a, b in zip(OPS.matrix_moments(x, means, r, labels, tied), fits.matrix_moments(x, means, r, labels, tied)):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compiled_distances_to_candidates_equal_plain_torch(shape, dtype):
    N, D, _, _ = shape
    x, candidates, _, labels, _ = problem(*shape, False)
    own = torch.float64 if dtype == torch.float64 else torch.float32
    x, candidates, mass = x.to(dtype), candidates.to(own), torch.rand(N, dtype=torch.float64)
    for nearest in (torch.full((N,), torch.inf, dtype=own), torch.rand(N).to(own) * D):
        got = OPS.candidate_distances(x, candidates, labels, nearest, mass)
        truth = fits.candidate_distances(x.double(), candidates.double(), labels, nearest.double(), mass)
        for a, b in zip(got, truth):
            torch.testing.assert_close(a.double(), b, rtol=1e-10 if own == torch.float64 else 1e-4, atol=1e-5)


def seeding(N, D, K, dtype, trials=4):
    g = torch.Generator().manual_seed(N + D)
    x = torch.randn(N, D, generator=g, dtype=torch.float64).to(dtype)
    return x, torch.rand(N, generator=g).double(), torch.rand(1 + (K - 1) * trials, generator=g, dtype=torch.float64), K


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("N, D, K", [(1, 3, 2), (50, 1, 1), (1500, 16, 9), (333, 19, 70), (2000, 64, 5), (400, 130, 6)])
def test_compiled_seeding_draws_the_rows_of_plain_torch(N, D, K, dtype):
    x, mass, uniform, K = seeding(N, D, K, dtype)
    means = OPS.kmeans_plus_plus(x, mass, uniform, K)
    truth = fits.kmeans_plus_plus(x.double(), mass, uniform, K)
    assert means.shape == (1, K, D)
    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(means.double(), truth)
    assert torch.equal(OPS.kmeans_plus_plus(x.T.contiguous().T, mass, uniform, K), means)


def test_seeding_repeats_rows_where_there_are_too_few():
    x, _, uniform, _ = seeding(40, 5, 6, torch.float32)
    x[:] = x[torch.arange(40) % 3]  # three distinct rows
    mass = torch.ones(40, dtype=torch.float64)
    mass[::3] = 0  # of which one never is drawn
    for operators in (OPS, fits):
        means = operators.kmeans_plus_plus(x, mass, uniform, 6)
        assert len(means[0].unique(dim=0)) == 2
        assert not (means[0] == x[0]).all(1).any()


def test_seeding_of_rows_that_are_not_finite_ends():
    x, mass, uniform, K = seeding(300, 16, 20, torch.float32)
    for value in (torch.nan, torch.inf):
        x[7, 3] = value
        assert OPS.kmeans_plus_plus(x, mass, uniform, K).shape == (1, K, 16)


def test_results_do_not_depend_on_threads():
    x, means, covariances, labels, r = problem(3000, 24, 3, 4, False)
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        roots, _ = OPS.inverse_roots(covariances)
        joint = OPS.matrix_log_joint(x, means, roots.view(3, 4, 24, 24), r[:3], labels)
        tied = OPS.matrix_log_joint(x, means, roots[:3], r[:3], labels)
        parts = [OPS.matrix_moments(x, means, r, labels, kind) for kind in (False, True)]
        near = OPS.candidate_distances(x, means, labels, x[:, 0].abs(), x[:, 1].abs())
        seeds = OPS.kmeans_plus_plus(*seeding(20_000, 24, 12, torch.float32))
        found.append([roots, joint, tied, *parts[0], *parts[1], *near, seeds])
        torch.set_num_threads(before)
    if not torch._C._dispatch_has_kernel_for_dispatch_key("cem_fast::matrix_moments", "CPU"):
        pytest.skip("plain torch may differ between numbers of threads")
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


def test_a_matrix_that_is_not_positive_definite_gives_nan():
    matrices = torch.stack([torch.eye(3), -torch.eye(3), torch.ones(3, 3)]).double()
    for operator in (OPS.inverse_roots, fits.inverse_roots):
        assert operator(matrices)[1].isnan().tolist() == [False, True, True]


def test_labels_out_of_range_give_nan():
    x, means, _, labels, r = problem(20, 4, 3, 2, False)
    labels[7], labels[9] = -1, 3
    roots = torch.eye(4).double().expand(3, 2, 4, 4).contiguous()
    for operators in (OPS, fits):
        joint = operators.matrix_log_joint(x, means, roots, r[:3], labels)
        assert joint.isnan().any(1).nonzero().flatten().tolist() == [7, 9]
        assert all(part.isnan().all() for part in operators.matrix_moments(x, means, r, labels, False))


def test_operators_pass_opcheck():
    x, means, covariances, labels, r = problem(12, 4, 3, 2, False)
    roots = torch.eye(4).double().expand(3, 2, 4, 4).contiguous()
    for operator, arguments in (
        (OPS.inverse_roots.default, (covariances,)),
        (OPS.matrix_log_joint.default, (x, means, roots, r[:3].contiguous(), labels)),
        (OPS.matrix_moments.default, (x, means, r, labels, True)),
        (OPS.candidate_distances.default, (x, means, labels, x[:, 0].abs(), x[:, 1].abs())),
        (OPS.kmeans_plus_plus.default, seeding(30, 4, 5, torch.float32)),
    ):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-22])
def test_clusters_of_tiny_features_count_the_rows_nearest_to_them(scale):
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        x, labels = torch.randn(3000, 5, generator=g) * scale, torch.randint(9, (3000,), generator=g)
        start = torch.stack([x[labels == c][:3] for c in range(9)])
        means, counts, *_ = OPS.kmeans(x, start, labels, 6, 0.0, False)
        nearest = OPS.component_statistics_fwd(x, means, labels, None, None, False, False)[0]
        assert torch.equal(counts, nearest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimension", [1, 2, 7, 16, 33, 64])
@pytest.mark.parametrize("components", [4, 7, 65])
def test_rows_of_few_dimensions_find_the_nearest_mean_with_the_lowest_index(dimension, components, dtype):
    g = torch.Generator().manual_seed(dimension)
    x = torch.randint(-2, 3, (301, dimension), generator=g).to(dtype)  # distances are exact, many are equal
    means = torch.randint(-2, 3, (1, components, dimension), generator=g).to(dtype)
    distances = (x.unsqueeze(1) - means).square().sum(2)
    lowest = (distances == distances.min(1, keepdim=True).values).int().argmax(1)
    counts, scatter, _, assignment = OPS.component_statistics_fwd(x, means, None, None, None, False, False)
    assert torch.equal(assignment, lowest)
    assert torch.equal(counts[0], torch.bincount(lowest, minlength=components).to(dtype))
    assert scatter.sum() == distances.min(1).values.sum()
    x[3, 0] = torch.nan
    assert OPS.component_statistics_fwd(x, means, None, None, None, False, False)[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dimension", [8, 13, 16])
def test_rows_of_few_dimensions_find_their_own_of_many_means(dimension, dtype):
    K = 16 * dimension + 3  # the last group of means is not full
    g = torch.Generator().manual_seed(dimension)
    means = 10 * torch.randn(1, K, dimension, generator=g, dtype=dtype)
    own = torch.randperm(3 * K, generator=g) % K
    x = means[0, own] + 0.1 * torch.randn(3 * K, dimension, generator=g, dtype=dtype)
    assert torch.equal(OPS.component_statistics_fwd(x, means, None, None, None, False, False)[3], own)
    means[0, 1], means[0, K - 1] = means[0, 0], means[0, 9]  # twins in one group, and in two
    own = torch.where(own == 1, 0, torch.where(own == K - 1, 9, own))
    x = means[0, own] + 0.1 * torch.randn(3 * K, dimension, generator=g, dtype=dtype)
    assert torch.equal(OPS.component_statistics_fwd(x, means, None, None, None, False, False)[3], own)
