"""mixture_log_prob: value, gradients, bad input and the promises of a differentiable operation."""

import pytest
import torch
from support import definitions, far
from support.definitions import SHAPES, Mixture, draw
from support.tolerances import RELATIVE, relative_error

from cem_fast.functional import mixture_log_prob
from cem_fast.ops import reference

DTYPES = list(RELATIVE)


def case(shape=(7, 4, 3, 2), diag=True, dtype=torch.float64):
    x, labels, mixture = draw(*shape, diag=diag)
    return x.to(dtype), mixture.to(dtype), labels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(shape, diag, dtype):
    x, labels, mixture = draw(*shape, diag=diag)
    parameters = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    ours = [t.detach().clone().requires_grad_() for t in (x.to(dtype), *mixture.to(parameters))]
    truth = [t.detach().double().requires_grad_() for t in (x.to(dtype), *mixture.to(parameters))]
    weight = torch.rand(shape[0], dtype=torch.float64)
    value = mixture_log_prob(*ours, labels)
    expected = definitions.log_prob(truth[0], Mixture(*truth[1:]), labels)
    assert value.dtype == parameters
    assert relative_error(value, expected) < RELATIVE[parameters]
    (value * weight.to(parameters)).sum().backward()
    (expected * weight).sum().backward()
    for got, want, tolerance in zip(ours, truth, [RELATIVE[dtype]] + 3 * [10 * RELATIVE[parameters]]):
        assert got.grad.dtype == got.dtype
        assert relative_error(got.grad, want.grad) < tolerance


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("components", [2, 70], ids=["kept responsibilities", "recomputed responsibilities"])
def test_gradcheck(diag, components):
    x, mixture, labels = case((5, 3, 2, components), diag)
    inputs = [t.requires_grad_() for t in (x, *mixture)]
    assert torch.autograd.gradcheck(lambda *a: mixture_log_prob(*a, labels), inputs)


def test_one_class_needs_no_labels():
    x, mixture, _ = case((9, 4, 1, 3))
    assert torch.equal(mixture_log_prob(x, *mixture), mixture_log_prob(x, *mixture, torch.zeros(9, dtype=torch.long)))


def test_no_rows():
    x, mixture, labels = case((0, 4, 3, 2))
    inputs = [t.requires_grad_() for t in (x, *mixture)]
    mixture_log_prob(*inputs, labels).sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in inputs)


def test_strided_input_equals_contiguous():
    x, mixture, labels = case((9, 6, 3, 2))
    wide = torch.randn(9, 12, dtype=torch.float64)
    wide[:, ::2] = x
    strided = [
        wide[:, ::2],
        *(t.transpose(0, 1).contiguous().transpose(0, 1) for t in mixture),
        labels.repeat_interleave(2)[::2],
    ]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(mixture_log_prob(*strided), mixture_log_prob(x, *mixture, labels))
    grads = [
        torch.autograd.grad(mixture_log_prob(a, *m, y).sum(), a)[0]
        for a, *m, y in ([strided[0].requires_grad_(), *strided[1:]], [x.requires_grad_(), *mixture, labels])
    ]
    assert torch.equal(*grads)


