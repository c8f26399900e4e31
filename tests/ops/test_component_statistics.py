"""component_statistics: counts, scatter, sums and assignment of one pass, and the gradient through the scatter."""

import pytest
import torch
from support import definitions, far
from support.definitions import SHAPES, draw
from support.tolerances import RELATIVE, relative_error

from cem_fast.functional import component_statistics, mixture_log_prob
from cem_fast.ops import reference


@pytest.mark.parametrize("dtype", list(RELATIVE), ids=str)
@pytest.mark.parametrize("per_dimension", [False, True], ids=["total", "per dimension"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradient(shape, per_dimension, dtype):
    x, labels, mixture = draw(*shape, diag=False)
    parameters = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    x, means = x.to(dtype), mixture.means.to(parameters)
    ours, truth = x.clone().requires_grad_(), x.double().requires_grad_()
    got = component_statistics(ours, means, labels, per_dimension=per_dimension, sums=True)
    counts, scatter, sums = definitions.statistics(truth, means.double(), labels)
    scatter = scatter if per_dimension else scatter.sum(-1)
    assert torch.equal(got.counts.double(), counts)
    assert torch.equal(got.assignment, definitions.nearest(truth, means.double(), labels))
    assert relative_error(got.scatter, scatter) < RELATIVE[parameters]
    assert relative_error(got.sums, sums) < RELATIVE[parameters]
    weight = torch.rand_like(scatter)
    (got.scatter * weight.to(parameters)).sum().backward()
    (scatter * weight).sum().backward()
    assert relative_error(ours.grad, truth.grad) < RELATIVE[dtype]


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_posterior_assignment(diag):
    x, labels, mixture = draw(50, 6, 3, 4, diag=diag)
    got = component_statistics(
        x, mixture.means, labels, variances=mixture.variances, weights=mixture.weights, assignment="posterior"
    )
    per_component = torch.stack(
        [
            mixture.weights[labels, k].log()
            + mixture_log_prob(
                x, mixture.means[:, k : k + 1], mixture.variances[:, k : k + 1], torch.ones(3, 1).double(), labels
            )
            for k in range(4)
        ],
        dim=1,
    )
    assert torch.equal(got.assignment, per_component.argmax(1))
    assert not torch.equal(got.assignment, component_statistics(x, mixture.means, labels).assignment)


@pytest.mark.parametrize("per_dimension", [False, True])
def test_gradcheck(per_dimension):
    x, labels, mixture = draw(6, 3, 2, 2, diag=False)
    assert torch.autograd.gradcheck(
        lambda a: component_statistics(a, mixture.means, labels, per_dimension=per_dimension).scatter,
        x.requires_grad_(),
    )


def test_only_the_scatter_is_differentiable_and_only_in_x():
    x, labels, mixture = draw(6, 3, 2, 2, diag=False)
    means = mixture.means.clone().requires_grad_()
    got = component_statistics(x.requires_grad_(), means, labels, sums=True)
    assert [t.requires_grad for t in got] == [False, True, False, False]
    got.scatter.sum().backward()
    assert means.grad is None


def test_distance_ties_go_to_the_lowest_index():
    x = torch.randn(20, 5).double()
    means = torch.zeros(1, 4, 5).double()
    means[0, 0] = 100
    assert component_statistics(x, means).assignment.eq(1).all()


@pytest.mark.parametrize("components", [3, 6])
@pytest.mark.parametrize("width", far.WIDTHS)
def test_rows_too_far_to_square_go_to_the_nearest_mean(width, components):
    far.check_nearest(torch.ops.cem_fast, width, components=components)
    far.check_nearest(reference, width, components=components)


def test_common_offset_does_not_change_the_nearest_mean():
    x, labels, mixture = draw(64, 32, 4, 8, diag=False)
    x, means = (x * 1e-3 + 1000).float(), (mixture.means * 1e-3 + 1000).float()
    got = component_statistics(x, means, labels)
    assert torch.equal(got.assignment, definitions.nearest(x.double(), means.double(), labels))


def test_no_rows():
    _, labels, mixture = draw(1, 4, 3, 2, diag=False)
    x = torch.zeros(0, 4).double().requires_grad_()
    got = component_statistics(x, mixture.means, labels[:0], sums=True, per_dimension=True)
    assert not any(t.any() for t in got)
    got.scatter.sum().backward()
    assert x.grad.shape == (0, 4)


def test_strided_input_equals_contiguous():
    x, labels, mixture = draw(9, 6, 3, 2, diag=False)
    wide = torch.randn(9, 12).double()
    wide[:, ::2] = x
    got = component_statistics(wide[:, ::2], mixture.means, labels, sums=True)
    for a, b in zip(got, component_statistics(x, mixture.means, labels, sums=True)):
        assert torch.equal(a, b)


def test_nan_feature_reaches_the_scatter():
    x, labels, mixture = draw(9, 6, 3, 2, diag=False)
    x[4, 3] = float("nan")
    assert component_statistics(x, mixture.means, labels).scatter[labels[4]].isnan().any()


def test_label_out_of_range_beyond_the_check_poisons_everything():
    x, labels, mixture = draw(9, 6, 3, 2, diag=False)
    labels[4] = 7
    ops = torch.ops.cem_fast
    counts, scatter, sums, assignment = ops.component_statistics_fwd(x, mixture.means, labels, None, None, True, True)
    assert all(t.isnan().all() for t in (counts, scatter, sums))
    assert assignment[4] == -1
    dx = ops.component_statistics_bwd(torch.ones(3, 2).double(), None, x, mixture.means, labels, assignment)
    assert dx[4].isnan().all()
    assert not dx[[0, 1, 2, 3, 5]].isnan().any()


@pytest.mark.parametrize("per_dimension", [False, True])
def test_vmap_and_compile_and_second_derivative(per_dimension):
    x, labels, mixture = draw(9, 6, 3, 2, diag=False)
    xs = torch.stack([x, x.flip(0), x * 2])

    def total(a):
        return component_statistics(a, mixture.means, labels, per_dimension=per_dimension).scatter.square().sum()

    want = torch.stack([torch.func.grad(total)(a) for a in xs])
    torch.testing.assert_close(torch.vmap(torch.func.grad(total))(xs), want)
    leaf = x.clone().requires_grad_()
    torch.compile(total, fullgraph=True, backend="aot_eager")(leaf).backward()
    torch.testing.assert_close(leaf.grad, want[0])
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda a: torch.func.grad(total)(a).sum())(x)


@pytest.mark.parametrize("options", [(None, None, False, False), (None, None, True, True), ("v", "w", False, True)])
def test_opcheck(options):
    x, labels, mixture = draw(9, 6, 3, 2, diag=True)
    variances, weights, *flags = [{"v": mixture.variances, "w": mixture.weights}.get(o, o) for o in options]
    operator = torch.ops.cem_fast.component_statistics_fwd
    torch.library.opcheck(operator, (x, mixture.means, labels, variances, weights, *flags))
    scatter, assignment = [operator(x, mixture.means, labels, variances, weights, *flags)[i] for i in (1, 3)]
    for scale in (None, torch.tensor(2.0).double()):
        torch.library.opcheck(
            torch.ops.cem_fast.component_statistics_bwd, (scatter, scale, x, mixture.means, labels, assignment)
        )


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(assignment="farthest"), "assignment must be one of nearest, posterior, got 'farthest'"),
        (dict(assignment="posterior"), 'assignment="posterior" needs variances and weights, got None'),
    ],
)
def test_bad_options(options, message):
    x, labels, mixture = draw(9, 6, 3, 2, diag=False)
    with pytest.raises(ValueError, match=message):
        component_statistics(x, mixture.means, labels, **options)
