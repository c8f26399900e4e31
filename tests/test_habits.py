"""Hard inputs of the operations and the loss, one habit a test: labels, devices, frozen features, NaN, magnitudes, ties."""

from __future__ import annotations

import math

import pytest
import torch
from support.fuzzing import IMPLEMENTATIONS, LAYOUTS, laid_out, using
from torch import Tensor

from cem_fast import CEMLoss, functional

CLASSES, COMPONENTS, DIMENSION = 3, 2, 5
NAN, INF = float("nan"), float("inf")
IMPLEMENTATION = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def mixture(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "means": scale * torch.rand(CLASSES, COMPONENTS, DIMENSION, dtype=dtype, generator=generator),
        "variances": torch.full((CLASSES, COMPONENTS), scale**2, dtype=dtype),
        "weights": torch.full((CLASSES, COMPONENTS), 1 / COMPONENTS, dtype=dtype),
    }


MIXTURE = mixture()


def log_prob(x: Tensor, labels: Tensor) -> Tensor:
    return functional.mixture_log_prob(x, **MIXTURE, labels=labels)


def statistics(x: Tensor, labels: Tensor) -> Tensor:
    return functional.component_statistics(x, mixture()["means"], labels).scatter


def bound(x: Tensor, labels: Tensor) -> Tensor:
    return functional.conditional_entropy_bound(
        x,
        **MIXTURE,
        class_prior=torch.full((CLASSES,), 1 / CLASSES),
        labels=labels,
        num_samples=torch.tensor(60.0),
        noise_variance=torch.tensor([0.1], dtype=torch.float64),
    )


def loss(x: Tensor, labels: Tensor, **options: bool) -> Tensor:
    cem = CEMLoss(num_classes=CLASSES, num_components=COMPONENTS, **options)
    cem.load_mixture(**mixture(), class_prior=torch.full((CLASSES,), 1 / CLASSES), num_samples=60)
    return cem(x, labels)


def unfitted_loss(x: Tensor, labels: Tensor) -> Tensor:
    return CEMLoss(num_classes=CLASSES)(x, labels)


CALLS = pytest.mark.parametrize(
    "call", [log_prob, statistics, bound, loss, unfitted_loss], ids=lambda call: call.__name__
)
ROWS = 7


def rows() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    return torch.rand(ROWS, DIMENSION), torch.arange(ROWS) % CLASSES


@CALLS
@pytest.mark.parametrize("value", [-1, CLASSES, 2**40, -(2**63)])
def test_a_label_out_of_range_is_named_with_its_index(call, value):
    x, labels = rows()
    labels[4] = value
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, {CLASSES}\), got {value} at index 4"):
        call(x, labels)


@CALLS
@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda labels: labels.float(), TypeError, "labels must be an integer tensor, got torch.float32"),
        (lambda labels: labels > 0, TypeError, "labels must be an integer tensor, got torch.bool"),
        (lambda labels: labels[:-1], ValueError, rf"labels must have shape \[N\] = \({ROWS},\), got \({ROWS - 1},\)"),
        (lambda labels: labels[:, None], ValueError, rf"labels must have shape \[N\], got \({ROWS}, 1\)"),
        (lambda labels: labels.tolist(), TypeError, r"labels must be a tensor of shape \[N\], got list"),
        (lambda labels: None, ValueError, f"labels may be None only for one class, got a mixture of {CLASSES} classes"),
    ],
    ids=["float", "bool", "length", "shape", "list", "none"],
)
def test_labels_of_another_kind_are_named(call, change, error, message):
    x, labels = rows()
    with pytest.raises(error, match=message):
        call(x, change(labels))


@CALLS
def test_labels_on_another_device_name_both(call):
    x, labels = rows()
    with pytest.raises(ValueError, match="labels must be on cpu like the features, got meta"):
        call(x, labels.to("meta"))


@pytest.mark.parametrize("value", [-1, CLASSES])
def test_where_labels_cannot_be_read_a_wrong_one_is_nan(value):
    x, labels = rows()
    labels[4] = value
    right = log_prob(x, rows()[1])
    found = torch.compile(log_prob, backend="eager", fullgraph=True)(x, labels)
    assert bool(found[4].isnan())
    assert torch.equal(found[[0, 1, 2, 3, 5, 6]], right[[0, 1, 2, 3, 5, 6]])
    assert bool(torch.compile(bound, backend="eager", fullgraph=True)(x, labels).isnan())


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_feature_that_is_not_finite_spreads_or_is_named(value):
    x, labels = rows()
    x[5, 3] = value
    leaf = x.clone().requires_grad_()
    found = loss(leaf, labels)
    assert not bool(found.isfinite())
    with pytest.raises(
        ValueError, match="features must be finite, got NaN or infinity in 1 rows, first row 5 of class 2"
    ):
        loss(x, labels, check_finite=True)
    densities = log_prob(x, labels)
    assert not bool(densities[5].isfinite())
    assert bool(densities[:5].isfinite().all())


