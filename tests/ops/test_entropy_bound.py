"""The CEM loss as a stateless operation: both variants, both gradients, against the definitions."""

import importlib
import importlib.util
import inspect

import pytest
import torch
from support import definitions
from support.definitions import SHAPES, draw
from support.tolerances import RELATIVE, relative_error

from cem_fast.functional import conditional_entropy_bound
from cem_fast.ops import reference
from cem_fast.ops.entropy_bound import BoundOptions
from cem_fast.ops.library import OPERATORS


def bound(x, labels, mixture, num_samples, noise_variance=None, **options):
    C = mixture.means.shape[0]
    prior = torch.arange(1, C + 1, dtype=mixture.means.dtype, device=x.device)
    return conditional_entropy_bound(
        x,
        *mixture,
        prior / prior.sum(),
        labels,
        num_samples=torch.tensor(float(num_samples), dtype=torch.float64),
        noise_variance=torch.tensor([0.0025], dtype=torch.float64) if noise_variance is None else noise_variance,
        **options,
    )


def expected(x, labels, mixture, num_samples, noise_variance=None, **options):
    prior = torch.arange(1, mixture.means.shape[0] + 1, dtype=torch.float64)
    noise = torch.tensor([0.0025], dtype=torch.float64) if noise_variance is None else noise_variance
    return definitions.paper_bound(x, labels, mixture, prior / prior.sum(), num_samples, noise, **options)


def compare(ours, truth, x, dtype, tolerance):
    got, want = x.to(dtype).requires_grad_(), x.to(dtype).double().requires_grad_()
    value, reference = ours(got), truth(want)
    scale = 4096 if dtype == torch.float16 else 1  # loss scaling keeps float16 gradients out of the subnormals
    (value * scale).backward()
    (reference * scale).backward()
    assert relative_error(value, reference) < tolerance
    assert relative_error(got.grad, want.grad) < max(5 * tolerance, RELATIVE[dtype])


