"""Sample weights: a row of weight w counts as w rows, in every kind of fit."""

import numpy as np
import pytest
import torch
from support.blobs import blobs

from cem_fast import GaussianMixture
from cem_fast.mixture.rows import Rows
from cem_fast.mixture.seeding import random_rows

KINDS = [("kmeans", "spherical"), ("kmeans", "diag"), *(("em", kind) for kind in ("spherical", "diag", "tied", "full"))]


def rows_and_repeats(classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, labels, _, centers = blobs(rows=240, classes=classes, spread=1.0)
    return x.double(), labels, torch.randint(0, 4, (len(x),), generator=g), centers.double() + 0.1


def same(a, b, rtol=1e-9):
    for name in ("means", "class_prior", "weights", "counts", a._spread):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=rtol, atol=1e-10)
    assert a.num_rows_ == b.num_rows_
    assert a.n_iter_ == b.n_iter_
    assert a.lower_bound_ == pytest.approx(b.lower_bound_, rel=1e-9)


@pytest.mark.parametrize("algorithm, kind", KINDS)
def test_weights_count_as_repeated_rows(algorithm, kind):
    x, labels, repeats, start = rows_and_repeats()
    options = dict(num_components=2, num_classes=3, algorithm=algorithm, covariance_type=kind, init=start, max_iter=8)
    weighted = GaussianMixture(**options).fit(x, labels, repeats.double())
    repeated = GaussianMixture(**options).fit(x.repeat_interleave(repeats, 0), labels.repeat_interleave(repeats))
    same(weighted, repeated)


@pytest.mark.parametrize("algorithm, kind", KINDS)
def test_equal_weights_change_nothing_but_the_counts(algorithm, kind):
    x, labels, _, start = rows_and_repeats()
    options = dict(num_components=2, num_classes=3, algorithm=algorithm, covariance_type=kind, init=start, max_iter=8)
    plain = GaussianMixture(**options).fit(x, labels)
    scaled = GaussianMixture(**options).fit(x, labels, torch.full((len(x),), 2.0**-12))
    for name in ("means", "class_prior", "weights", plain._spread):
        torch.testing.assert_close(getattr(scaled, name), getattr(plain, name), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(scaled.counts * 2**12, plain.counts)


@pytest.mark.parametrize("init", ["k-means++", "random"])
def test_rows_of_weight_0_are_never_drawn(init):
    x = torch.cat([torch.randn(50, 2), torch.randn(50, 2) + 1000])
    weight = (torch.arange(100) < 50).float()
    for seed in range(5):
        options = dict(init=init, algorithm="kmeans", generator=torch.Generator().manual_seed(seed))
        mixture = GaussianMixture(num_components=3, **options).fit(x, None, weight)
        assert mixture.means.max() < 100
        assert mixture.num_rows_ == 50


def test_random_rows_are_different_rows_drawn_by_their_weights():
    x, weight = torch.arange(4.0).unsqueeze(1), torch.tensor([1.0, 2.0, 0.0, 5.0])
    draw = dict(like=x[0], generator=torch.Generator().manual_seed(0))
    assert random_rows(Rows([(x, None, weight)]), 1, 3, **draw).flatten().sort().values.tolist() == [0.0, 1.0, 3.0]
    drawn = torch.cat([random_rows(Rows([(x, None, weight)]), 1, 1, **draw).flatten() for _ in range(300)])
    torch.testing.assert_close(torch.bincount(drawn.long(), minlength=4) / 300, weight / 8, atol=0.1, rtol=0)


@pytest.mark.parametrize("algorithm, kind", KINDS[1:4])
def test_streams_take_weights(algorithm, kind):
    x, labels, repeats, start = rows_and_repeats()
    options = dict(num_components=2, num_classes=3, algorithm=algorithm, covariance_type=kind, init=start, max_iter=5)
    options["tol"] = 0.0
    if algorithm == "em":
        options |= dict(
            init_weights=torch.full((3, 2), 0.5),
            init_variances=torch.ones_like(start if kind == "diag" else start[..., 0]),
        )
    whole = GaussianMixture(**options).fit(x, labels, repeats)
    batches = [(x[i : i + 60], labels[i : i + 60], repeats[i : i + 60]) for i in range(0, len(x), 60)]
    for budget in (1 << 30, 2000):
        same(GaussianMixture(**options).double().fit_stream(batches, memory_budget=budget), whole)
    with pytest.raises(ValueError, match="sample_weight must come with every batch or with none"):
        GaussianMixture(**options).fit_stream([batches[0], batches[1][:2]])


@pytest.mark.parametrize("algorithm", ["kmeans", "em"])
def test_later_rows_take_weights(algorithm):
    x, labels, repeats, start = rows_and_repeats()
    options = dict(num_components=2, num_classes=3, algorithm=algorithm, init=start, covariance_type="diag")
    many = x.repeat_interleave(repeats, 0), labels.repeat_interleave(repeats)
    weighted, repeated = (GaussianMixture(**options).fit(x, labels) for _ in range(2))
    same(weighted.partial_fit(x, labels, repeats), repeated.partial_fit(*many))
    weighted.gather(x, labels, repeats)
    repeated.gather(*many)
    same(weighted.step(), repeated.step())


def test_a_class_of_weight_0_is_a_class_without_rows():
    x, labels, _, _ = rows_and_repeats()
    mixture = GaussianMixture(num_components=2, num_classes=3).fit(x, labels, (labels != 1).float())
    assert mixture.class_prior[1] == 0
    assert mixture.num_rows_ == int((labels != 1).sum())


@pytest.mark.parametrize(
    "weight, error, message",
    [
        (torch.ones(7), ValueError, r"sample_weight must have shape \[N\] = \(8,\), got \(7,\)"),
        (torch.ones(8, 1), ValueError, r"sample_weight must have shape \[N\], got \(8, 1\)"),
        (torch.ones(8).neg(), ValueError, "sample_weight must be finite and not negative, got negative numbers"),
        (torch.full((8,), torch.nan), ValueError, "sample_weight must be finite and not negative, got NaN or infinity"),
        (torch.zeros(8), ValueError, "sample_weight must be positive for at least one row, got zeros"),
        (torch.ones(8).bool(), TypeError, "sample_weight must be numbers, got torch.bool"),
        ([1.0] * 8, TypeError, "sample_weight must be a tensor of shape .N., got list"),
    ],
)
def test_bad_weights(weight, error, message):
    for method in ("fit", "partial_fit"):
        with pytest.raises(error, match=message):
            getattr(GaussianMixture(num_components=2), method)(torch.rand(8, 3), None, weight)


def test_arrays_instead_of_tensors():
    x, labels, repeats, start = rows_and_repeats()
    options = dict(num_components=2, num_classes=3, init=start)
    mixture = GaussianMixture(**options).fit(x.numpy(), labels.numpy(), sample_weight=repeats.numpy())
    same(mixture, GaussianMixture(**options).fit(x, labels, repeats))
    batches = [(x.numpy()[i::4], labels.numpy()[i::4], repeats.numpy()[i::4]) for i in range(4)]
    streamed = GaussianMixture(**options).fit_stream(batches)
    torch.testing.assert_close(streamed.means, mixture.means)
    integers = GaussianMixture(num_components=1).fit(np.array([[1], [3]]))
    assert integers.means.dtype == torch.float64
    assert integers.means.item() == 2.0