def test_second_derivative_raises_in_every_mode():
    x, mixture, labels = case()

    def total(a):
        return mixture_log_prob(a, *mixture, labels).sum()

    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.func.grad(lambda a: torch.func.grad(total)(a).sum())(x)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_in_place_change_of_a_saved_input_is_an_error():
    x, mixture, labels = case()
    leaf = x.clone().requires_grad_()
    features = leaf * 1
    value = mixture_log_prob(features, *mixture, labels).sum()
    features.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    x, mixture, labels = case()
    compiled = torch.compile(mixture_log_prob, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (7, 6, 5):
        got, want = (x[:rows].clone().requires_grad_() for _ in range(2))
        compiled(got, *mixture, labels[:rows]).sum().backward()
        mixture_log_prob(want, *mixture, labels[:rows]).sum().backward()
        assert torch.equal(got.grad, want.grad)


@pytest.mark.parametrize("strict", [False, True])
def test_export_keeps_one_node(strict):
    x, mixture, labels = case()

    class Score(torch.nn.Module):
        def forward(self, x, labels):
            return mixture_log_prob(x, *mixture, labels)

    program = torch.export.export(Score(), (x, labels), strict=strict)
    assert sum("mixture_log_prob_fwd" in str(node.target) for node in program.graph.nodes) == 1
    assert torch.equal(program.module()(x, labels), Score()(x, labels))


def test_vmap_over_rows_and_over_mixtures():
    _, mixture, labels = case()
    xs = torch.rand(5, 7, 4, dtype=torch.float64)
    means = torch.rand(5, *mixture.means.shape, dtype=torch.float64)

    def total(x, means):
        return mixture_log_prob(x, means, *mixture[1:], labels).sum()

    got = torch.vmap(torch.func.grad(total, argnums=(0, 1)))(xs, means)
    want = [torch.func.grad(total, argnums=(0, 1))(x, m) for x, m in zip(xs, means)]
    for i in range(2):
        torch.testing.assert_close(got[i], torch.stack([w[i] for w in want]))
    one_mixture = torch.vmap(lambda x: mixture_log_prob(x, *mixture, labels))(xs)
    torch.testing.assert_close(one_mixture, torch.stack([mixture_log_prob(x, *mixture, labels) for x in xs]))


def test_autocast_keeps_float32_inside():
    x, mixture, labels = case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = torch.nn.functional.linear(x, torch.eye(4)).requires_grad_()
        assert features.dtype == torch.bfloat16
        value = mixture_log_prob(features, *mixture, labels)
    value.sum().backward()
    assert value.dtype == torch.float32
    assert features.grad.dtype == torch.bfloat16


def test_opcheck():
    x, mixture, labels = case()
    ops = torch.ops.cem_fast
    torch.library.opcheck(ops.mixture_log_prob_fwd, (x, *mixture, labels, True))
    log_prob, responsibilities = ops.mixture_log_prob_fwd(x, *mixture, labels, True)
    for saved in (responsibilities, responsibilities[:, :0]):
        arguments = (torch.rand(7, dtype=torch.float64), x, *mixture, labels, log_prob, saved)
        torch.library.opcheck(ops.mixture_log_prob_bwd, arguments)
        torch.library.opcheck(ops.mixture_moments, arguments)


def test_label_out_of_range_beyond_the_check_is_nan_for_its_row_only():
    x, mixture, labels = case()
    bad = labels.clone()
    bad[2], bad[4] = 3, -1
    log_prob, r = torch.ops.cem_fast.mixture_log_prob_fwd(x, *mixture, bad, True)
    row = torch.isin(torch.arange(7), torch.tensor([2, 4]))
    assert torch.equal(log_prob.isnan(), row)
    dx = torch.ops.cem_fast.mixture_log_prob_bwd(torch.ones(7, dtype=x.dtype), x, *mixture, bad, log_prob, r)
    assert torch.equal(dx.isnan().all(1), row)
    assert torch.equal(dx.isnan().any(1), row)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=[1.0]), TypeError, r"x must be a tensor of shape \[N, D\], got list"),
        (dict(x=torch.rand(7)), ValueError, r"x must have shape \[N, D\], got \(7,\)"),
        (dict(x=torch.rand(7, 5).double()), ValueError, r"with D = 4 as in means, got \(7, 5\)"),
        (dict(x=torch.rand(7, 4)), TypeError, "x must be float64 to go with torch.float64 means, got torch.float32"),
        (dict(means=torch.rand(3, 2, 4).half()), TypeError, "means must be float32 or float64, got torch.float16"),
        (
            dict(means=torch.rand(3, 0, 4).double()),
            ValueError,
            r"at least one class, component and dimension, got \(3, 0, 4\)",
        ),
        (dict(variances=torch.rand(3, 2, 5).double()), ValueError, r"variances must have shape .* got \(3, 2, 5\)"),
        (
            dict(variances=torch.rand(3, 2)),
            TypeError,
            "variances must be torch.float64 like the means, got torch.float32",
        ),
        (
            dict(weights=torch.rand(3, 3).double()),
            ValueError,
            r"weights must have shape \[C, K\] = \(3, 2\), got \(3, 3\)",
        ),
        (dict(labels=None), ValueError, "labels may be None only for one class, got a mixture of 3 classes"),
        (
            dict(labels=torch.zeros(6, dtype=torch.long)),
            ValueError,
            r"labels must have shape \[N\] = \(7,\), got \(6,\)",
        ),
        (dict(labels=torch.zeros(7)), TypeError, "labels must be an integer tensor, got torch.float32"),
        (
            dict(labels=torch.tensor([0, 1, 2, 3, 0, 0, 0])),
            ValueError,
            r"labels must lie in \[0, 3\), got 3 at index 3",
        ),
        (
            dict(labels=torch.tensor([0, 1, -1, 3, 0, 0, 0])),
            ValueError,
            r"labels must lie in \[0, 3\), got -1 at index 2",
        ),
        (
            dict(labels=torch.zeros(7, dtype=torch.long, device="meta")),
            ValueError,
            "labels must be on cpu like the features, got meta",
        ),
    ],
)
def test_bad_input(change, error, message):
    x, mixture, labels = case()
    arguments = dict(x=x, **mixture._asdict(), labels=labels) | change
    with pytest.raises(error, match=message):
        mixture_log_prob(**arguments)


def test_a_component_of_weight_zero_has_no_gradient():
    x, labels, mixture = draw(20, 6, 2, 3, diag=False)
    weights = mixture.weights.clone()
    weights[:, 1] = 0
    weights = (weights / weights.sum(1, keepdim=True)).requires_grad_()
    means, variances = (t.clone().requires_grad_() for t in (mixture.means, mixture.variances))
    mixture_log_prob(x, means, variances, weights, labels).sum().backward()
    for t in (means, variances, weights):
        assert t.grad.isfinite().all()
        assert not t.grad[:, 1].any()
        assert t.grad[:, 0].any()


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("width", far.WIDTHS)
def test_features_too_large_to_square_have_right_densities_and_gradients(width, diag):
    far.check_densities(torch.ops.cem_fast, width, diag=diag)
    far.check_densities(reference, width, diag=diag)


@pytest.mark.parametrize("shape", [(1, 2), (1, 2, 4)], ids=["spherical", "diag"])
def test_compiled_code_refuses_a_variance_whose_inverse_is_infinite(shape):
    def density(variances):
        return mixture_log_prob(torch.zeros(3, 4), torch.zeros(1, 2, 4), variances, torch.full((1, 2), 0.5))

    compiled = torch.compile(density, fullgraph=True, backend="eager")
    assert compiled(torch.ones(shape)).isfinite().all()
    with pytest.raises(RuntimeError, match="variances must be at least 1.18e-38"):
        compiled(torch.full(shape, 1e-40))
