"""Errors name the argument that is wrong, what was expected and what came."""

import pytest
import torch
from torch import nn

from cem_fast import CEMLoss, CEMSchedule, GaussianMixture, KMeans, SplitModel, functional

X, Y = torch.rand(20, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
ONE = torch.ones(1, 1)


def mixture(**options):
    return GaussianMixture(num_components=1, **options).fit(X)


def loss(**options):
    return CEMLoss(num_classes=2, num_components=1, **options).fit(X, Y)


def given(**changed):
    values = dict(means=torch.zeros(1, 1, 2), variances=ONE, weights=ONE, class_prior=ONE[0], num_samples=9)
    return CEMLoss(num_classes=1, num_components=1).load_mixture(**values | changed)


def log_prob(**changed):
    values = dict(x=X, means=torch.zeros(1, 1, 4), variances=ONE, weights=ONE)
    return functional.mixture_log_prob(**values | changed)


def loaded_centers():
    kmeans = KMeans(num_clusters=1)
    kmeans.load_state_dict(KMeans(num_clusters=1).fit(X).state_dict())
    return kmeans


NESTED = torch.nested.nested_tensor([X[:3], X[3:]], layout=torch.jagged)
START = torch.zeros(1, 1, 4)
CASES = {
    "sparse rows": (lambda: mixture().fit(X.to_sparse()), TypeError, "x must be a dense tensor, got a sparse one"),
    "sparse rows of an operation": (lambda: log_prob(x=X.to_sparse()), TypeError, "x must be a dense tensor"),
    "sparse means": (lambda: log_prob(means=START.to_sparse()), TypeError, "means must be a dense tensor"),
    "sparse features": (lambda: loss()(X.to_sparse(), Y), TypeError, "features must be a dense tensor, got a sparse"),
    "nested features": (lambda: loss()(NESTED, Y), TypeError, "features must be a dense tensor, got a nested one"),
    "sparse labels": (lambda: loss()(X, Y.to_sparse()), TypeError, "labels must be a dense tensor, got a sparse one"),
    "no features": (lambda: loss().fit(X[:0], Y[:0]), ValueError, "features must have at least one row"),
    "features with NaN": (
        lambda: loss().fit(X / 0 * 0, Y),
        ValueError,
        "features must be finite, got 20 rows with NaN",
    ),
    "features of another width": (lambda: loss()(X[:, :3], Y), ValueError, r"features must have .* D = 4 .* \(20, 3\)"),
    "features of another type": (lambda: loss()(X.double(), Y), TypeError, "features must be float32, float16 or bf"),
    "noise of another width": (lambda: loss(noise_std=torch.ones(3))(X, Y), ValueError, r"noise_std must .* \[4\]"),
    "complex noise": (lambda: loss(noise_std=torch.ones(4) * 1j), TypeError, "noise_std must be .* of torch.complex64"),
    "a flag for noise": (lambda: loss(noise_std=True), TypeError, "noise_std must be a number .* got True"),
    "a weight that is no number": (lambda: CEMSchedule("1"), TypeError, "weight must be a number, got str"),
    "an encoder that is no module": (
        lambda: SplitModel(len, nn.Identity()),
        TypeError,
        "encoder must be a torch.nn.Mod",
    ),
    "a boost that is no number": (lambda: loss(boost="a"), TypeError, "boost must be a number, got str"),
    "a tolerance that is no number": (lambda: loss().fit(X, Y, tol="a"), TypeError, "tol must be a number, got str"),
    "means that are no tensor": (lambda: given(means=[1]), TypeError, "means must be a tensor"),
    "weights that are no tensor": (lambda: given(weights=[1]), TypeError, "weights must be a tensor"),
    "means with NaN": (lambda: given(means=torch.full((1, 1, 2), torch.nan)), ValueError, "means must be finite"),
    "infinite num_samples": (
        lambda: given(num_samples=float("inf")),
        ValueError,
        "num_samples must be finite, got inf",
    ),
    "denormal fitted variances": (
        lambda: given(variances=ONE * 1e-40),
        ValueError,
        "variances must be positive and nor",
    ),
    "denormal variances": (lambda: log_prob(variances=ONE * 1e-40), ValueError, "variances must be at least 1.18e-38"),
    "negative variances": (lambda: log_prob(variances=-ONE), ValueError, "variances must be at least 1.18e-38"),
    "denormal initial variances": (
        lambda: mixture(init=START, init_variances=START + 1e-40),
        ValueError,
        "init_variances must be positive and normal, got 9.99.*e-41",
    ),
    "indefinite initial covariances": (
        lambda: mixture(init=START, covariance_type="full", init_variances=-torch.eye(4)[None, None]),
        ValueError,
        "init_variances must be positive definite",
    ),
    "no initial weight": (
        lambda: mixture(init=START, init_weights=0 * ONE),
        ValueError,
        "init_weights must be positive for",
    ),
    "large initial means": (lambda: mixture(init=START + 1e38), ValueError, "init must be small enough"),
    "initial means without values": (lambda: mixture(init=START.to("meta")), ValueError, "init must hold values"),
    "a sample of no rows": (lambda: mixture().sample(0), ValueError, "num_samples must be at least 1, got 0"),
    "a seed for a generator": (lambda: mixture().sample(3, generator=5), TypeError, "generator must be a torch.Gen"),
    "a function for an encoder": (
        lambda: loss().fit_loader(len, [(X, Y)]),
        TypeError,
        "encoder must be a torch.nn.Mod",
    ),
    "None for a loader": (lambda: loss().fit_loader(nn.Identity(), None), TypeError, "loader must be .* got NoneType"),
    "a negative budget": (
        lambda: loss().fit_loader(nn.Identity(), [(X, Y)], memory_budget=-1),
        ValueError,
        "memory_budget must not be negative, got -1",
    ),
    "a budget that is no number": (
        lambda: loss().fit_loader(nn.Identity(), [(X, Y)], memory_budget="1 GB"),
        TypeError,
        "memory_budget must be a number, got str",
    ),
    "batches of several widths": (
        lambda: loss().fit_loader(nn.Identity(), [(X, Y), (X[:, :3], Y)]),
        ValueError,
        "loader must agree in features, got 4 and then 3 of a row",
    ),
    "None for the batches of k-means": (
        lambda: KMeans(num_clusters=1, metric="cosine").fit_stream(None),
        TypeError,
        "batches must be .* got NoneType",
    ),
    "inertia before a fit": (lambda: KMeans(num_clusters=1).inertia_, RuntimeError, "not fitted"),
    "inertia of loaded centers": (lambda: loaded_centers().inertia_, RuntimeError, "inertia_ needs a fit"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_names_the_wrong_argument(case):
    call, error, message = CASES[case]
    with pytest.raises(error, match=message):
        call()


def test_variances_are_read_again_after_a_change_in_place():
    variances = ONE.clone()
    assert log_prob(variances=variances).isfinite().all()
    variances.mul_(-1)
    with pytest.raises(ValueError, match="variances must be at least"):
        log_prob(variances=variances)
    with torch.inference_mode():
        assert log_prob(variances=ONE.clone()).isfinite().all()