@IMPLEMENTATION
@pytest.mark.parametrize("call", [log_prob, statistics, bound, loss], ids=lambda call: call.__name__)
def test_features_without_a_gradient_give_the_same_value(implementation, call):
    x, labels = rows()
    with using(implementation):
        right = call(x.clone().requires_grad_(), labels)
        assert right.requires_grad
        assert not call(x, labels).requires_grad
        assert torch.equal(call(x, labels), right.detach())
        with torch.no_grad():
            assert torch.equal(call(x.clone().requires_grad_(), labels), right.detach())
        with torch.inference_mode():
            assert torch.equal(call(x, labels), right.detach())


@IMPLEMENTATION
def test_a_frozen_mixture_and_frozen_features_get_the_right_gradients(implementation):
    x, labels = rows()
    names = ("x", "means", "variances", "weights")
    values = {"x": x, **mixture()}

    def gradients(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        leaves = {name: value.clone().requires_grad_(name in wanted) for name, value in values.items()}
        functional.mixture_log_prob(**leaves, labels=labels).sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    with using(implementation):
        right = gradients(names)
        for name in names:
            found = gradients((name,))
            assert torch.equal(found[name], right[name])
            assert all(found[other] is None for other in names if other != name)


@IMPLEMENTATION
@pytest.mark.parametrize("scale", [1e-16, 1e-8, 1e4, 1e8, 1e15, 1e18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_results_scale_with_their_features(implementation, dtype, scale):
    torch.manual_seed(0)
    x, labels = torch.rand(ROWS, DIMENSION, dtype=torch.float64), torch.arange(ROWS) % CLASSES

    def results(by: float, kind: torch.dtype) -> list[Tensor]:
        parameters = {name: value.to(kind) for name, value in mixture(torch.float64, by).items()}
        leaf = (by * x).to(kind).requires_grad_()
        density = functional.mixture_log_prob(leaf, **parameters, labels=labels)
        found = functional.component_statistics(leaf, parameters["means"], labels, sums=True)
        value = functional.conditional_entropy_bound(
            leaf,
            **parameters,
            class_prior=torch.full((CLASSES,), 1 / CLASSES, dtype=kind),
            labels=labels,
            num_samples=torch.tensor(60.0, dtype=torch.float64),
            noise_variance=torch.tensor([by**2], dtype=torch.float64),
        )
        slopes = [torch.autograd.grad(each.sum(), leaf)[0] for each in (density, value)]
        density = density.detach() + DIMENSION * math.log(by)
        return [density, value.detach(), *(by * slope for slope in slopes), found.sums / by, found.counts]

    with using(implementation):
        for found, right in zip(results(scale, dtype), results(1.0, torch.float64)):
            assert torch.allclose(found.double(), right, rtol=1e-4, atol=1e-4)


@IMPLEMENTATION
def test_squares_that_a_half_type_cannot_hold(implementation):
    x, labels = rows()
    large = (300 * x + 300).half().requires_grad_()
    parameters = mixture(scale=300.0)
    exact = {name: value.double() for name, value in parameters.items()}
    with using(implementation):
        found = functional.mixture_log_prob(large, **parameters, labels=labels)
        found.sum().backward()
        right = functional.mixture_log_prob(large.detach().double(), **exact, labels=labels)
    assert bool(found.isfinite().all())
    assert large.grad.dtype == torch.float16
    assert bool(large.grad.isfinite().all())
    assert torch.allclose(found.detach().double(), right, rtol=1e-5)


@IMPLEMENTATION
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_tie_goes_to_the_lowest_component(implementation, layout, dtype):
    torch.manual_seed(0)
    parameters = torch.promote_types(dtype, torch.float32)
    for components in (2, 5, 6, 11, 16, 21, 66):
        for dimension in (1, 63):
            x = laid_out(torch.randn(70, dimension).to(dtype), layout)
            means = torch.randn(1, 1, dimension, dtype=parameters).expand(1, components, dimension)
            spread, weights = (
                torch.ones(1, components, dtype=parameters),
                torch.full((1, components), 1 / components, dtype=parameters),
            )
            with using(implementation):
                for each in (means, laid_out(means, layout)):
                    found = functional.component_statistics(x, each)
                    assert bool((found.assignment == 0).all()), (components, dimension)
                    extra = {"variances": spread, "weights": weights, "assignment": "posterior"}
                    assert bool((functional.component_statistics(x, each, **extra).assignment == 0).all())


@IMPLEMENTATION
def test_rows_on_their_means_and_the_least_variances_have_finite_gradients(implementation):
    labels = torch.arange(6) % CLASSES
    x = mixture()["means"][labels, 0].requires_grad_()
    cem = CEMLoss(num_classes=CLASSES, num_components=COMPONENTS, noise_std=0.1)
    fitted = mixture() | {"variances": torch.full((CLASSES, COMPONENTS), 2e-38)}
    cem.load_mixture(**fitted, class_prior=torch.full((CLASSES,), 1 / CLASSES), num_samples=60)
    with using(implementation):
        value = cem(x, labels)
        value.backward()
    assert bool(value.isfinite())
    assert bool((x.grad == 0).all())