@pytest.mark.parametrize("dtype", list(RELATIVE), ids=str)
@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_paper(shape, diag, dtype):
    x, labels, mixture = draw(*shape, diag=diag)
    parameters = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    cast, D = mixture.to(parameters), shape[1]
    # a training set of many batches, of one, and smaller than the batch
    for total in (40 * shape[0], shape[0], shape[0] // 2 + 1):
        compare(
            lambda a, n=total: bound(a, labels, cast, n),
            lambda a, n=total: expected(a, labels, cast.to(torch.float64), n) / D,
            x,
            dtype,
            10 * RELATIVE[parameters] if parameters == torch.float64 else RELATIVE[parameters],
        )


@pytest.mark.parametrize("boost", [1.0, 3.0, 100.0])
@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_literal_gradient_sum_reduction_and_boost(diag, boost):
    x, labels, mixture = draw(20, 6, 3, 2, diag=diag)
    compare(
        lambda a: bound(a, labels, mixture, 300, boost=boost, gradient="literal", reduction="sum"),
        lambda a: expected(a, labels, mixture, 300, boost=boost, unbiased=False),
        x,
        torch.float64,
        1e-10,
    )
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a: bound(a, labels, mixture, 300, boost=boost, gradient="literal", reduction="sum"), leaf
    )


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_unbiased_gradient_is_the_closed_form(diag):
    x, labels, mixture = draw(20, 6, 3, 2, diag=diag)
    leaf = x.clone().requires_grad_()
    bound(leaf, labels, mixture, 10**9).backward()
    chosen = definitions.nearest(x, mixture.means, labels)
    # with an endless training set the batch does not move the variances: v' = v
    v = mixture.variances[labels, chosen]
    v = v if diag else v.unsqueeze(-1)
    closed = (x - mixture.means[labels, chosen]) / (20 * (v + 0.0025)) / 6
    torch.testing.assert_close(leaf.grad, closed, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", list(RELATIVE), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_official(shape, dtype):
    x, labels, mixture = draw(*shape, diag=False)
    parameters = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    cast = mixture.to(parameters)
    noise = torch.tensor([0.0025], dtype=torch.float64)
    for total in (40 * shape[0], 4000 * shape[0]):
        compare(
            lambda a, n=total: bound(a, labels, cast, n, variant="official"),
            lambda a, n=total: definitions.official_hinge(a, labels, cast.to(torch.float64), n, noise),
            x,
            dtype,
            RELATIVE[parameters],
        )


def test_official_hinge_stops_at_the_threshold():
    x, labels, mixture = draw(20, 6, 3, 2, diag=False)
    leaf = x.clone().requires_grad_()
    value = bound(leaf, labels, mixture, 300, variant="official", threshold=1e6)
    value.backward()
    assert value == 0
    assert not leaf.grad.any()


@pytest.mark.parametrize("diag", [False, True], ids=["spherical", "diag"])
def test_noise_per_dimension(diag):
    x, labels, mixture = draw(20, 6, 3, 2, diag=diag)
    noise = torch.rand(6, dtype=torch.float64) * 0.1 + 1e-3
    compare(
        lambda a: bound(a, labels, mixture, 300, noise),
        lambda a: expected(a, labels, mixture, 300, noise) / 6,
        x,
        torch.float64,
        1e-10,
    )


@pytest.mark.parametrize("rows, fitted", [(25, 7), (25, 14), (38, 21), (42, 27)])
@pytest.mark.parametrize("diag", [False, True])
def test_few_samples_and_a_class_without_rows(diag, rows, fitted):
    x, _, mixture = draw(rows, 5, 3, 4, diag=diag)
    labels = torch.zeros(rows, dtype=torch.int64)
    x = x.float().requires_grad_()
    value = bound(x, labels, mixture.to(torch.float32), fitted)
    value.backward()
    assert value.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", ["num_samples", "noise_variance"])
def test_a_number_on_another_device_is_refused(name):
    x, labels, mixture = draw(*SHAPES[0], diag=False)
    there = torch.ones((1,) if name == "noise_variance" else (), dtype=torch.float64, device="meta")
    numbers = {"num_samples": torch.tensor(9.0), "noise_variance": torch.ones(1), name: there}
    prior = torch.ones(mixture.means.shape[0])
    with pytest.raises(ValueError, match=f"{name} must be on cpu like the features, got meta"):
        conditional_entropy_bound(x.float(), *mixture.to(torch.float32), prior, labels, **numbers)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_no_rows(variant):
    _, labels, mixture = draw(1, 6, 3, 2, diag=False)
    x = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    value = bound(x, labels[:0], mixture, 300, variant=variant, reduction="mean")
    value.backward()
    want = expected(x.detach(), labels[:0], mixture, 300) / 6 if variant == "paper" else torch.zeros(()).double()
    torch.testing.assert_close(value.detach(), want)
    assert x.grad.shape == (0, 6)


@pytest.mark.parametrize("variant", ["paper", "official"])
def test_nan_and_bad_labels_make_the_loss_nan(variant):
    x, labels, mixture = draw(20, 6, 3, 2, diag=False)
    broken = x.clone()
    broken[3, 2] = float("nan")
    assert bound(broken, labels, mixture, 300, variant=variant).isnan()
    compiled = torch.compile(bound, fullgraph=True, backend="aot_eager")
    labels[3] = 9
    assert compiled(x, labels, mixture, 300, variant=variant).isnan()


def test_scaled_and_retained_backward():
    x, labels, mixture = draw(20, 6, 3, 2, diag=False)
    leaf = x.clone().requires_grad_()
    value = bound(leaf * 2, labels, mixture, 300) * 3
    (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
    (second,) = torch.autograd.grad(value, leaf)
    (inner,) = torch.autograd.grad(bound(doubled := (x * 2).requires_grad_(), labels, mixture, 300), doubled)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, 6 * inner)


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("diag", [False, True])
def test_opcheck(official, diag):
    if official and diag:
        diag = False
    x, labels, mixture = draw(9, 6, 3, 2, diag=diag)
    prior = torch.full((3,), 1 / 3, dtype=torch.float64)
    scalars = (torch.tensor(90.0).double(), torch.tensor([0.01]).double())
    options = (official, 1.0, True, True, 0.125, 0.01)
    ops = torch.ops.cem_fast
    torch.library.opcheck(
        ops.cem_fwd, (x, mixture.means, labels, mixture.variances, mixture.weights, prior, *scalars, *options)
    )
    counts, scatter, _, _ = ops.component_statistics_fwd(x, mixture.means, labels, None, None, diag, False)
    torch.library.opcheck(
        ops.entropy_bound, (counts, scatter, 6, mixture.variances, mixture.weights, prior, *scalars, *options)
    )


def in_triton():
    if importlib.util.find_spec("triton") is None:
        return []
    operators = importlib.import_module("cem_fast.kernels.operators").OPERATORS
    return [operators["cem_fwd"], operators["entropy_bound"]]


def test_options_that_a_call_leaves_out_are_those_of_the_operators():
    for name in ("cem_fwd", "entropy_bound"):
        arguments = OPERATORS[name]._schema.arguments
        defaults = {one.name: one.default_value for one in arguments if one.has_default_value()}
        assert defaults == BoundOptions()._asdict()
    # torch leaves defaults out where it calls Python
    for kernel in (reference.entropy_bound, *in_triton()):
        parameters = inspect.signature(kernel).parameters.values()
        assert {one.name: one.default for one in parameters if one.default is not one.empty} == BoundOptions()._asdict()
    for options in (BoundOptions(), BoundOptions(mean=False), BoundOptions(official=True), BoundOptions(gamma=0.5)):
        given = options.arguments()
        assert (*given, *BoundOptions()[len(given) :]) == options
        assert not given or given[-1] != BoundOptions()[len(given) - 1]


def test_vmap_matches_a_loop():
    x, labels, mixture = draw(9, 6, 3, 2, diag=False)
    xs = torch.stack([x, x.flip(0), x * 2])

    def total(a):
        return bound(a, labels, mixture, 300)

    want = torch.stack([torch.func.grad(total)(a) for a in xs])
    torch.testing.assert_close(torch.vmap(torch.func.grad(total))(xs), want)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(variant="theirs"), "variant must be one of paper, official, got 'theirs'"),
        (dict(gradient="none"), "gradient must be one of unbiased, literal, got 'none'"),
        (dict(reduction="max"), "reduction must be one of mean, sum, got 'max'"),
        (dict(boost=0), "boost must be positive and finite, got 0"),
        (dict(variant="official"), "defined for spherical variances only"),
        (dict(noise_variance=torch.ones(4).double()), r"noise_variance must have shape \[1\] or \[6\], got \(4,\)"),
    ],
)
def test_bad_options(options, message):
    x, labels, mixture = draw(9, 6, 3, 2, diag=True)
    with pytest.raises(ValueError, match=message):
        bound(x, labels, mixture, 300, **options)


@pytest.mark.parametrize(
    "given, error, message",
    [
        (dict(num_samples=60), TypeError, r"num_samples must be a tensor of shape \[\], got int"),
        (
            dict(num_samples=torch.tensor(60, dtype=torch.int32)),
            TypeError,
            "num_samples must be float32, float64 or int64",
        ),
        (dict(num_samples=torch.tensor(60.0).half()), TypeError, "num_samples must be float32, float64 or int64"),
        (dict(noise_variance=torch.ones(1).long()), TypeError, "noise_variance must be float64 or float32"),
        (dict(num_samples=torch.ones(2)), ValueError, r"num_samples must have shape \[\], got \(2,\)"),
        (dict(class_prior=torch.ones(1).double()), TypeError, "class_prior must be torch.float32 like the means"),
    ],
)
def test_arguments_of_the_bound_are_named(given, error, message):
    arguments = dict(
        means=torch.zeros(1, 1, 2),
        variances=torch.ones(1, 1),
        weights=torch.ones(1, 1),
        class_prior=torch.ones(1),
        num_samples=torch.tensor(60.0),
        noise_variance=torch.ones(1, dtype=torch.float64),
    )
    with pytest.raises(error, match=message):
        conditional_entropy_bound(torch.zeros(3, 2), **arguments | given)
